"""`neurosde info`: what a cube, a folder of shards or any other labelled netCDF file, such as a posterior, holds."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from neurosde.datasets.files import open_netcdf
from neurosde.datasets.shards import open_cube, shards_of
from neurosde.options import OptionParser


def describe(path: str | Path) -> str:
    """Describe a file or folder in some twenty lines; of the data only what is small is read.

    Args:
        path: a cube, a folder of shards, or a netCDF file with or without groups.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: unreadable, or the shards of a folder do not fit together.
    """
    path = Path(path)
    if path.is_file():
        with open_netcdf(path) as dataset:
            is_cube = "network" in dataset.dims
        if not is_cube:
            with xr.open_datatree(path, engine="netcdf4", decode_times=False) as tree:
                return "\n".join(_tree_lines(path, tree))
    shards = shards_of(path)
    with open_cube(path) as cube:
        return "\n".join(_cube_lines(path, cube, len(shards), sum(shard.path.stat().st_size for shard in shards)))


def _cube_lines(path: Path, cube: xr.Dataset, files: int, size: int) -> Iterator[str]:
    yield f"{path}: {cube.attrs.get('title', 'no title')}"
    yield f"  {files} file{'s' if files > 1 else ''}, {_bytes(size)}"
    yield "\nDimensions"
    yield from _dimension_lines(cube)
    yield "\nVariables"
    yield from _variable_lines(cube)
    yield "\nContents"
    config: dict[str, Any] = json.loads(cube.attrs.get("config", "{}"))
    ensemble = config.pop("ensemble", None)
    if isinstance(ensemble, dict):
        rest = ", ".join(f"{key} = {value}" for key, value in ensemble.items() if key != "name")
        yield f"  ensemble     {ensemble.get('name', '?')} ({rest})"
    for name in ("gain", "noise_std", "tau"):
        if name in cube and cube[name].size:
            values = cube[name].to_numpy()
            low, high = float(values.min()), float(values.max())
            yield f"  {name:<12} " + (f"{low:.6g}" if low == high else f"{low:.6g} to {high:.6g}")
    for flagged, array in cube.data_vars.items():
        if "flag_values" in array.attrs and set(array.dims) <= {"network", "neuron"}:
            yield f"  {flagged!s:<12} {_flag_counts(array)}"
    yield f"  config       {', '.join(f'{key} = {value}' for key, value in config.items()) or 'none'}"
    for step in json.loads(cube.attrs.get("observation", "[]")):
        neurons = step.pop("neurons")
        done = ", ".join(f"{key} = {value}" for key, value in step.items() if value not in (None, 0.0) and key != "of")
        yield f"  observed     {len(neurons)} of {step['of']} neurons, {done}"
    yield from _origin_lines(cube.attrs)


def _tree_lines(path: Path, tree: xr.DataTree) -> Iterator[str]:
    yield f"{path}: {tree.attrs.get('title', 'no title')}"
    yield f"  1 file, {_bytes(path.stat().st_size)}"
    for node in tree.subtree:
        if node.data_vars:
            yield f"\n{'Variables' if node is tree else node.path}"
            yield from _variable_lines(node.to_dataset())
    known = ("recording", "network", "method", "drive", "notes", "config")
    said = [name for name in known if str(tree.attrs.get(name, ""))]
    if said:
        yield "\nContents"
        yield from (f"  {name:<12} {tree.attrs[name]}" for name in said)
    yield from _origin_lines(tree.attrs)


def _dimension_lines(dataset: xr.Dataset) -> Iterator[str]:
    for dim, size in dataset.sizes.items():
        line = f"  {dim!s:<12} {size}"
        if dim in dataset.coords and size and dataset[dim].dtype.kind in "fiu":
            values = dataset[dim].to_numpy()
            units = dataset[dim].attrs.get("units", "1")
            unit = "" if units == "1" else f" {units}"
            line += f"  ({values[0]:.6g} to {values[-1]:.6g}{unit}"
            if dim == "time" and size > 1:
                line += f", every {(values[-1] - values[0]) / (size - 1):.6g}{unit}"
            line += ")"
        yield line


def _variable_lines(dataset: xr.Dataset) -> Iterator[str]:
    for name, array in dataset.data_vars.items():
        shape = " x ".join(f"{dim} {size}" for dim, size in array.sizes.items()) or "one number"
        units = array.attrs.get("units", "no units")
        yield (
            f"  {name!s:<14} {array.dtype!s:<8} {_bytes(array.nbytes):>9}  "
            f"{shape}; {array.attrs.get('long_name', 'no description')}{'' if units == '1' else f' [{units}]'}"
        )


def _flag_counts(array: xr.DataArray) -> str:
    values, meanings = np.atleast_1d(array.attrs["flag_values"]), str(array.attrs["flag_meanings"]).split()
    data = array.to_numpy()
    counts = {meaning: int((data == value).sum()) for value, meaning in zip(values, meanings, strict=False)}
    return ", ".join(f"{count} {meaning}" for meaning, count in counts.items() if count)


def _origin_lines(attributes: dict[Any, Any]) -> Iterator[str]:
    yield "\nOrigin"
    for label, name in (
        ("made", "date_created"), ("neurosde", "neurosde_version"), ("commit", "git_commit"), ("seed", "seed"),
        ("schema", "schema_version"), ("conventions", "Conventions"), ("licence", "license"),
    ):  # fmt: skip
        if name in attributes:
            yield f"  {label:<12} {attributes[name]}"


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def add_arguments(parser: OptionParser) -> None:
    """Add the options of `neurosde info`."""
    parser.add_argument("path", type=Path, metavar="CUBE", help="a cube, a folder of shards, or a posterior")


def run(options: Namespace) -> int:
    """Print the description."""
    print(describe(options.path))
    return 0
