"""Reading networks out of a cube's files at the speed of the page cache.

Variables of a cube are contiguous in its file, so a network is a piece of it. HDF5 is asked where the variables lie and
then left out: plain reads go straight to where the numbers are wanted, which is one copy where netCDF4 takes two or
three, and leave no state behind that a fork or a thread could upset. Before a window of networks is visited (`enter`),
it is announced to the system in whole contiguous pieces, or, where networks are small, read in such pieces at once.

Variables that are chunked, compressed or of the other byte order, which build-dataset does not write, are read by HDF5,
window by window. HDF5 keeps one table of open files per process: a child forked while its parent has a file open reads
through the parent's handle, and fails at random. All files are therefore closed before a fork, and opened when needed.
"""

from __future__ import annotations

import io
import math
import os
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from neurosde.datasets.schema import validate_cube
from neurosde.datasets.shards import Shard, shards_of

LARGE_BYTES = 2**16  # a network of at least that many is worth a read of its own
MOST_OPEN = 64  # files at a time
_NOTHING = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True)
class Stored:
    """How a variable is stored: shape and dtype of one network, and where the first one starts, if contiguous."""

    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int | None

    @property
    def nbytes(self) -> int:
        """Bytes of one network."""
        return self.dtype.itemsize * math.prod(self.shape)

    @property
    def direct(self) -> bool:
        """Whether networks are read one by one, and not with their window."""
        return self.offset is not None and self.nbytes >= LARGE_BYTES


