"""Zarr stores, version 3, for object stores and parallel readers: of a cube, and how any is put in place when whole.

Every chunk of a cube holds whole networks, so that one network's variable is one read.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import xarray as xr
from tqdm import tqdm

from neurosde.datasets.schema import validate_cube
from neurosde.datasets.shards import open_cube
from neurosde.provenance import explained
from neurosde.validation import optional_package

CHUNK_BYTES = 2**24  # of activity: large enough for one request to an object store to be worth its while


def export_zarr(path: str | Path, out: str | Path) -> Path:
    """Write a cube file, or a folder of shards, as a Zarr store; open it with `xr.open_zarr`.

    Args:
        path: the cube.
        out: folder of the store; must not be there yet.

    Raises:
        FileNotFoundError: no such cube.
        ImportError: zarr is not installed.
        ValueError: not a whole cube, or `out` is there already.
        OSError: the folder cannot be written, or the disk is full.
    """
    optional_package("zarr", "zarr")
    out = check_new(out)
    with open_cube(path) as cube:
        validate_cube(cube)
        count = cube.sizes["network"]
        block = max(1, min(count, CHUNK_BYTES * count // max(cube["activity"].nbytes, 1)))
        with whole_store(out) as temporary:
            for first in tqdm(range(0, count, block), unit="chunk", disable=None):
                part = cube.isel(network=slice(first, first + block)).load()
                if first == 0:
                    part.to_zarr(temporary, mode="w", zarr_format=3, consolidated=False, encoding=_chunks(part, block))
                else:
                    shared = [name for name, array in part.variables.items() if "network" not in array.dims]
                    part.drop_vars(shared).to_zarr(temporary, append_dim="network", consolidated=False)
    return out


def _chunks(cube: xr.Dataset, networks: int) -> dict[Any, Any]:
    return {
        name: {"chunks": tuple(networks if dim == "network" else size for dim, size in array.sizes.items())}
        for name, array in cube.variables.items()
        if array.dims
    }


def check_new(path: str | Path) -> Path:
    """Return the path of something to be written where nothing is yet.

    Raises:
        ValueError: something is there.
    """
    path = Path(path)
    if path.exists():
        raise ValueError(f"{path} is there already; remove it, or choose another name.")
    return path


@contextlib.contextmanager
def whole_store(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; a store written there is consolidated, synced and renamed to `path`.

    Raises:
        OSError: the folder cannot be written, or the disk is full; the message names the store.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with warnings.catch_warnings():  # that the standard has no consolidated metadata yet; others skip over them
            warnings.simplefilter("ignore")
            optional_package("zarr", "zarr").consolidate_metadata(temporary)
        for file in temporary.rglob("*"):
            if file.is_file():
                with open(file, "rb") as handle:
                    os.fsync(handle.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise explained(error, path) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
