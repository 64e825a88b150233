"""How fast a cube is written, beside the same bytes in a bare file.

Both get the same blocks of arrays, made beforehand, under a temporary name that is synced and renamed in the end. A
cube takes flags, a sync per block and a checksum besides, as `neurosde.datasets.build_dataset` writes its shards.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import xarray as xr
from tqdm import tqdm

from neurosde.datasets.build_dataset import DatasetConfig, simulate_block
from neurosde.datasets.store import CubeFile, sync_folder
from neurosde.provenance import whole_file

CUBE, RAW = "cube", "raw file"


def writing_speed(config: DatasetConfig, repeats: int) -> xr.DataArray:
    """Write a file of all networks of a configuration again and again, by turns as a cube and as bare bytes.

    Args:
        config: the cube; one block of it is simulated and stands for all.
        repeats: how often, after once that is not timed.

    Returns:
        Bytes per second (writer, repeat).

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    block = simulate_block(config, 0, config.block_size)
    path = Path(config.out_dir) / "written"
    path.parent.mkdir(parents=True, exist_ok=True)
    rates = np.empty((2, repeats))
    with tqdm(total=2 * repeats, unit="file", disable=None) as progress:
        for repeat in range(-1, repeats):
            for k, write in enumerate((_write_cube, _write_raw)):
                seconds = _seconds(write, path, config, block)
                if repeat >= 0:
                    rates[k, repeat] = path.stat().st_size / seconds
                    progress.update()
                path.unlink()
                sync_folder(path.parent)
    attributes = {"long_name": "bytes written and synced per second", "units": "byte s-1"}
    return xr.DataArray(rates, dims=("writer", "repeat"), coords={"writer": [CUBE, RAW]}, attrs=attributes)


def _seconds(
    write: Callable[[Path, DatasetConfig, dict[str, np.ndarray]], None],
    path: Path,
    config: DatasetConfig,
    block: dict[str, np.ndarray],
) -> float:
    start = time.perf_counter()
    with whole_file(path) as temporary:
        write(temporary, config, block)
    sync_folder(path.parent)
    return time.perf_counter() - start


def _write_cube(path: Path, config: DatasetConfig, block: dict[str, np.ndarray]) -> None:
    with CubeFile.create(path, **config.description(config.num_networks)) as file:
        for first in range(0, config.num_networks, config.block_size):
            count = min(config.block_size, config.num_networks - first)
            file.write(first, {name: values[:count] for name, values in block.items()})
        file.finish()


def _write_raw(path: Path, config: DatasetConfig, block: dict[str, np.ndarray]) -> None:
    with open(path, "wb", buffering=0) as file:
        for first in range(0, config.num_networks, config.block_size):
            count = min(config.block_size, config.num_networks - first)
            for values in block.values():
                rest = np.ascontiguousarray(values[:count]).reshape(-1).view(np.uint8).data
                while rest:  # the system may take less than it was given
                    rest = rest[file.write(rest) :]


def summary(speed: xr.DataArray) -> str:
    """Say in words how fast cubes are written."""
    medians, ranges = speed.median("repeat") / 1e9, [speed.min("repeat") / 1e9, speed.max("repeat") / 1e9]
    said = [
        f"{name} {float(medians.sel(writer=name)):.2f} GB/s "
        f"({float(ranges[0].sel(writer=name)):.2f} … {float(ranges[1].sel(writer=name)):.2f})"
        for name in (CUBE, RAW)
    ]
    ratio = float(medians.sel(writer=CUBE) / medians.sel(writer=RAW))
    return f"Written: {said[0]}, {said[1]}: {ratio:.2f} of it."
