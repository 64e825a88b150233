"""The manifest of a folder of shards: what is in which file, its checksum, and where all of it came from.

It is written last, and says nothing that cannot be found out again from the shards.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from neurosde._version import __version__
from neurosde.provenance import config_json, git_commit, whole_file

MANIFEST_NAME = "manifest.json"
AGAIN = "run the same build-dataset command again"


@dataclass(frozen=True)
class ShardRecord:
    """What the manifest says of a shard: its name, its networks first … first + count − 1, its bytes and checksum."""

    name: str
    first: int
    count: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """A manifest: the configuration of the cube and its shards by name."""

    config: Mapping[str, Any]
    schema_version: str
    shards: Mapping[str, ShardRecord]


def digest_of(path: Path) -> str:
    """Return the sha256 of a file."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def write_manifest(folder: Path, config: Mapping[str, Any], schema_version: str, shards: Sequence[ShardRecord]) -> Path:
    """Write the manifest of a folder.

    Args:
        folder: where the shards are.
        config: the configuration that all of them were made with.
        schema_version: of all of them.
        shards: what is in them, in order.

    Raises:
        OSError: the folder cannot be written.
    """
    versions = {name: version(name) for name in ("numpy", "torch", "netCDF4")}
    versions |= {"neurosde": __version__, "git_commit": git_commit(), "python": platform.python_version()}
    contents = {
        "title": "shards of one neurosde cube: neurosde.datasets.shards.open_cube, or xarray.open_mfdataset",
        "schema_version": schema_version,
        "versions": versions,
        "config": config,
        "config_sha256": _config_digest(config),
        "num_networks": sum(shard.count for shard in shards),
        "shards": [asdict(shard) for shard in shards],
    }
    path = folder / MANIFEST_NAME
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(contents, indent=1) + "\n", encoding="utf-8")
    return path


def read_manifest(path: Path) -> Manifest:
    """Read a manifest.

    Raises:
        ValueError: it is not one, or its configuration is not what it was.
    """
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
        shards = {record["name"]: ShardRecord(**record) for record in contents["shards"]}
        manifest = Manifest(contents["config"], str(contents["schema_version"]), shards)
        if contents["config_sha256"] != _config_digest(manifest.config):
            raise ValueError("the checksum of its configuration is another one")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not a whole manifest ({error}); delete it and {AGAIN}, which renews it."
        ) from error
    return manifest


def _config_digest(config: Mapping[str, Any]) -> str:
    return hashlib.sha256(config_json(config).encode()).hexdigest()
