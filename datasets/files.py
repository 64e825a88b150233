"""Arrays out of other people's files: npy, npz, csv, netCDF and MATLAB, with errors that name the file."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import xarray as xr

from neurosde.datasets.matlab import read_mat

KINDS = (".nc", ".npz", ".npy", ".csv", ".mat")


def existing_file(path: str | Path, kinds: Sequence[str] | None = KINDS) -> Path:
    """Return the path of an existing file of one of these kinds; of any kind for None.

    Raises:
        FileNotFoundError: there is none.
        ValueError: a folder, or not a kind of file that neurosde reads.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name a file in it, such as the cube.nc or a shard of a dataset.")
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    if kinds is not None and path.suffix.lower() not in kinds:
        raise ValueError(f"{path} must be one of {', '.join(kinds)}; got {path.suffix or 'no suffix'!r}.")
    return path


def open_netcdf(path: str | Path) -> xr.Dataset:
    """Open a netCDF file lazily.

    Raises:
        FileNotFoundError: there is none.
        ValueError: a folder, or not a readable netCDF file.
    """
    path = existing_file(path, None)
    try:
        return xr.open_dataset(path, engine="netcdf4", decode_times=False)
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"{path} is not a readable netCDF file (cut short, or another format): {error}") from error


def read_table(path: str | Path) -> pd.DataFrame:
    """Read a csv file of numbers, with a header line or without.

    Raises:
        ValueError: empty, ragged, or holds what is no number.
    """
    try:
        first = pd.read_csv(path, header=None, nrows=1)
        cells = list(first.iloc[0])
        words = any(_number(cell) is None for cell in (cells[1:] or cells))
        indexed = len(cells) > 1 and pd.isna(cells[0])  # what pandas writes: an empty corner, then names
        table = pd.read_csv(path, header=0 if words or indexed else None, index_col=0 if indexed else None)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a csv table of numbers: {error}") from error
    names = table.columns[0] if len(table.columns) else None
    if names is not None and not pd.api.types.is_numeric_dtype(table[names]):
        table = table.set_index(names)  # a first column of names
    if len(cells) == 1 and (table.shape[1] == 0 or not pd.api.types.is_numeric_dtype(table.iloc[:, 0])):
        raise ValueError(f"{path} must be a table of numbers with commas between its columns.")
    wrong = [str(column) for column in table.columns if not pd.api.types.is_numeric_dtype(table[column])]
    if wrong or table.empty:
        raise ValueError(f"{path} must hold numbers; columns {wrong[:5]} do not." if wrong else f"{path} is empty.")
    return table


def read_npz(path: str | Path) -> dict[str, np.ndarray]:
    """Read all arrays of a npz file, or the one of a npy file as `activity`; pickled objects are refused.

    Raises:
        ValueError: not a numpy file, or holds objects.
    """
    try:
        with open(path, "rb") as handle:  # numpy leaves the file open when an archive is damaged
            loaded = np.load(handle, allow_pickle=False)
            if isinstance(loaded, np.ndarray):
                return {"activity": loaded}
            with loaded:
                return {name: loaded[name] for name in loaded.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is not a readable numpy file of plain arrays: {error}") from error


def choose(names: Sequence[str], wanted: str | None, preferred: Sequence[str], path: str | Path) -> str:
    """Return which of a file's arrays to read: the one asked for, a usual name, or the only one.

    Raises:
        ValueError: the one asked for is not there, or it is not clear which is meant.
    """
    if wanted is not None:
        if wanted not in names:
            raise ValueError(f"{path} holds {list(names)}; got variable {wanted!r}.")
        return wanted
    for name in preferred:
        if name in names:
            return name
    if len(names) == 1:
        return names[0]
    if not names:
        raise ValueError(f"{path} holds no array that could be {preferred[0]!r}; a posterior is none.")
    raise ValueError(f"{path} holds {list(names)}; name the one to read (none is called {preferred[0]!r}).")


def read_array(path: str | Path, variable: str | None, preferred: Sequence[str]) -> np.ndarray:
    """Read one numeric array from a file of any kind we read.

    Raises:
        FileNotFoundError: there is none.
        ValueError: unreadable, or it is not clear which array is meant.
    """
    path = existing_file(path)
    suffix = path.suffix.lower()
    if suffix == ".csv":
        return read_table(path).to_numpy(dtype=np.float64)
    if suffix == ".npy":
        return np.asarray(read_npz(path)["activity"], dtype=np.float64)
    if suffix in (".npz", ".mat"):
        arrays = read_npz(path) if suffix == ".npz" else read_mat(path)
        return np.asarray(arrays[choose(list(arrays), variable, preferred, path)], dtype=np.float64)
    with open_netcdf(path) as dataset:
        names = [str(name) for name in dataset.data_vars if dataset[name].ndim >= 2]
        return dataset[choose(names, variable, preferred, path)].to_numpy().astype(np.float64)


def spacing(times: np.ndarray, path: str | Path) -> float | None:
    """Return how far evenly spaced times are apart; None where they are too few, or no numbers.

    Args:
        times: shape (time,).
        path: the file they are from.

    Raises:
        ValueError: the steps differ by more than a thousandth.
    """
    if len(times) < 2 or times.dtype.kind not in "fiu":
        return None
    steps = np.diff(times)
    dt = float(np.median(steps))
    if dt <= 0 or np.abs(steps - dt).max() > 1e-3 * dt:
        raise ValueError(
            f"the times of {path} must be evenly spaced; got steps from {steps.min():.6g} to {steps.max():.6g}. "
            "Resample the recording."
        )
    return float((times[-1] - times[0]) / (len(times) - 1))


def _number(cell: object) -> float | None:
    try:
        return float(str(cell))
    except ValueError:
        return None
