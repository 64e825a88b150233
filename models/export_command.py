"""`neurosde export`: a cube or a posterior as a Zarr store, or a posterior as an NWB file."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from neurosde.datasets.files import open_netcdf
from neurosde.datasets.zarr_store import check_new, export_zarr, whole_store
from neurosde.models.posterior_file import open_posterior
from neurosde.models.posterior_nwb import export_nwb
from neurosde.options import OptionParser
from neurosde.validation import optional_package


def export_posterior_zarr(path: str | Path, out: str | Path) -> Path:
    """Write a posterior file as a Zarr store of groups; open it with `xr.open_datatree(out, engine="zarr")`.

    Args:
        path: the posterior.
        out: folder of the store; must not be there yet.

    Raises:
        FileNotFoundError: no such posterior.
        ImportError: zarr is not installed.
        ValueError: not a posterior, or `out` is there already.
        OSError: the folder cannot be written, or the disk is full.
    """
    optional_package("zarr", "zarr")
    out = check_new(out)
    tree = open_posterior(path)
    with whole_store(out) as temporary:
        tree.to_zarr(temporary, zarr_format=3, consolidated=False)
    return out


def is_posterior(path: str | Path) -> bool:
    """Say whether a file is a posterior, and not a cube or a folder of shards.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: a file, but neither a posterior nor a cube.
    """
    path = Path(path)
    if path.is_dir():
        return False
    with open_netcdf(path) as dataset:
        if dataset.data_vars:
            if "network" not in dataset.dims:
                raise ValueError(f"{path} must be a cube or a posterior of neurosde infer; it is neither.")
            return False
    try:
        open_posterior(path)
    except ValueError as error:
        raise ValueError(f"{path} must be a cube or a posterior of neurosde infer: {error}") from error
    return True


def add_arguments(parser: OptionParser) -> None:
    """Add the options of `neurosde export`."""
    parser.add_argument("source", type=Path, metavar="FILE", help="a cube, a folder of shards, or a posterior")
    form = parser.add_mutually_exclusive_group(required=True)
    form.add_argument("--zarr", type=Path, metavar="OUT", help="folder of the Zarr store to write")
    form.add_argument("--nwb", type=Path, metavar="OUT", help="NWB file to write; of a posterior")


def run(options: Namespace) -> int:
    """Write the store or the file and say where it is."""
    posterior = is_posterior(options.source)
    if options.nwb is not None:
        if not posterior:
            raise ValueError(f"--nwb takes a posterior of neurosde infer; {options.source} is a cube: use --zarr.")
        out, how = export_nwb(options.source, options.nwb), "pynwb.NWBHDF5IO"
    elif posterior:
        out, how = export_posterior_zarr(options.source, options.zarr), 'xarray.open_datatree(…, engine="zarr")'
    else:
        out, how = export_zarr(options.source, options.zarr), "xarray.open_zarr"
    size = sum(file.stat().st_size for file in [out, *out.rglob("*")] if file.is_file())
    print(f"{out}: {size / 1e6:.1f} MB; open it with {how}")
    return 0