class _File:
    """One file of a cube, opened when it is read."""

    def __init__(self, shard: Shard) -> None:
        self._plain: io.FileIO | None = None
        self._hdf5: Any = None  # an h5py.File
        self.shard = shard
        self.size = shard.path.stat().st_size
        self.stored = _layout(shard)

    def read(self, name: str, first: int, out: np.ndarray) -> None:
        """Read networks first, first + 1, … of this file into a contiguous array (network, …)."""
        stored = self.stored[name]
        if stored.offset is not None:
            return self.fill(stored.offset + first * stored.nbytes, out.reshape(-1).view(np.uint8).data)
        if self._hdf5 is None:
            import h5py  # here and below, since not everything that imports this module reads cubes

            self._hdf5 = h5py.File(self.shard.path, "r")
        self._hdf5[name].read_direct(out, np.s_[first : first + len(out)])

    def fill(self, start: int, rest: memoryview) -> None:
        """Read the bytes from `start` on."""
        file = self._plain or self._opened()
        file.seek(start)
        while len(rest):  # the system may return less than was asked for
            count = file.readinto(rest)
            if not count:
                raise ValueError(f"{self.shard.path} was cut short while it was read; build it again.")
            rest = rest[count:]

    def announce(self, name: str, first: int, count: int) -> None:
        """Tell the system that networks first, first + 1, … of a contiguous variable are about to be read."""
        stored = self.stored[name]
        if stored.offset is not None and hasattr(os, "posix_fadvise"):
            start, length = stored.offset + first * stored.nbytes, count * stored.nbytes
            os.posix_fadvise(self._opened().fileno(), start, length, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        """Close the file; the next read opens it again."""
        plain, self._plain = self._plain, None
        hdf5, self._hdf5 = self._hdf5, None
        for file in (plain, hdf5):
            if file is not None:
                file.close()

    def _opened(self) -> io.FileIO:
        if self._plain is None:
            self._plain = io.FileIO(self.shard.path)
            size = os.fstat(self._plain.fileno()).st_size
            if size != self.size:
                self.close()
                raise ValueError(
                    f"{self.shard.path} must have {self.size} bytes as when the loader was made, got {size}; make the "
                    "loader again."
                )
        return self._plain

    def __del__(self) -> None:
        self.close()

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_plain": None, "_hdf5": None}


class CubeFiles:
    """The files of a cube, read by network. It can be pickled and forked; not for several threads at once.

    Args:
        path: a cube's one file, or its folder of shards.

    Attributes:
        stored: how each numeric variable over networks is stored.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: not a whole cube, a shard is missing, or shards differ; the message names the file.
    """

    def __init__(self, path: str | Path) -> None:
        validate_cube(path)
        self.path = Path(path)
        self._files = [_File(shard) for shard in shards_of(path)]
        self._starts = np.cumsum([0, *(file.shard.count for file in self._files)])
        self._open: list[_File] = []
        self._window = _NOTHING
        self._held: dict[str, np.ndarray] = {}
        self.stored = self._files[0].stored
        for file in self._files[1:]:
            for name, stored in self.stored.items():
                there = file.stored.get(name)
                if there is None or (there.shape, there.dtype) != (stored.shape, stored.dtype):
                    raise ValueError(
                        f"{file.shard.path} must hold {name} as {self._files[0].shard.path.name} does; delete it and "
                        "run the same build-dataset command again."
                    )
        _ALL.add(self)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def number(self, position: int) -> tuple[Path, int]:
        """Return the file and the index of the network at a position."""
        file = self._files[int(np.searchsorted(self._starts, position, side="right")) - 1]
        return file.shard.path, position - self._starts[self._files.index(file)] + file.shard.first

    def take(self, name: str, positions: np.ndarray) -> np.ndarray:
        """Read networks of a variable.

        Args:
            name: the variable.
            positions: which networks, in any order, shape (network,).

        Returns:
            A fresh array (network, …), in the order asked for.

        Raises:
            ValueError: a file has changed.
        """
        stored = self.stored[name]
        if name in self._held and self.entered(positions):
            return self._held[name][np.searchsorted(self._window, positions)]
        out = np.empty((len(positions), *stored.shape), stored.dtype)
        if stored.direct and not np.all(np.diff(positions) == 1):
            view, nbytes = out.reshape(-1).view(np.uint8).data, stored.nbytes
            for row, (file, first) in enumerate(self._located(positions)):
                piece = view[row * nbytes : (row + 1) * nbytes]
                file.fill((file.stored[name].offset or 0) + first * nbytes, piece)
            return out
        ascending, inverse = np.unique(positions, return_inverse=True)
        for file, start, first, count in self._pieces(ascending):
            file.read(name, first, out[start : start + count])
        same = len(ascending) == len(positions) and np.array_equal(ascending, positions)
        return out if same else out[inverse]

    def enter(self, window: np.ndarray, names: Sequence[str]) -> None:
        """Get a window of networks ready, and let go of the one before.

        Args:
            window: positions, ascending, shape (network,).
            names: the variables that will be taken.
        """
        self._held, self._window = {}, _NOTHING
        for name in names:
            if self.stored[name].direct:
                for file, _, first, count in self._pieces(window):
                    file.announce(name, first, count)
            else:
                self._held[name] = self.take(name, window)
        self._window = window

    def entered(self, positions: np.ndarray) -> bool:
        """Whether all of these networks are in the window."""
        places = np.minimum(np.searchsorted(self._window, positions), len(self._window) - 1)
        return len(self._window) > 0 and np.array_equal(self._window[places], positions)

    def close(self) -> None:
        """Close all files; the next read opens what it needs."""
        while self._open:
            self._open.pop().close()

    def _located(self, positions: np.ndarray) -> Iterator[tuple[_File, int]]:
        """Yield the file of each position, allowed to be open, and the network's place in it."""
        owners = np.searchsorted(self._starts, positions, side="right") - 1
        for owner, first in zip(owners.tolist(), (positions - self._starts[owners]).tolist(), strict=True):
            file = self._files[owner]
            if file not in self._open:
                if len(self._open) == MOST_OPEN:
                    self._open.pop(0).close()
                self._open.append(file)
            yield file, first

    def _pieces(self, ascending: np.ndarray) -> Iterator[tuple[_File, int, int, int]]:
        """Yield each contiguous piece: its file, place among the positions, first network in the file, and length."""
        owners = np.searchsorted(self._starts, ascending, side="right") - 1
        breaks = np.flatnonzero((np.diff(ascending) != 1) | (np.diff(owners) != 0)) + 1
        starts = np.array([0, *breaks.tolist()])
        lengths = np.diff([*starts.tolist(), len(ascending)])
        located = self._located(ascending[starts])
        for (file, first), start, length in zip(located, starts.tolist(), lengths.tolist(), strict=True):
            yield file, start, first, length

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_window": _NOTHING, "_held": {}, "_open": []}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__ |= state
        _ALL.add(self)


def _layout(shard: Shard) -> dict[str, Stored]:
    """How the numeric variables of a file over networks are stored."""
    import h5py

    found = {}
    with h5py.File(shard.path, "r") as file:
        scale = file["network"]
        for name, variable in file.items():
            if not isinstance(variable, h5py.Dataset) or variable.ndim == 0 or variable.dtype.kind not in "iufb":
                continue
            # netCDF-4 attaches its dimensions as scales; the coordinate is itself one
            if variable != scale and (len(variable.dims[0]) == 0 or variable.dims[0][0] != scale):
                continue
            native = variable.dtype.newbyteorder("=")
            contiguous = variable.chunks is None and not variable.external and variable.dtype == native
            offset = variable.id.get_offset() if contiguous else None
            found[str(name)] = Stored(tuple(variable.shape[1:]), native, offset)
    return found


_ALL: weakref.WeakSet[CubeFiles] = weakref.WeakSet()


def _close_all() -> None:
    for files in list(_ALL):
        files.close()


if hasattr(os, "register_at_fork"):  # Windows does not fork
    os.register_at_fork(before=_close_all)
