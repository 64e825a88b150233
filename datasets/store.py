"""Writing a cube block by block, so that neither memory nor a crash sets its size.

The file grows under a `.partial` name. All space is laid out first; after that only data are written, never structure:
a block's data, sync, its `complete` flags, sync. A process killed at any moment therefore leaves every flagged block
intact, and the next one goes on after them. The final name appears by a rename when all blocks are there. A lock on the
folder, which the system lets go of when a process ends however it ends, keeps a second writer out.

What is written goes on to the disk in the background while the next block is simulated, by another descriptor of the
same file in a thread that knows nothing of HDF5, whose library is for one thread only.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import netCDF4
import numpy as np

from neurosde.datasets.files import open_netcdf
from neurosde.datasets.manifest import digest_of
from neurosde.datasets.schema import SCHEMA_VERSION, Variable, coordinates, variables
from neurosde.provenance import config_changes, config_json, explained, global_attributes, make_folder

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


class CubeFile:
    """The file of a cube, or of a shard of one: laid out, then filled block by block.

    Args:
        path: where it is.
        file: the opened file.
    """

    def __init__(self, path: Path, file: netCDF4.Dataset) -> None:
        self.path = path
        self._file: netCDF4.Dataset | None = file
        self._disk = _WriteBack(path)

    @classmethod
    def create(
        cls,
        path: Path,
        config: Mapping[str, Any],
        sizes: Mapping[str, int],
        *,
        first: int = 0,
        dt: float,
        time_unit: str,
        seed: int,
        title: str,
        summary: str,
        voltage: bool,
    ) -> CubeFile:
        """Lay a file out: its dimensions, variables, attributes and the space of all data.

        Args:
            path: where to put it.
            config: everything that its contents depend on.
            sizes: length of each dimension.
            first: global index of its first network.
            dt: spacing of the times.
            time_unit: unit of dt, tau and the times; 1 if they are in no particular one.
            seed: root seed.
            title: title of the cube.
            summary: what it holds, in a sentence.
            voltage: whether to store voltages.

        Raises:
            OSError: the disk is full, or the folder cannot be written.
        """
        attributes = global_attributes(title, summary, config, seed) | {"schema_version": SCHEMA_VERSION}
        file: netCDF4.Dataset | None = None
        try:
            file = netCDF4.Dataset(path, "w", format="NETCDF4")
            for name, size in sizes.items():
                file.createDimension(name, size)
            for name, coordinate in coordinates(time_unit).items():
                values = np.arange(sizes[name]) * (dt if name == "time" else 1)
                _create(file, name, coordinate)[:] = values + first if name == "network" else values
            file["time"].axis = "T"
            for name, variable in _stored(time_unit, voltage).items():
                created = _create(file, name, variable)
                created[(-1,) * len(variable.dims)] = 0  # writing the last value allots the space of all
            file["complete"][:] = 0
            file.setncatts({key: value for key, value in attributes.items() if key != "config"})
            file.sync()
            file.setncattr("config", attributes["config"])  # last: where it is found, the layout is whole
            file.sync()
        except (OSError, RuntimeError) as error:
            why = _explained(error, path)
            if file is not None:
                with contextlib.suppress(OSError, RuntimeError):
                    file.close()
            path.unlink(missing_ok=True)
            raise why from error
        return cls(path, file)

    @property
    def config(self) -> str | None:
        """The configuration that it was made with, as JSON; None where the layout is not whole."""
        return str(self._opened.getncattr("config")) if "config" in self._opened.ncattrs() else None

    @property
    def complete(self) -> np.ndarray:
        """Which networks are written, shape (network,)."""
        return np.asarray(self._opened["complete"][:] == 1)

    @property
    def _opened(self) -> netCDF4.Dataset:
        if self._file is None:
            raise ValueError(f"{self.path} is closed, or complete already.")
        return self._file

    def write(self, start: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Write the networks at start, start + 1, … of this file: data, then flags. A kill does not undo it.

        Raises:
            OSError: the disk is full.
        """
        file = self._opened
        networks = slice(start, start + len(next(iter(arrays.values()))))
        try:
            for name, values in arrays.items():
                file[name][networks] = values
            file.sync()
            file["complete"][networks] = 1
            file.sync()
            self._disk.start()
        except (OSError, RuntimeError) as error:
            raise _explained(error, self.path) from error

    def finish(self) -> str:
        """Close the file; return its sha256, worked out while it goes to the disk.

        Raises:
            OSError: the disk is full.
        """
        try:
            file, self._file = self._opened, None
            file.close()
            self._disk.start()
            return digest_of(self.path)
        except (OSError, RuntimeError) as error:
            raise _explained(error, self.path) from error
        finally:
            self.close()

    def close(self) -> None:
        """Close the file; a second time does nothing.

        Raises:
            OSError: the disk is full.
        """
        file, self._file = self._file, None
        try:
            if file is not None:
                file.close()
            self._disk.close()
        except (OSError, RuntimeError) as error:
            raise _explained(error, self.path) from error

    def __enter__(self) -> CubeFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.close()
        except OSError:
            if error is None:
                raise


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
        self._file: CubeFile | None = None
        self._lock: int | None = None
        if not self.path.exists():
            make_folder(self.path)
            self._lock_folder()
        try:
            if self.path.exists():  # perhaps another process has just finished it
                self._check_finished()
                return
            self._file = self._reopen()
            if self._file is None:
                check_space(self.path, layout_bytes(sizes, voltage))
                self._file = CubeFile.create(
                    self.partial, config, sizes, dt=dt, time_unit=time_unit, seed=seed, title=title, summary=summary,
                    voltage=voltage,
                )  # fmt: skip
            self.complete = self._file.complete
        except BaseException:
            self._unlock()
            raise

    @property
    def finished(self) -> bool:
        """Whether the cube is there under its final name."""
        return self._file is None and self.path.exists()

    def write(self, first: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Write the data of networks first, first + 1, …; when it returns, a kill no longer undoes it.

        Raises:
            OSError: the disk is full.
        """
        if self._file is None:
            raise ValueError(f"{self.path} is closed, or complete already.")
        self._file.write(first, arrays)
        self.complete[first : first + len(next(iter(arrays.values())))] = True

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
        sync_folder(self.path.parent)
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
            file.close()

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

    def _reopen(self) -> CubeFile | None:
        """Open what an interrupted run left; None if there is nothing, or its layout is not whole."""
        if not self.partial.exists():
            return None
        try:
            file = netCDF4.Dataset(self.partial, "r+")
        except (OSError, RuntimeError) as error:
            try:
                netCDF4.Dataset(self.partial, "r").close()
            except (OSError, RuntimeError):
                # Killed while it was laid out. Set aside rather than deleted, in case the disk is to blame.
                os.replace(self.partial, self.partial.with_name(self.partial.name + ".broken"))
                return None
            raise OSError(
                errno.EAGAIN, f"{self.partial} is open in another process, or may not be written; close it there"
            ) from error
        cube = CubeFile(self.partial, file)
        there = cube.config
        if there is None:  # the layout was not finished, so no data were written
            cube.close()
            self.partial.unlink()
            return None
        try:
            check_config(there, self._config, self.partial)
        except ValueError:
            cube.close()
            raise
        return cube

    def _check_finished(self) -> None:
        """Check that what has the final name is this cube, and whole."""
        with open_netcdf(self.path) as cube:
            check_config(str(cube.attrs.get("config", "{}")), self._config, self.path)
            self.complete = cube["complete"].to_numpy() == 1 if "complete" in cube else np.zeros(0, dtype=bool)
        if not (len(self.complete) and self.complete.all()):
            raise ValueError(f"{self.path} is not a whole cube; delete it and run the same command again.")


class _WriteBack:
    """Sends what is written of a file on to the disk, in a thread of its own that never keeps the writer waiting."""

    def __init__(self, path: Path) -> None:
        self._descriptor: int | None = os.open(path, os.O_RDONLY) if hasattr(os, "fdatasync") else None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="write-back")
        self._running: Future[None] | None = None

    def start(self) -> None:
        if self._descriptor is not None and (self._running is None or self._running.done()):
            self._raise()
            self._running = self._thread.submit(os.fdatasync, self._descriptor)

    def close(self) -> None:
        """Wait for the thread; raise what it met with."""
        self._thread.shutdown()
        if self._descriptor is not None:
            descriptor, self._descriptor = self._descriptor, None
            os.close(descriptor)
        self._raise()

    def _raise(self) -> None:
        running, self._running = self._running, None
        if running is not None:
            running.result()


def layout_bytes(sizes: Mapping[str, int], voltage: bool) -> int:
    """Bytes of the data of a cube of these sizes."""
    layout = _stored("1", voltage).values()
    return sum(np.dtype(v.dtype).itemsize * math.prod(sizes[dim] for dim in v.dims) for v in layout)


def check_space(path: Path, needed: int) -> None:
    """Check that the disk has room for that many bytes.

    Raises:
        OSError: it has not.
    """
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        raise OSError(
            errno.ENOSPC,
            f"{path} needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free; free some, or make fewer networks",
        )


def check_config(there: str, wanted: str, path: Path) -> None:
    """Check that a file was made with the configuration that is wanted now, both as JSON.

    Raises:
        ValueError: it was not; the message says what differs.
    """
    if there != wanted:
        changes = config_changes(there, wanted)
        raise ValueError(f"{path} was made with another configuration ({changes}); choose another --out-dir.")


def sync_folder(folder: Path) -> None:
    """See to it that the names in a folder outlast a power cut, where the system can."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def lock_file(path: Path) -> Iterator[bool]:
    """Hold the lock on making `path`; yields False at once if a live process has it.

    The lock is a hidden file beside `path`, which outlives a killed process; the lock itself does not. Whoever holds it
    removes what dead ones left of `path` under temporary names (`neurosde.provenance.whole_file`).

    Raises:
        OSError: the folder cannot be written.
    """
    if fcntl is None:
        warnings.warn("this system has no file locks; do not build twice in one folder at once.", stacklevel=3)
        yield True
        return
    if fcntl is None:
        warnings.warn("this system has no file locks; do not build twice in one folder at once.", stacklevel=3)
        yield True
        return
    name = path.with_name(f".{path.name}.lock")
    descriptor = _locked(name, path)
    if descriptor is None:
        yield False
        return
    try:
        for leftover in path.parent.glob(f".{path.name}.*.part"):
            leftover.unlink(missing_ok=True)
        yield True
    finally:
        name.unlink(missing_ok=True)  # while it is held: nobody locks a file that is about to go
        os.close(descriptor)


def _locked(name: Path, path: Path) -> int | None:
    """Open and lock a lock file; None if a live process has it."""
    while True:
        descriptor = None
        try:
            descriptor = os.open(name, os.O_RDWR | os.O_CREAT, 0o666)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if name.exists() and os.path.samestat(os.fstat(descriptor), os.stat(name)):
                return descriptor
        except BlockingIOError:
            if descriptor is not None:
                os.close(descriptor)
            return None
        except FileNotFoundError:  # its last holder has just removed it, or the folder is gone
            if not path.parent.is_dir():
                raise
        except OSError as error:
            if descriptor is not None:
                os.close(descriptor)
                raise OSError(
                    error.errno, f"{name} cannot be locked ({error.strerror}); build on a file system that has locks"
                ) from error
            raise explained(error, path) from error
        if descriptor is not None:
            os.close(descriptor)


def _stored(time_unit: str, voltage: bool) -> dict[str, Variable]:
    return {k: v for k, v in variables(time_unit).items() if k != "voltage" or voltage}


def _create(file: netCDF4.Dataset, name: str, variable: Variable) -> netCDF4.Variable:
    created = file.createVariable(name, variable.dtype, variable.dims, contiguous=True, fill_value=False)
    created.setncatts(variable.attributes)
    return created


def _explained(error: Exception, path: Path) -> OSError:
    """HDF5 does not tell why a write failed; a full disk is the usual reason."""
    free = shutil.disk_usage(path.parent).free
    code = getattr(error, "errno", None) or (errno.ENOSPC if free < 2**24 else errno.EIO)
    reason = "no space left on the disk" if code == errno.ENOSPC else f"{error} ({free / 1e9:.2f} GB are free)"
    return OSError(code, f"could not write {path}: {reason}; run the same command again to resume")
