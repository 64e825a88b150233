"""Results that are written to their file row by row, so that a benchmark that was killed goes on after the last one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from neurosde.provenance import config_changes, whole_file

DONE = "done"


class KeptRows:
    """A dataset of which some dimensions number the rows of a benchmark, and its file.

    A row that is done is marked in a variable of its own, `done`, since a method may have nothing to say of one.

    Args:
        empty: the dataset without any row, NaN all over; its attribute `config` (JSON) says all that rows depend on.
        rows: dimensions that number the rows.
        path: file that is written after each row, and whose rows are taken if it is there; None keeps none.

    Raises:
        ValueError: the file is of other settings or variables, or no netCDF file.
    """

    def __init__(self, empty: xr.Dataset, rows: Sequence[str], path: str | Path | None = None) -> None:
        marks = np.zeros([empty.sizes[name] for name in rows], np.int8)
        self.results = empty.assign({DONE: (tuple(rows), marks, {"long_name": "whether a row is done", "units": "1"})})
        self.path = None if path is None else Path(path)
        if self.path is not None and self.path.exists():
            self.results = _read(self.path, self.results)

    def missing(self, **row: int) -> bool:
        """Whether a row, given by its place along each of the dimensions, is still to be made."""
        return not bool(self.results[DONE][row])

    def add(self, values: Mapping[str, Any], **row: int) -> None:
        """Put the values of a row in their place, mark it as done, and write the file.

        Args:
            values: of some variables; a variable that lacks dimensions of `row` is set as a whole along the others.
            row: place along each of the dimensions.

        Raises:
            OSError: the file cannot be written.
        """
        for name, value in values.items():
            variable = self.results[name]
            variable[{key: place for key, place in row.items() if key in variable.dims}] = np.asarray(value)
        self.results[DONE][row] = 1
        if self.path is not None:
            with whole_file(self.path) as temporary:
                self.results.to_netcdf(temporary, engine="netcdf4")


def _read(path: Path, wanted: xr.Dataset) -> xr.Dataset:
    try:
        with xr.open_dataset(path, engine="netcdf4") as there:
            results = there.load()
        changes = config_changes(str(results.attrs.get("config", "{}")), str(wanted.attrs["config"]))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no result of this benchmark ({error}); choose another --out.") from error
    if not changes and set(results.variables) != set(wanted.variables):
        changes = "other variables"
    if changes:
        raise ValueError(f"{path} is of another benchmark ({changes}); delete it, or choose another --out.")
    return results
