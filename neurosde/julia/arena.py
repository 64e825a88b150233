"""Memory that this process and the Julia worker both map.

One anonymous file (memfd, or an unlinked temporary file where there is none) as large as the machine's memory, mapped
once on either side: pages take memory when they are first touched, and /dev/shm with its limits plays no part. Blocks
are handed out lowest address first, so that memory touched once is used again: fresh pages cost more than the
arithmetic. A tensor made on a block is an ordinary torch tensor; when its last view dies, the block is free again.

A forked child reads these pages too, and writes to copies of its own. Blocks alive at a fork are therefore not used
again before the child has ended: the child holds a pipe, whose end tells.
"""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import math
import mmap
import os
import select
import sys
import tempfile
import threading
import weakref
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

PAGE = mmap.PAGESIZE
CONTROL = 4096  # bytes at the start: the stop flag and the worker's last message
GUARD = 4096  # bytes at the end that vectors may read into
LEAST = 1 << 28  # bytes of address space that are worth having
IDLE_LIMIT = 1 << 30  # bytes of touched, unused memory that are kept for the next call


class Arena:
    """Shared memory and its allocator; for one thread at a time, but tensors may die and forks happen in any.

    Args:
        size: bytes of address space; None takes the machine's memory, or what limits (ulimit -v) leave of it.

    Raises:
        OSError: the memory cannot be mapped.
    """

    def __init__(self, size: int | None = None) -> None:
        self.fd = anonymous_file()
        self._map, self.size = _mapped(self.fd, size)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self.bytes = torch.frombuffer(self._map, dtype=torch.uint8)
        self._free = _Ranges(CONTROL, self.size - CONTROL - GUARD)
        self._absent = _Ranges(CONTROL, self.size - CONTROL - GUARD)  # free, and no memory behind it
        self._live: dict[int, int] = {}  # offset -> bytes
        self._idle = 0  # free bytes with memory behind them
        self._dead: deque[_Reference] = deque()  # to blocks whose tensors have died
        self._references: dict[int, _Reference] = {}
        self._children: list[tuple[int | None, frozenset[int]]] = []  # pipe, blocks that the child may still read
        self._held: set[int] = set()  # blocks that died while a child could read them
        self._lock = threading.RLock()  # a fork finds everything in order
        self.stop = ctypes.c_int64.from_buffer(self._map, 0)

    def allocate(self, size: int) -> int:
        """Return the offset of a free block of `size` bytes, aligned to 64 bytes (to pages, if it is large).

        Raises:
            MemoryError: no such block is free, or the machine has no memory left for it.
        """
        size = _rounded(size)
        with self._lock:
            self.collect()
            start = self._free.fit(size)
            if start is None:
                raise MemoryError(_too_large(size, self.size))
            fresh = self._absent.overlap(start, size)
            if fresh > IDLE_LIMIT // 16 and fresh > available_memory():
                raise MemoryError(_too_large(fresh, available_memory()))
            self._free.remove(start, size)
            if fresh:
                self._absent.remove(start, size)
            self._idle -= size - fresh
            self._live[start] = size
        return start

    def free(self, offset: int) -> None:
        """Give a block back."""
        with self._lock:
            if any(offset in blocks for _, blocks in self._children):
                self._held.add(offset)
                return
            size = self._live.pop(offset)
            self._free.add(offset, size)
            self._idle += size
            if self._idle > IDLE_LIMIT:
                self._forget(offset, size)

    def tensor(self, offset: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return a tensor on a block, which is free again when the tensor and all its views are gone."""
        count = math.prod(shape)
        buffer = (ctypes.c_char * (count * dtype.itemsize)).from_buffer(self._map, offset)
        # No Python code in the callback: Ctrl-C, which Python's interpreter looks for, would be lost in it.
        reference = _Reference(buffer, self._dead.append)
        reference.offset = offset
        self._references[offset] = reference
        return torch.frombuffer(buffer, dtype=dtype, count=count).view(*shape)

    def view(self, offset: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return a tensor on memory whose life is the caller's care."""
        count = math.prod(shape)
        return self.bytes[offset : offset + count * dtype.itemsize].view(dtype).view(*shape)

    def offset_of(self, tensor: Tensor) -> int | None:
        """Return where a tensor lies in this memory, or None."""
        offset = tensor.data_ptr() - self.address
        return offset if CONTROL <= offset < self.size else None

    def collect(self) -> None:
        """Take back the blocks of tensors that have died, and those that no child can read any more."""
        if not self._dead and not self._children:
            return
        with self._lock:
            while self._dead:
                offset = self._dead.popleft().offset
                del self._references[offset]
                self.free(offset)
            ended = [pipe for pipe, _ in self._children if pipe is not None and _hung_up(pipe)]
            if ended:
                self._children = [(pipe, blocks) for pipe, blocks in self._children if pipe not in ended]
                for pipe in ended:
                    os.close(pipe)
                held, self._held = self._held, set()
                for offset in held:
                    self.free(offset)

    def before_fork(self) -> tuple[int, int] | None:
        """Prepare for a child: a pipe that tells when it has ended, if there is anything that it could read."""
        self._lock.acquire()
        self.collect()
        if not self._readable():
            return None
        try:
            return os.pipe()
        except OSError:  # too many files: nobody will tell, so what the child can read is never used again
            self._children.append((None, self._readable()))
            return None

    def after_fork_in_parent(self, pipe: tuple[int, int] | None) -> None:
        """Keep the blocks alive for the child."""
        if pipe is not None:
            os.close(pipe[1])
            self._children.append((pipe[0], self._readable()))
        self._lock.release()

    def after_fork_in_child(self) -> None:
        """Have the child write to its own copies of pages from now on, as with any other memory."""
        if _mmap is not None:
            protection, flags = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | _MAP_FIXED | _MAP_NORESERVE
            _mmap(self.address, self.size, protection, flags, self.fd, 0)

    @property
    def live_bytes(self) -> int:
        """Bytes in blocks that are in use."""
        self.collect()
        return sum(self._live.values())

    def _readable(self) -> frozenset[int]:
        """Blocks on which there are tensors, or will be when a running call returns."""
        return frozenset(self._live) - self._held

    def _forget(self, offset: int, size: int) -> None:
        """Return what a free block has too much, of its end, to the system."""
        end = (offset + size) // PAGE * PAGE
        first = max(-(-offset // PAGE) * PAGE, (offset + size - (self._idle - IDLE_LIMIT)) // PAGE * PAGE)
        if first < end and hasattr(mmap, "MADV_REMOVE"):
            with contextlib.suppress(OSError):
                self._map.madvise(mmap.MADV_REMOVE, first, end - first)
                self._absent.add(first, end - first)
                self._idle -= end - first


class _Reference(weakref.ref):
    """A weak reference to the buffer under a tensor."""

    offset: int


class _Ranges:
    """Disjoint ranges of addresses, in order; those that touch are one."""

    def __init__(self, start: int, length: int) -> None:
        self.starts = [start]
        self.ends = [start + length]

    def fit(self, size: int) -> int | None:
        """Return the lowest address with `size` bytes, or None."""
        for start, end in zip(self.starts, self.ends, strict=True):
            if end - start >= size:
                return start
        return None

    def overlap(self, start: int, size: int) -> int:
        """Return how many bytes of a range are in here."""
        i, end, total = bisect.bisect_right(self.ends, start), start + size, 0
        while i < len(self.starts) and self.starts[i] < end:
            total += min(end, self.ends[i]) - max(start, self.starts[i])
            i += 1
        return total

    def add(self, start: int, size: int) -> None:
        """Add a range of which nothing is in here."""
        end, i = start + size, bisect.bisect_left(self.starts, start)
        if i < len(self.starts) and self.starts[i] == end:
            end = self.ends.pop(i)
            del self.starts[i]
        if i > 0 and self.ends[i - 1] == start:
            self.ends[i - 1] = end
        else:
            self.starts.insert(i, start)
            self.ends.insert(i, end)

    def remove(self, start: int, size: int) -> None:
        """Remove a range, whatever of it is in here."""
        first, end = bisect.bisect_right(self.ends, start), start + size
        last = bisect.bisect_left(self.starts, end)
        if first == last:
            return
        left, right = (self.starts[first], start), (end, self.ends[last - 1])
        kept = [(low, high) for low, high in (left, right) if low < high]
        self.starts[first:last] = [low for low, _ in kept]
        self.ends[first:last] = [high for _, high in kept]


def physical_memory() -> int:
    """Bytes of memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def available_memory(root: Path = Path("/")) -> int:
    """Bytes that the system, and the container that this may be, say they can still give (Linux), or all there are.

    Args:
        root: where /proc and /sys are.
    """
    left = [physical_memory()]
    with contextlib.suppress(OSError, KeyError):
        left.append(1024 * _fields(root / "proc/meminfo")["MemAvailable:"])
    group = root / "sys/fs/cgroup"
    with contextlib.suppress(OSError, KeyError, ValueError):  # no container, or one without a limit ("max")
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        left.append(limit - used + _fields(group / "memory.stat")["inactive_file"])  # that cache gives way
    return max(0, min(left))


def _fields(path: Path) -> dict[str, int]:
    return {name: int(value) for name, value, *_ in map(str.split, path.read_text().splitlines())}


def anonymous_file() -> int:
    """Return the descriptor of a file without a name, which is gone when nobody has it open."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("neurosde", os.MFD_CLOEXEC)
    descriptor, path = tempfile.mkstemp(prefix="neurosde-")
    os.unlink(path)
    return descriptor


def _mapped(descriptor: int, size: int | None) -> tuple[mmap.mmap, int]:
    """Map a file, as large as the machine's memory unless its size is given; smaller where limits ask for it."""
    length = (physical_memory() if size is None else size) // PAGE * PAGE
    while True:
        try:
            os.ftruncate(descriptor, length)
            return mmap.mmap(descriptor, length), length
        except (OSError, ValueError):
            if size is not None or length < LEAST:
                raise
            length = length // 2 // PAGE * PAGE


def _hung_up(pipe: int) -> bool:
    ready = select.poll()
    ready.register(pipe, 0)
    return bool(ready.poll(0))


def _rounded(size: int) -> int:
    unit = PAGE if size >= 16 * PAGE else 64
    return max(unit, -(-size // unit) * unit)


def _too_large(size: int, there: int) -> str:
    return (
        f"the simulation needs {size / 1e9:.3g} GB more of memory, and {there / 1e9:.3g} GB are there; simulate fewer "
        "networks, trials or steps at a time."
    )


# For `after_fork_in_child`: Python's own mmap cannot map to an address that is in use.
_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000 if sys.platform.startswith("linux") else 0x40
_mmap = None
if os.name == "posix":
    _mmap = ctypes.CDLL(None).mmap
    _mmap.restype = ctypes.c_void_p
    _mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_int64]
