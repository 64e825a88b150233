"""`neurosde observe`: the cube that an experiment would have seen of a cube.

Memory is bounded by one block of networks whatever the cube's size, and network k of the result depends on network k of
the cube and on the options alone.
"""

from __future__ import annotations

import datetime
from argparse import Namespace
from dataclasses import fields
from pathlib import Path

import netCDF4
import numpy as np
import xarray as xr
from tqdm import tqdm

from neurosde.datasets.observation import Observation, observe
from neurosde.datasets.schema import validate_cube
from neurosde.datasets.shards import open_cube
from neurosde.options import OptionParser, add_options, from_options
from neurosde.provenance import config_json, git_commit, whole_file

BLOCK_BYTES = 2**26  # of activity read at a time


def observe_cube(path: str | Path, observation: Observation, out: str | Path) -> Path:
    """Observe a cube file, or a folder of shards, into one cube file.

    Args:
        path: the cube.
        observation: what is seen of it.
        out: name of the new cube, *.nc; whole or not there at all.

    Raises:
        FileNotFoundError: no such cube.
        ValueError: not a whole cube, a name that is not *.nc, or an observation that the cube does not allow.
        OSError: the folder cannot be written, or the disk is full.
    """
    out = Path(out)
    if out.suffix != ".nc":
        raise ValueError(f"a cube is written as netCDF; name it *.nc, got {out}.")
    with open_cube(path) as cube:
        validate_cube(cube)
        if out.exists() and (Path(path).resolve() in (out.resolve(), out.resolve().parent)):
            raise ValueError(f"{out} is what is to be observed; choose another --out.")
        count = cube.sizes["network"]
        per_network = max(1, cube["activity"].nbytes // count)
        block = max(1, min(count, BLOCK_BYTES // per_network))
        with whole_file(out) as temporary:
            try:
                _write(cube, observation, temporary, block)
            except RuntimeError as error:  # netCDF4 says "HDF error" for whatever the system refused
                raise OSError(f"could not write {out}: {error}; is the disk full?") from error
    return out


def _write(cube: xr.Dataset, observation: Observation, path: Path, block: int) -> None:
    count = cube.sizes["network"]
    now = datetime.datetime.now(datetime.UTC).replace(microsecond=0).isoformat()
    with netCDF4.Dataset(path, "w", format="NETCDF4") as file:
        for first in tqdm(range(0, count, block), unit="block", disable=None):
            seen = observe(cube.isel(network=slice(first, first + block)), observation)
            if first == 0:
                _lay_out(file, seen, count)
                history = f"{now} neurosde observe {config_json(observation)}\n{cube.attrs.get('history', '')}"
                file.setncatts(seen.attrs | {"history": history.strip(), "git_commit": git_commit()})
            for name, array in seen.variables.items():
                if array.dims[:1] == ("network",):
                    file[str(name)][first : first + block] = array.to_numpy()
                elif first == 0:
                    file[str(name)][...] = array.to_numpy()


def _lay_out(file: netCDF4.Dataset, seen: xr.Dataset, count: int) -> None:
    for dim, size in seen.sizes.items():
        file.createDimension(str(dim), count if dim == "network" else size)
    for name, array in seen.variables.items():
        dims = tuple(str(dim) for dim in array.dims)
        created = file.createVariable(str(name), array.dtype, dims, contiguous=bool(dims), fill_value=False)
        created.setncatts({key: np.asarray(v) if isinstance(v, list) else v for key, v in array.attrs.items()})


def add_arguments(parser: OptionParser) -> None:
    """Add the options of `neurosde observe`."""
    parser.add_argument("cube", type=Path, metavar="CUBE", help="a cube, or a folder of shards")
    add_options(parser, Observation)
    parser.add_argument("--out", type=Path, required=True, metavar="PATH", help="the cube to write, *.nc")


def run(options: Namespace) -> int:
    """Observe the cube and say what is left of it."""
    observation = from_options(Observation, options)
    if observation == Observation(seed=observation.seed):
        names = ", ".join("--" + item.name.replace("_", "-") for item in fields(Observation) if item.name != "seed")
        raise ValueError(f"nothing to observe by was given; give at least one of {names}.")
    out = observe_cube(options.cube, observation, options.out)
    with open_cube(out) as cube:
        sizes = ", ".join(f"{cube.sizes[dim]} {dim}s" for dim in ("network", "trial", "time", "neuron"))
    print(f"{out}: {sizes}, {out.stat().st_size / 1e6:.1f} MB")
    return 0
