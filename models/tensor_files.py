"""Tensors and a header of strings in one safetensors file, which appears under its name when it is whole."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from neurosde.provenance import whole_file


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> None:
    """Write a file.

    Raises:
        OSError: it cannot be written; nothing is left of it.
    """
    with whole_file(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode  # what the user lets new files be; safetensors would keep them to itself
        try:
            save_file(dict(tensors), temporary, dict(header))
        except SafetensorError as error:  # a full disk, among others
            raise OSError(str(error)) from error
        temporary.chmod(mode)


def read_tensors(path: str | Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Read header and tensors of a file.

    Raises:
        ValueError: not a whole safetensors file.
    """
    try:
        with safe_open(path, "pt") as stored:
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (not a mapping)
            return stored.metadata() or {}, tensors
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file, or is damaged ({error}).") from error
