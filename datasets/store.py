"""Writing a cube block by block, so that neither memory nor a crash sets its size.

The file grows under a `.partial` name. All space is laid out first; after that only data are written, never structure:
a block's data, sync, its `complete` flags, sync. A process killed at any moment therefore leaves every flagged block
intact, and the next one goes on after them. The final name appears by a rename when all blocks are there.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import netCDF4
import numpy as np

from neurosde.datasets.schema import SCHEMA_VERSION, Variable, coordinates, variables
from neurosde.provenance import config_json, global_attributes


class CubeWriter:
    """Writes one cube, from the start or from where an interrupted run left it.

    Args:
        path: final name of the cube.
        config: everything that its contents depend on; a cube made with another one is refused.
        sizes: length of each dimension.
        dt: spacing of the times.
        time_unit: unit of dt, tau and the times; 1 if they are in no particular one.
        seed: root seed.
        title: title of the cube.
        summary: what it holds, in a sentence.
        voltage: whether to store voltages.

    Raises:
        ValueError: a cube, or the start of one, made with another configuration is there already.
        OSError: the disk is too small, the folder cannot be written, or another process is writing this cube.
    """

    def __init__(
        self,
        path: Path,
        config: Mapping[str, Any],
        sizes: Mapping[str, int],
        *,
        dt: float,
        time_unit: str,
        seed: int,
        title: str,
        summary: str,
        voltage: bool,
    ) -> None:
        self.path = Path(path)
        self.partial = path.with_name(path.name + ".partial")
        self._config = config_json(config)
        self._file: netCDF4.Dataset | None = None
        if path.exists():
            self._check_config(netCDF4.Dataset(path, "r"), path)
            self.complete = np.ones(sizes["network"], dtype=bool)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        if not self._reopen():
            wanted = {k: v for k, v in variables(time_unit).items() if k != "voltage" or voltage}
            attributes = global_attributes(title, summary, config, seed) | {"schema_version": SCHEMA_VERSION}
            self._check_space(wanted, sizes)
            self._lay_out(wanted, sizes, dt, time_unit, attributes)
        self.complete = np.asarray(self._opened["complete"][:] == 1)

    @property
    def finished(self) -> bool:
        """Whether the cube is there under its final name."""
        return self._file is None and self.path.exists()

    @property
    def _opened(self) -> netCDF4.Dataset:
        if self._file is None:
            raise ValueError(f"{self.path} is closed, or complete already.")
        return self._file

    def write(self, first: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Write the data of networks first, first + 1, …; return when they are on disk.

        Raises:
            OSError: the disk is full.
        """
        file = self._opened
        count = len(next(iter(arrays.values())))
        networks = slice(first, first + count)
        try:
            for name, values in arrays.items():
                file[name][networks] = values
            file.sync()
            file["complete"][networks] = 1
            file.sync()
        except (OSError, RuntimeError) as error:
            raise self._explained(error) from error
        self.complete[networks] = True

    def finish(self) -> None:
        """Sync the file and give it its final name.

        Raises:
            OSError: the disk is full.
        """
        self.close()
        with open(self.partial, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(self.partial, self.path)

    def close(self) -> None:
        """Close the file; what is written so far can be resumed."""
        if self._file is not None:
            file, self._file = self._file, None
            try:
                file.close()
            except (OSError, RuntimeError) as error:
                raise self._explained(error) from error

    def __enter__(self) -> CubeWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.close()
        except OSError:
            if error is None:
                raise

    def _reopen(self) -> bool:
        """Open what an interrupted run left; False if there is nothing, or its layout is not whole."""
        if not self.partial.exists():
            return False
        try:
            file = netCDF4.Dataset(self.partial, "r+")
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES, errno.EPERM):
                raise OSError(
                    error.errno, f"{self.partial} is being written by another process, or may not be written"
                ) from error
            self.partial.unlink()
            return False
        if "config" not in file.ncattrs():
            file.close()
            self.partial.unlink()
            return False
        self._check_config(file, self.partial, keep_open=True)
        self._file = file
        return True

    def _check_config(self, file: netCDF4.Dataset, path: Path, *, keep_open: bool = False) -> None:
        there = str(file.getncattr("config")) if "config" in file.ncattrs() else "{}"
        if there != self._config or not keep_open:
            file.close()
        if there != self._config:
            old, new = json.loads(there), json.loads(self._config)
            differing = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
            changes = ", ".join(f"{key} = {old.get(key)} there, {new.get(key)} now" for key in differing)
            raise ValueError(f"{path} was made with another configuration ({changes}); choose another --out-dir.")

    def _check_space(self, layout: Mapping[str, Variable], sizes: Mapping[str, int]) -> None:
        needed = sum(np.dtype(v.dtype).itemsize * int(np.prod([sizes[dim] for dim in v.dims])) for v in layout.values())
        free = shutil.disk_usage(self.path.parent).free
        if needed > free:
            raise OSError(
                errno.ENOSPC,
                f"{self.path} needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free; free some, or make fewer "
                "networks",
            )

    def _lay_out(
        self,
        layout: Mapping[str, Variable],
        sizes: Mapping[str, int],
        dt: float,
        time_unit: str,
        attributes: Mapping[str, Any],
    ) -> None:
        try:
            file = netCDF4.Dataset(self.partial, "w", format="NETCDF4")
            self._file = file
            for name, size in sizes.items():
                file.createDimension(name, size)
            for name, coordinate in coordinates(time_unit).items():
                self._create(file, name, coordinate)[:] = np.arange(sizes[name]) * (dt if name == "time" else 1)
            file["time"].axis = "T"
            for name, variable in layout.items():
                created = self._create(file, name, variable)
                created[(-1,) * len(variable.dims)] = 0  # writing the last value allots the space of all
            file["complete"][:] = 0
            file.setncatts({key: value for key, value in attributes.items() if key != "config"})
            file.sync()
            file.setncattr("config", attributes["config"])  # last: where it is found, the layout is whole
            file.sync()
        except (OSError, RuntimeError) as error:
            raise self._explained(error) from error

    @staticmethod
    def _create(file: netCDF4.Dataset, name: str, variable: Variable) -> netCDF4.Variable:
        created = file.createVariable(name, variable.dtype, variable.dims, contiguous=True, fill_value=False)
        created.setncatts(variable.attributes)
        return created

    def _explained(self, error: Exception) -> OSError:
        """HDF5 does not tell why a write failed; a full disk is the usual reason."""
        free = shutil.disk_usage(self.path.parent).free
        code = getattr(error, "errno", None) or (errno.ENOSPC if free < 2**24 else errno.EIO)
        reason = "no space left on the disk" if code == errno.ENOSPC else f"{error} ({free / 1e9:.2f} GB are free)"
        return OSError(code, f"could not write {self.partial}: {reason}; run the same command again to resume")
