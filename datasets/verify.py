"""Checking shards: those that a build finds already made, and whole cubes against their manifest."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from neurosde.datasets.files import open_netcdf
from neurosde.datasets.manifest import AGAIN, MANIFEST_NAME, ShardRecord, digest_of, read_manifest
from neurosde.datasets.schema import SCHEMA_VERSION, validate_cube
from neurosde.datasets.shards import Shard, shards_in, shards_of
from neurosde.datasets.store import check_config
from neurosde.provenance import config_json


def check_shard(shard: Shard, config: str) -> None:
    """Check that a shard is whole, holds the networks of its name and was made with a configuration, given as JSON.

    Raises:
        ValueError: it is unreadable, not whole, or was made with another configuration or schema.
    """
    try:
        with open_netcdf(shard.path) as cube:
            there = str(cube.attrs.get("config", "{}"))
            schema = str(cube.attrs.get("schema_version", "none"))
            networks = cube["network"].to_numpy() if "network" in cube.coords else np.zeros(0)
            complete = "complete" in cube and bool((cube["complete"] == 1).all())
    except ValueError as error:
        raise ValueError(f"{error}. Delete it and {AGAIN}.") from error
    check_config(there, config, shard.path)
    if schema != SCHEMA_VERSION:
        raise ValueError(
            f"{shard.path} must have schema version {SCHEMA_VERSION}, got {schema}; choose another --out-dir."
        )
    if not complete or not np.array_equal(networks, np.arange(shard.first, shard.first + shard.count)):
        raise ValueError(f"{shard.path} does not hold all networks of its name; delete it and {AGAIN}.")


def finished_shards(folder: Path, planned: Sequence[Shard], config: str) -> dict[Shard, ShardRecord]:
    """Return what the manifest says of the shards that are there; check those that it does not list.

    Args:
        folder: where the shards are.
        planned: the shards that the folder is to have.
        config: the configuration that it is to have, as JSON.

    Raises:
        ValueError: the folder holds other shards, or shards of another configuration; they are left as they are.
    """
    known = {}
    path = folder / MANIFEST_NAME
    manifest = read_manifest(path) if path.exists() else None
    if manifest is not None:
        check_config(config_json(manifest.config), config, path)
    expected = set(planned)
    for shard in shards_in(folder):
        if shard not in expected:
            raise ValueError(
                f"{shard.path} is not one of the shards of {planned[0].count} networks; give the --shard-size that it "
                "was made with, or choose another --out-dir."
            )
        record = None if manifest is None else manifest.shards.get(shard.path.name)
        if record is None:
            check_shard(shard, config)
        elif (size := shard.path.stat().st_size) != record.bytes:
            raise ValueError(f"{shard.path} must have {record.bytes} bytes, got {size}; delete it and {AGAIN}.")
        else:
            known[shard] = record
    return known


def verify_cube(path: str | Path) -> str:
    """Check every file of a cube: shards against the checksums and the configuration of their manifest.

    Args:
        path: a cube's one file, its folder, or its manifest.

    Returns:
        What was found right, in words.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: something is wrong; the message names every bad file.
    """
    path = Path(path)
    folder = path.parent if path.name == MANIFEST_NAME else path
    if not (folder.is_dir() and (folder / MANIFEST_NAME).exists()):
        shards = shards_of(path)
        if folder.is_dir() and shards[0].path.name.startswith("network="):
            raise ValueError(f"{folder / MANIFEST_NAME} is missing; {AGAIN}, which makes it from the shards.")
        validate_cube(path)
        return f"a whole cube of {shards[0].count} networks (a single file has no checksum)"
    manifest = read_manifest(folder / MANIFEST_NAME)
    problems = []
    for record in manifest.shards.values():
        shard = Shard(folder / record.name, record.first, record.count)
        try:
            _verify_shard(shard, record, config_json(manifest.config))
        except (ValueError, OSError) as error:
            problems.append(str(error))
    if problems:
        raise ValueError(" ".join(problems))
    validate_cube(folder)
    size = sum(record.bytes for record in manifest.shards.values())
    return f"{len(manifest.shards)} shards, {size / 1e6:.1f} MB: checksums and configuration are right"


def _verify_shard(shard: Shard, record: ShardRecord, config: str) -> None:
    if not shard.path.is_file():
        raise ValueError(f"{shard.path} is missing; {AGAIN} to make it.")
    size = shard.path.stat().st_size
    if size != record.bytes or digest_of(shard.path) != record.sha256:
        what = f"{size} bytes, not the {record.bytes}" if size != record.bytes else "another checksum than that"
        raise ValueError(f"{shard.path} has {what} of the manifest; delete it and {AGAIN} to make it anew.")
    check_shard(shard, config)
