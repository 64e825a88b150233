"""`neurosde export`: a cube as a Zarr store, version 3, for object stores and parallel readers.

Every chunk holds whole networks, so that one network's variable is one read. The store is written beside its place and
renamed to it when it is whole.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import warnings
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import xarray as xr
from tqdm import tqdm

from neurosde.datasets.schema import validate_cube
from neurosde.datasets.shards import open_cube
from neurosde.options import OptionParser
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
    zarr = optional_package("zarr", "zarr")
    out = Path(out)
    if out.exists():
        raise ValueError(f"{out} is there already; remove it, or choose another name.")
    with open_cube(path) as cube:
        validate_cube(cube)
        count = cube.sizes["network"]
        block = max(1, min(count, CHUNK_BYTES * count // max(cube["activity"].nbytes, 1)))
        with _whole_folder(out) as temporary:
            for first in tqdm(range(0, count, block), unit="chunk", disable=None):
                part = cube.isel(network=slice(first, first + block)).load()
                if first == 0:
                    part.to_zarr(temporary, mode="w", zarr_format=3, consolidated=False, encoding=_chunks(part, block))
                else:
                    shared = [name for name, array in part.variables.items() if "network" not in array.dims]
                    part.drop_vars(shared).to_zarr(temporary, append_dim="network", consolidated=False)
            with warnings.catch_warnings():  # that the standard has no consolidated metadata yet; others skip over them
                warnings.simplefilter("ignore")
                zarr.consolidate_metadata(temporary)
    return out


def _chunks(cube: xr.Dataset, networks: int) -> dict[Any, Any]:
    return {
        name: {"chunks": tuple(networks if dim == "network" else size for dim, size in array.sizes.items())}
        for name, array in cube.variables.items()
        if array.dims
    }


@contextlib.contextmanager
def _whole_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; when the block succeeds it is synced and renamed to `path`."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                with open(file, "rb") as handle:
                    os.fsync(handle.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise explained(error, path) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def add_arguments(parser: OptionParser) -> None:
    """Add the options of `neurosde export`."""
    parser.add_argument("cube", type=Path, metavar="CUBE", help="a cube, or a folder of shards")
    parser.add_argument("--zarr", type=Path, required=True, metavar="OUT", help="folder of the Zarr store to write")


def run(options: Namespace) -> int:
    """Write the store and say where it is."""
    out = export_zarr(options.cube, options.zarr)
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    print(f"{out}: {size / 1e6:.1f} MB; open it with xarray.open_zarr")
    return 0
