"""Arrays out of MATLAB files: version 4 to 7.2 through scipy, version 7.3, which is HDF5, through netCDF4.

Shapes are as MATLAB's `size` gives them. Fields of a struct are named with a dot, `session.activity`. Cells, strings,
logical and complex arrays are passed over.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import netCDF4
import numpy as np

HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"


def read_mat(path: str | Path) -> dict[str, np.ndarray]:
    """Read all real arrays of a MATLAB file.

    Args:
        path: the file.

    Returns:
        name → array in MATLAB's own shape; a number is (1, 1), a vector (1, n) or (n, 1).

    Raises:
        ValueError: not a MATLAB file, damaged, or without arrays of numbers.
    """
    try:
        with open(path, "rb") as handle:
            head = handle.read(520)
        arrays = _read_hdf5(path) if HDF5_SIGNATURE in (head[:8], head[512:]) else _read_classic(path)
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, NotImplementedError, IndexError) as error:
        raise ValueError(f"{path} is not a readable MATLAB file (cut short, or another format): {error}") from error
    if not arrays:
        raise ValueError(f"{path} must hold arrays of real numbers; it has none. Save the activity as a matrix.")
    return arrays


def _read_classic(path: str | Path) -> dict[str, np.ndarray]:
    from scipy.io import loadmat  # here, since scipy.io takes long to import
    from scipy.io.matlab import MatReadError

    try:
        contents = loadmat(path, chars_as_strings=True)
    except MatReadError as error:  # an Exception of its own kind
        raise ValueError(str(error)) from error
    return dict(_fields(contents, ""))


def _fields(contents: dict[str, Any], prefix: str) -> Iterator[tuple[str, np.ndarray]]:
    for name, value in contents.items():
        if name.startswith("__") or not isinstance(value, np.ndarray):
            continue
        if value.dtype.names is not None and value.size == 1:
            fields = value.reshape(-1)[0]
            yield from _fields({field: fields[field] for field in value.dtype.names}, f"{prefix}{name}.")
        elif value.dtype.kind in "fiu" and value.size:
            yield prefix + name, value


def _read_hdf5(path: str | Path) -> dict[str, np.ndarray]:
    with netCDF4.Dataset(path, "r") as file:
        file.set_auto_maskandscale(False)
        return dict(_variables(file, ""))


def _variables(group: Any, prefix: str) -> Iterator[tuple[str, np.ndarray]]:
    """HDF5 is row-major and MATLAB column-major, so that all axes are in the opposite order."""
    for name, variable in group.variables.items():
        kind = getattr(variable, "MATLAB_class", "")
        if kind not in ("char", "logical", "cell") and not getattr(variable, "MATLAB_empty", 0):
            values = np.asarray(variable[...])
            if values.dtype.kind in "fiu" and values.size:
                yield prefix + name, values.T
    for name, inner in group.groups.items():
        if not name.startswith("#"):  # where MATLAB keeps what cells refer to
            yield from _variables(inner, f"{prefix}{name}.")
