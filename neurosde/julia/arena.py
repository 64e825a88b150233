"""Memory that this process and the Julia worker both map.

One anonymous file (memfd, or an unlinked temporary file where there is none) as large as the machine's memory, mapped
once on either side: pages take memory when they are first touched, and /dev/shm with its limits plays no part. Blocks
are handed out lowest address first, so that memory touched once is used again: fresh pages cost more than the
arithmetic. A tensor made on a block is an ordinary torch tensor; when its last view dies, the block is free again.

A forked child shares these pages. Blocks alive at a fork are therefore not used again before the child has ended:
the child holds a pipe, whose end tells.
"""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import mmap
import os
import select
import tempfile
import weakref
from collections import deque
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

PAGE = mmap.PAGESIZE
CONTROL = 4096  # bytes at the start: the stop flag and the worker's last message
GUARD = 4096  # bytes at the end that vectors may read into
IDLE_LIMIT = 1 << 30  # bytes of touched, unused memory that are kept for the next call


class Arena:
    """Shared memory and its allocator; not thread-safe by itself, except that tensors may die anywhere.

    Args:
        size: bytes of address space; None takes the machine's memory.

    Raises:
        OSError: the memory cannot be mapped.
    """

    def __init__(self, size: int | None = None) -> None:
        self.size = (physical_memory() if size is None else size) // PAGE * PAGE
        self.fd = _anonymous_file()
        os.ftruncate(self.fd, self.size)
        self._map = mmap.mmap(self.fd, self.size)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self.bytes = torch.frombuffer(self._map, dtype=torch.uint8)
        self._starts = [CONTROL]  # free ranges, by address: starts and lengths
        self._lengths = [self.size - CONTROL - GUARD]
        self._live: dict[int, int] = {}  # offset -> bytes
        self._touched = CONTROL  # addresses below have been used
        self._idle = 0  # free bytes below
        self._dead: deque[int] = deque()  # blocks whose tensors have died
        self._references: dict[int, weakref.ref] = {}
        self._children: list[tuple[int, frozenset[int]]] = []  # pipe, blocks that the child may still read
        self._held: set[int] = set()  # blocks that died while a child could read them
        self.stop = ctypes.c_int64.from_buffer(self._map, 0)

    def allocate(self, size: int) -> int:
        """Return the offset of a free block of `size` bytes, aligned to 64 bytes (to pages, if it is large).

        Raises:
            MemoryError: no such block is free, or the machine has no memory left for it.
        """
        self.collect()
        size = _rounded(size)
        for i, length in enumerate(self._lengths):
            if length >= size:
                break
        else:
            raise MemoryError(_too_large(size, self.size))
        start = self._starts[i]
        fresh = max(0, start + size - self._touched)
        if fresh > IDLE_LIMIT // 16 and fresh > available_memory():
            raise MemoryError(_too_large(fresh, available_memory()))
        if length == size:
            del self._starts[i], self._lengths[i]
        else:
            self._starts[i], self._lengths[i] = start + size, length - size
        self._idle -= size - fresh
        self._touched = max(self._touched, start + size)
        self._live[start] = size
        return start

    def free(self, offset: int) -> None:
        """Give a block back."""
        if any(offset in blocks for _, blocks in self._children):
            self._held.add(offset)
            return
        size = self._live.pop(offset)
        self._idle += size
        if self._idle > IDLE_LIMIT:
            self._forget(offset, size)
        i = bisect.bisect(self._starts, offset)
        self._starts.insert(i, offset)
        self._lengths.insert(i, size)
        if i + 1 < len(self._starts) and offset + size == self._starts[i + 1]:
            self._lengths[i] += self._lengths.pop(i + 1)
            del self._starts[i + 1]
        if i > 0 and self._starts[i - 1] + self._lengths[i - 1] == offset:
            self._lengths[i - 1] += self._lengths.pop(i)
            del self._starts[i]

    def tensor(self, offset: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return a tensor on a block, which is free again when the tensor and all its views are gone."""
        count = 1
        for length in shape:
            count *= length
        buffer = (ctypes.c_char * (count * dtype.itemsize)).from_buffer(self._map, offset)
        self._references[offset] = weakref.ref(buffer, partial(_bury, self._dead, offset))
        return torch.frombuffer(buffer, dtype=dtype, count=count).view(*shape)

    def view(self, offset: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return a tensor on memory whose life is the caller's care."""
        count = 1
        for length in shape:
            count *= length
        return self.bytes[offset : offset + count * dtype.itemsize].view(dtype).view(*shape)

    def offset_of(self, tensor: Tensor) -> int | None:
        """Return where a tensor lies in this memory, or None."""
        offset = tensor.data_ptr() - self.address
        return offset if CONTROL <= offset < self.size else None

    def collect(self) -> None:
        """Take back the blocks of tensors that have died, and those that no child can read any more."""
        while self._dead:
            offset = self._dead.popleft()
            del self._references[offset]
            self.free(offset)
        if self._children:
            ended = [pipe for pipe, _ in self._children if _hung_up(pipe)]
            for pipe in ended:
                os.close(pipe)
            self._children = [(pipe, blocks) for pipe, blocks in self._children if pipe not in ended]
            held, self._held = self._held, set()
            for offset in held:
                self.free(offset)

    def before_fork(self) -> tuple[int, int] | None:
        """Prepare for a child: a pipe that tells when it has ended, if there is anything that it could read."""
        return os.pipe() if self._live else None

    def after_fork_in_parent(self, pipe: tuple[int, int] | None) -> None:
        """Keep the blocks alive for the child."""
        if pipe is not None:
            os.close(pipe[1])
            self._children.append((pipe[0], frozenset(self._live)))

    @property
    def live_bytes(self) -> int:
        """Bytes in blocks that are in use."""
        self.collect()
        return sum(self._live.values())

    def _forget(self, offset: int, size: int) -> None:
        """Return a block's pages to the system."""
        first = -(-offset // PAGE) * PAGE
        length = (offset + size) // PAGE * PAGE - first
        if length > 0 and hasattr(mmap, "MADV_REMOVE"):
            with contextlib.suppress(OSError):
                self._map.madvise(mmap.MADV_REMOVE, first, length)
                self._idle -= length


def physical_memory() -> int:
    """Bytes of memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def available_memory() -> int:
    """Bytes that the system says it can still give (Linux), or all there are."""
    try:
        with open("/proc/meminfo") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return physical_memory()


def _anonymous_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("neurosde", os.MFD_CLOEXEC)
    descriptor, path = tempfile.mkstemp(prefix="neurosde-")
    os.unlink(path)
    return descriptor


def _bury(dead: deque[int], offset: int, _: object) -> None:
    dead.append(offset)


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
