"""Cubes that are folders: shards of consecutive networks, listed and checked in a manifest.

    manifest.json                networks, bytes and sha256 of each shard; the configuration and its sha256; versions
    network=000000-000099.nc     a whole cube of networks 0 … 99; its coordinate `network` holds their global indices
    network=000100-000199.nc     all shards are of one size but the last

The manifest is written last (`neurosde.datasets.manifest`); a folder without one is read all the same.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from xarray.backends import BackendArray
from xarray.core import indexing

from neurosde.datasets.files import open_netcdf
from neurosde.datasets.manifest import AGAIN, MANIFEST_NAME, read_manifest

CUBE_NAME = "cube.nc"


@dataclass(frozen=True)
class Shard:
    """A file that holds networks first … first + count − 1 of a cube."""

    path: Path
    first: int
    count: int


def shard_name(first: int, count: int) -> str:
    """Return the file name of the shard of networks first … first + count − 1."""
    return f"network={first:06d}-{first + count - 1:06d}.nc"


def shards_in(folder: Path) -> list[Shard]:
    """List the shards that are in a folder, in order, whether or not they are all of a cube.

    Raises:
        ValueError: two shards overlap, or a file is named like a shard but is none.
    """
    shards = []
    for path in folder.glob("network=*.nc"):
        found = re.fullmatch(r"network=(\d{6,})-(\d{6,})\.nc", path.name)
        first, last = (int(number) for number in found.groups()) if found else (1, 0)
        if first > last or path.name != shard_name(first, last - first + 1):
            raise ValueError(f"{path} must be named like {shard_name(0, 100)}; rename it, or move it elsewhere.")
        shards.append(Shard(path, first, last - first + 1))
    shards.sort(key=lambda shard: (shard.first, shard.count))
    for one, other in zip(shards, shards[1:], strict=False):
        if other.first < one.first + one.count:
            raise ValueError(f"{one.path} and {other.path.name} hold the same networks; move one of them elsewhere.")
    return shards


def shards_of(path: str | Path) -> list[Shard]:
    """List the files of a cube in the order of their networks; only their names and sizes are looked at.

    Args:
        path: a cube's one file, its folder, or its manifest.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: shards are missing, too many, overlap or are not those of the manifest; the message names the file.
    """
    path = Path(path)
    folder = path.parent if path.name == MANIFEST_NAME else path
    if not folder.is_dir():
        with open_netcdf(path) as cube:
            if "network" not in cube.dims:
                raise ValueError(f"{path} is not a cube: it has no dimension network.")
            first = int(cube["network"][0]) if "network" in cube.coords else 0
            return [Shard(path, first, cube.sizes["network"])]
    shards = shards_in(folder)
    single = folder / CUBE_NAME
    if single.exists():
        if shards:
            raise ValueError(f"{folder} holds {CUBE_NAME} and shards ({shards[0].path.name} …); name the one to read.")
        return shards_of(single)
    if not shards:
        raise FileNotFoundError(f"no cube in {folder}: neither {CUBE_NAME} nor shards such as {shard_name(0, 100)}")
    if (folder / MANIFEST_NAME).exists():
        _check_manifest(folder, shards)
    _check_whole(folder, shards)
    return shards


def _check_manifest(folder: Path, shards: Sequence[Shard]) -> None:
    listed = read_manifest(folder / MANIFEST_NAME).shards
    there = {shard.path.name for shard in shards}
    for name in sorted(listed.keys() - there):
        raise ValueError(f"{folder / name} is in the manifest but missing; {AGAIN} to make it.")
    for shard in shards:
        if shard.path.name not in listed:
            raise ValueError(f"{shard.path} is not in the manifest; {AGAIN}, or move it elsewhere.")
        size, expected = shard.path.stat().st_size, listed[shard.path.name].bytes
        if size != expected:
            raise ValueError(
                f"{shard.path} must have {expected} bytes as in the manifest, got {size}; delete it and {AGAIN}."
            )


def _check_whole(folder: Path, shards: Sequence[Shard]) -> None:
    """Check that the shards cover networks 0 … n − 1, n being what the first one's configuration says, if it does."""
    expected = 0
    for shard in shards:
        if shard.first != expected:
            missing = folder / shard_name(expected, shard.first - expected)
            raise ValueError(f"{missing} is missing, or several for it; {AGAIN} to make it.")
        expected += shard.count
    for shard in shards[1:-1]:
        if shard.count != shards[0].count:
            raise ValueError(f"{shard.path} must hold {shards[0].count} networks like the first; got {shard.count}.")
    with open_netcdf(shards[0].path) as cube:
        total = json.loads(cube.attrs.get("config", "{}")).get("num_networks", expected)
    if total != expected:
        raise ValueError(f"{folder} must hold {total} networks, got {expected} (to {shards[-1].path.name}); {AGAIN}.")


