"""The state of a training on disk: safetensors for its tensors, JSON in the header for the rest, and no pickle.

The file appears under its name when it is whole, so that a kill leaves the last one that was.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.plugins import CheckpointIO

from neurosde.models.tensor_files import read_tensors, write_tensors
from neurosde.provenance import config_changes, config_json

FORMAT, FORMAT_VERSION = "neurosde-training", "1"


class SafeTensorsIO(CheckpointIO):
    """How Lightning writes and reads its checkpoints.

    Args:
        config: configuration of the training, which a state must be of.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config_json(config)

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a state."""
        tensors: dict[str, torch.Tensor] = {}
        plain = _plain(checkpoint, tensors)
        header = {
            "format": FORMAT, "format_version": FORMAT_VERSION, "config": self.config, "state": json.dumps(plain)
        }  # fmt: skip
        write_tensors(path, tensors, header)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a state.

        Raises:
            ValueError: no state, of another version, or of another training.
        """
        try:
            header, tensors = read_tensors(path)
        except ValueError as error:
            raise ValueError(f"{error} Delete it to start anew.") from error
        if (header.get("format"), header.get("format_version")) != (FORMAT, FORMAT_VERSION):
            raise ValueError(f"{path} is not the state of a training, or one of another version; choose another --out.")
        check_same_training(header["config"], self.config, path)
        return _restored(json.loads(header["state"]), tensors)

    def remove_checkpoint(self, path: Any) -> None:
        """Delete a state."""
        Path(path).unlink(missing_ok=True)


def check_same_training(there: str, wanted: str, path: Any) -> None:
    """Raise ValueError, which says what differs, unless two configurations, as JSON, are one."""
    if there != wanted:
        raise ValueError(f"{path} is of another training ({config_changes(there, wanted)}); choose another --out.")


def _plain(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """Nested containers as JSON can hold them, with keys and kinds kept; tensors go beside it."""
    if isinstance(value, torch.Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().contiguous().clone()  # safetensors refuses shared memory
        return {"tensor": name}
    if isinstance(value, Mapping):
        return {"mapping": [[_plain(key, tensors), _plain(item, tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [_plain(item, tensors) for item in value]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"the state of a training must be made of tensors and plain values; got {type(value).__name__}.")


def _restored(plain: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    if not isinstance(plain, dict):
        return plain
    ((kind, content),) = plain.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "mapping":
        return {_restored(key, tensors): _restored(item, tensors) for key, item in content}
    items = [_restored(item, tensors) for item in content]
    return tuple(items) if kind == "tuple" else items
