"""A trained network on disk: one safetensors file, its configuration as JSON in the header.

Nothing in it is executed when it is read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from neurosde._version import __version__
from neurosde.models.denoiser import PairNetwork, PairNetworkConfig
from neurosde.models.tensor_files import read_tensors, write_tensors
from neurosde.provenance import git_commit

Kind = Literal["prior", "posterior"]
FORMAT_VERSION = "1"
PRETRAINED = Path(__file__).parent / "pretrained"
_FOLDER = {"prior": PRETRAINED, "posterior": PRETRAINED / "posterior"}
_COMMAND = {"prior": "neurosde train prior", "posterior": "neurosde train cfg"}

Config = TypeVar("Config")


def pretrained_names(kind: Kind = "prior") -> list[str]:
    """Names of the priors, or of the posteriors, that come with neurosde."""
    return sorted(path.stem for path in _FOLDER[kind].glob("*.safetensors"))


def save_model(path: str | Path, kind: Kind, network: PairNetwork, config: Any, dtype: torch.dtype) -> Path:
    """Write a network and its configuration to one file, which appears when it is whole.

    Raises:
        ValueError: another suffix.
        OSError: the file cannot be written.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"a {kind} is stored as NAME.safetensors; got {path}.")
    header = {
        "format": f"neurosde-{kind}",
        "format_version": FORMAT_VERSION,
        "neurosde_version": __version__,
        "git_commit": git_commit(),
        "config": json.dumps(asdict(config), default=str),
    }
    state = network.state_dict()
    tensors = {name: value.detach().to("cpu", dtype).contiguous() for name, value in state.items()}
    write_tensors(path, tensors, header)
    return path


def load_model(
    path: str | Path, kind: Kind, config: Callable[..., Config], device: torch.device | str = "cpu"
) -> tuple[PairNetwork, Config]:
    """Read a network and its configuration.

    Args:
        path: file, folder of a training, or name of one that comes with neurosde.
        kind: what it must be.
        config: class of its configuration; tuples of it are lists in the file.
        device: where to put the network.

    Raises:
        FileNotFoundError: no such file, and none of that name comes with neurosde.
        ValueError: not of this kind, or of another format version; no such device.
    """
    file, command = find_model(path, kind), _COMMAND[kind]
    header, tensors = read_tensors(file)
    if header.get("format") != f"neurosde-{kind}":
        raise ValueError(f"{file} is not a {kind} of neurosde; write one with {command}.")
    if header.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{file} has the format version {header.get('format_version')}, of neurosde "
            f"{header.get('neurosde_version')}; neurosde {__version__} reads {FORMAT_VERSION}. Use that, or "
            "train again."
        )
    try:
        network, plain = _network(header, tensors)
        tuples = {name: tuple(value) for name, value in plain.items() if isinstance(value, list)}
        settings = config(network.config, **(plain | tuples))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{file} does not hold the network that its header describes ({error}).") from error
    try:
        return network.to(device), settings
    except (RuntimeError, AssertionError) as error:  # of torch without CUDA
        raise ValueError(f"device must be one of this machine, such as cpu; got {device} ({error}).") from error


def model_digest(path: str | Path, kind: Kind) -> str:
    """SHA-256 digest of a model's file, in hexadecimal digits.

    Args:
        path: file, folder of a training, or name of one that comes with neurosde.
        kind: what it must be.

    Raises:
        FileNotFoundError: no such file, and none of that name comes with neurosde.
    """
    file = find_model(path, kind)
    status = file.stat()
    return _digest(file, status.st_mtime_ns, status.st_size)


def model_label(path: str | Path, kind: Kind) -> str:
    """Return a path or name with the first digits of the file's digest, for the attributes of results."""
    return f"{path} (sha256 {model_digest(path, kind)[:16]})"


@lru_cache(maxsize=8)
def _digest(file: Path, modified: int, size: int) -> str:
    """Digest of a file as it was at that time."""
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def load_network(path: str | Path) -> PairNetwork:
    """Read the network of a prior or of a posterior.

    Raises:
        FileNotFoundError: no such file, and none of that name comes with neurosde.
        ValueError: no such network in it.
    """
    file = find_model(path, "posterior", "prior")
    try:
        return _network(*read_tensors(file))[0]
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{file} must hold a network to start from, a prior or a posterior ({error}).") from error


def _network(header: Mapping[str, str], tensors: Mapping[str, torch.Tensor]) -> tuple[PairNetwork, dict[str, Any]]:
    """The network of a file, and what else its configuration says."""
    plain = json.loads(header["config"])
    sizes = plain.pop("network")
    tuples = {name: tuple(value) for name, value in sizes.items() if isinstance(value, list)}
    network = PairNetwork(PairNetworkConfig(**(sizes | tuples)))
    network.load_state_dict({name: value.float() for name, value in tensors.items()})
    return network, plain


def find_model(path: str | Path, *kinds: Kind) -> Path:
    """Return the file that a path or name stands for.

    Args:
        path: file, folder of a training, or name of one that comes with neurosde.
        kinds: what it may be; the first that is there is taken.

    Raises:
        FileNotFoundError: no such file, and none of that name comes with neurosde.
    """
    given = Path(path)
    for file in (given / f"{kind}.safetensors" for kind in kinds) if given.is_dir() else (given,):
        if file.exists():
            return file
    folder = given if given.is_dir() else given.parent if given.suffix else None
    if folder is not None and (folder / "state.safetensors").exists():
        commands = " or ".join(_COMMAND[kind] for kind in kinds)
        raise FileNotFoundError(f"{path} is not trained yet; go on with {commands}.")
    for kind in kinds:
        if (there := _FOLDER[kind] / f"{path}.safetensors").exists():
            return there
    names = " or ".join(f"the {kind}s {pretrained_names(kind)}" for kind in kinds)
    raise FileNotFoundError(f"{path} is neither a file nor one of {names} of neurosde.")