def check_alike(shard: Shard, attributes: Mapping[Any, Any], first: Mapping[Any, Any]) -> None:
    """Check that a shard has the schema and the configuration of the first one, by the attributes of their files.

    Raises:
        ValueError: it has others.
    """
    for name in ("schema_version", "config"):
        there, expected = attributes.get(name), first.get(name)
        if there != expected:
            what = f"{name} {expected}, got {there}" if name == "schema_version" else "their configuration"
            raise ValueError(f"{shard.path} must be like the shards before it and have {what}; delete it and {AGAIN}.")


def open_cube(path: str | Path) -> xr.Dataset:
    """Open a cube lazily, be it one file or a folder of shards; shards are opened when their data are asked for.

    Args:
        path: a cube's one file, its folder, or its manifest.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: unreadable, or its shards do not fit together; the message names the file.
    """
    shards = shards_of(path)
    if len(shards) == 1:
        return open_netcdf(shards[0].path)
    opened = _OpenShards(shards)
    first = opened.dataset(0)
    total = sum(shard.count for shard in shards)

    def whole(name: str, variable: xr.Variable) -> xr.Variable:
        if variable.dims[:1] != ("network",):
            return variable
        if name == "network":
            return xr.Variable("network", np.arange(total), variable.attrs)
        lazy = indexing.LazilyIndexedArray(_ShardedArray(opened, name, (total, *variable.shape[1:]), variable.dtype))
        return xr.Variable(variable.dims, lazy, variable.attrs)

    dataset = xr.Dataset(
        {str(name): whole(str(name), array.variable) for name, array in first.data_vars.items()},
        {str(name): whole(str(name), array.variable) for name, array in first.coords.items()},
        first.attrs,
    )
    dataset.set_close(opened.close)
    return dataset


class _OpenShards:
    """The datasets of shards, opened at first use; xarray itself closes and reopens the files behind too many."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self.shards = list(shards)
        self.starts = np.array([shard.first for shard in shards])
        self._datasets: dict[int, xr.Dataset] = {}
        self._first: Mapping[Any, Any] | None = None

    def dataset(self, i: int) -> xr.Dataset:
        if i not in self._datasets:
            shard = self.shards[i]
            dataset = open_netcdf(shard.path)
            indices = dataset["network"].to_numpy() if "network" in dataset.coords else np.zeros(0)
            if not np.array_equal(indices, np.arange(shard.first, shard.first + shard.count)):
                dataset.close()
                raise ValueError(f"{shard.path} does not hold the networks of its name; delete it and {AGAIN}.")
            try:
                check_alike(shard, dataset.attrs, self._first or dataset.attrs)
            except ValueError:
                dataset.close()
                raise
            self._first = self._first or dataset.attrs
            self._datasets[i] = dataset
        return self._datasets[i]

    def close(self) -> None:
        datasets, self._datasets = self._datasets, {}
        for dataset in datasets.values():
            dataset.close()


class _ShardedArray(BackendArray):
    """A variable of all shards, end to end along its first dimension."""

    def __init__(self, opened: _OpenShards, name: str, shape: tuple[int, ...], dtype: np.dtype) -> None:
        self.opened, self.name, self.shape, self.dtype = opened, name, shape, dtype

    def __getitem__(self, key: indexing.ExplicitIndexer) -> Any:
        return indexing.explicit_indexing_adapter(key, self.shape, indexing.IndexingSupport.OUTER, self._read)

    def _read(self, key: tuple[Any, ...]) -> np.ndarray:
        networks, rest = key[0], key[1:]
        if isinstance(networks, int | np.integer):
            return self._read((np.array([networks]), *rest))[0]
        if isinstance(networks, slice):
            networks = np.arange(*networks.indices(self.shape[0]))
        wanted = np.asarray(networks)
        owners = np.searchsorted(self.opened.starts, wanted, side="right") - 1
        if not len(wanted):
            return self._part(0, slice(0), rest)
        edges = [0, *np.flatnonzero(np.diff(owners)) + 1, len(wanted)]
        parts = []
        for start, stop in zip(edges, edges[1:], strict=False):
            local = wanted[start:stop] - self.opened.starts[owners[start]]
            steps = np.unique(np.diff(local))
            if len(steps) == 0 or (len(steps) == 1 and steps[0] == 1):
                local = slice(int(local[0]), int(local[-1]) + 1)
            parts.append(self._part(int(owners[start]), local, rest))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _part(self, i: int, networks: Any, rest: tuple[Any, ...]) -> np.ndarray:
        variable = self.opened.dataset(i).variables.get(self.name)
        shard = self.opened.shards[i]
        if variable is None or variable.shape != (shard.count, *self.shape[1:]):
            raise ValueError(f"{shard.path} must have {self.name} shaped {(shard.count, *self.shape[1:])}.")
        keys: Mapping[str, Any] = dict(zip(map(str, variable.dims), (networks, *rest), strict=True))
        return variable.isel(keys).to_numpy()
