"""Writing a cube block by block, so that neither memory nor a crash sets its size.

The file grows under a `.partial` name. All space is laid out first; after that only data are written, never structure:
a block's data, sync, its `complete` flags, sync. A process killed at any moment therefore leaves every flagged block
intact, and the next one goes on after them. The final name appears by a rename when all blocks are there. A lock on the
folder, which the system lets go of when a process ends however it ends, keeps a second writer out.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import netCDF4
import numpy as np

from neurosde.datasets.files import open_netcdf
from neurosde.datasets.schema import SCHEMA_VERSION, Variable, coordinates, variables
from neurosde.provenance import config_json, global_attributes, make_folder

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


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
        self.partial = self.path.with_name(self.path.name + ".partial")
        self._config = config_json(config)
        self._file: netCDF4.Dataset | None = None
        self._lock: int | None = None
        if not self.path.exists():
            make_folder(self.path)
            self._lock_folder()
        try:
            if self.path.exists():  # perhaps another process has just finished it
                self._check_finished()
                return
            if not self._reopen():
                layout = {k: v for k, v in variables(time_unit).items() if k != "voltage" or voltage}
                attributes = global_attributes(title, summary, config, seed) | {"schema_version": SCHEMA_VERSION}
                self._check_space(layout, sizes)
                self._lay_out(layout, sizes, dt, time_unit, attributes)
            self.complete = np.asarray(self._opened["complete"][:] == 1)
        except BaseException:
            self._unlock()
            raise

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
            ValueError: networks are missing.
            OSError: the disk is full.
        """
        if not self.complete.all():
            raise ValueError(f"{int((~self.complete).sum())} networks of {self.path} are not written yet.")
        self._close_file()
        with open(self.partial, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(self.partial, self.path)
        self._unlock()

    def close(self) -> None:
        """Close the file and let others write; what is written so far can be resumed."""
        try:
            self._close_file()
        finally:
            self._unlock()

    def _close_file(self) -> None:
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

    def _lock_folder(self) -> None:
        """Become the only writer of this folder, until unlocked or dead."""
        if fcntl is None:
            warnings.warn("this system has no file locks; do not build twice in one folder at once.", stacklevel=4)
            return
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(folder)
            raise OSError(
                errno.EAGAIN, f"{self.path} is being built by another process; wait, or choose another --out-dir"
            ) from error
        except OSError as error:
            os.close(folder)
            warnings.warn(
                f"{self.path.parent} cannot be locked ({error}); do not build twice in it at once.", stacklevel=4
            )
            return
        self._lock = folder

    def _unlock(self) -> None:
        if self._lock is not None:
            folder, self._lock = self._lock, None
            os.close(folder)

    def _reopen(self) -> bool:
        """Open what an interrupted run left; False if there is nothing, or its layout is not whole."""
        if not self.partial.exists():
            return False
        try:
            file = netCDF4.Dataset(self.partial, "r+")
        except (OSError, RuntimeError) as error:
            try:
                netCDF4.Dataset(self.partial, "r").close()
            except (OSError, RuntimeError):
                # Killed while it was laid out. Set aside rather than deleted, in case the disk is to blame.
                os.replace(self.partial, self.partial.with_name(self.partial.name + ".broken"))
                return False
            raise OSError(
                errno.EAGAIN, f"{self.partial} is open in another process, or may not be written; close it there"
            ) from error
        there = str(file.getncattr("config")) if "config" in file.ncattrs() else None
        if there is None:  # the layout was not finished, so no data were written
            file.close()
            self.partial.unlink()
            return False
        self._file = file
        try:
            self._check_config(there, self.partial)
        except ValueError:
            self._close_file()
            raise
        return True

    def _check_finished(self) -> None:
        """Check that what has the final name is this cube, and whole."""
        with open_netcdf(self.path) as cube:
            self._check_config(str(cube.attrs.get("config", "{}")), self.path)
            self.complete = cube["complete"].to_numpy() == 1 if "complete" in cube else np.zeros(0, dtype=bool)
        if not (len(self.complete) and self.complete.all()):
            raise ValueError(f"{self.path} is not a whole cube; delete it and run the same command again.")

    def _check_config(self, there: str, path: Path) -> None:
        if there != self._config:
            old, new = json.loads(there), json.loads(self._config)
            differing = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
            changes = ", ".join(f"{key} = {old.get(key)} there, {new.get(key)} now" for key in differing)
            raise ValueError(f"{path} was made with another configuration ({changes}); choose another --out-dir.")

    def _check_space(self, layout: Mapping[str, Variable], sizes: Mapping[str, int]) -> None:
        needed = sum(np.dtype(v.dtype).itemsize * math.prod(sizes[dim] for dim in v.dims) for v in layout.values())
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
            explained = self._explained(error)
            with contextlib.suppress(OSError):
                self._close_file()
            self.partial.unlink(missing_ok=True)
            raise explained from error

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
