"""Shared memory and its allocator, without a worker."""

import os
import random
import sys

import pytest
import torch

from neurosde.julia import arena
from neurosde.julia.arena import PAGE, Arena

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks at the blocks of a memfd")


def test_the_death_of_a_tensor_does_not_swallow_ctrl_c():
    """An exception in a callback goes nowhere, and Ctrl-C is one as soon as Python code runs."""
    memory = Arena(1 << 20)
    offset = memory.allocate(64)
    x = memory.tensor(offset, (8,), torch.float64)
    assert type(memory._references[offset].__callback__) is type([].append)
    del x
    assert memory.live_bytes == 0


def test_idle_memory_is_bounded_however_often(monkeypatch):
    monkeypatch.setattr(arena, "IDLE_LIMIT", 1 << 20)
    memory = Arena(1 << 26)

    def resident():
        return os.fstat(memory.fd).st_blocks * 512

    for size in (1 << 22, 3 << 20, 1 << 22, 1 << 19, 5 << 22, 1 << 22):
        blocks = [memory.allocate(size) for _ in range(2)]
        for block in blocks:
            memory.view(block, (size,), torch.uint8).fill_(1)
        assert resident() >= 2 * size
        for block in blocks:
            memory.free(block)
        assert resident() <= (1 << 20) + 4 * PAGE
        assert memory.live_bytes == 0


def test_blocks_do_not_overlap_and_all_comes_back():
    memory, choose = Arena(1 << 21), random.Random(0)
    blocks: dict[int, int] = {}
    failures = 0
    for _ in range(5000):
        if blocks and choose.random() < 0.4:
            offset = choose.choice(list(blocks))
            mark = blocks.pop(offset)
            assert bool((memory.view(offset, (mark % 100_000,), torch.uint8) == mark % 251).all())
            memory.free(offset)
            continue
        size = int(10 ** choose.uniform(0, 4.9))
        mark = choose.randrange(10**6) * 100_000 + size
        try:
            offset = memory.allocate(size)
        except MemoryError:
            failures += 1
            continue
        assert offset % 64 == 0 and offset >= arena.CONTROL and offset + size <= memory.size - arena.GUARD
        memory.view(offset, (size,), torch.uint8).fill_(mark % 251)
        blocks[offset] = mark
    assert failures  # it has been full
    for offset in blocks:
        memory.free(offset)
    assert memory.live_bytes == 0
    memory.allocate(memory.size - arena.CONTROL - arena.GUARD)


def test_forks_without_a_pipe_cost_memory_and_nothing_else(monkeypatch):
    """With too many files open nobody tells when a child has ended: its blocks are not used again."""

    def no_pipe():
        raise OSError(24, "Too many open files")

    memory = Arena(1 << 20)
    kept = memory.allocate(PAGE)
    monkeypatch.setattr(os, "pipe", no_pipe)
    memory.after_fork_in_parent(memory.before_fork())
    memory.free(kept)
    other = memory.allocate(PAGE)
    assert other != kept and memory.live_bytes == 2 * PAGE
    memory.free(other)
    assert memory.allocate(PAGE) == other


@pytest.mark.parametrize(
    ("limit", "used", "expected"), [("max", 5000, 3072), ("9000", 7000, 2500), ("9000", 12_000, 0), (None, 0, 3072)]
)
def test_what_is_available_minds_containers(tmp_path, limit, used, expected):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal:  9 kB\nMemAvailable:  3 kB\nHugePages_Total:  0\n")
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    if limit is not None:
        (group / "memory.max").write_text(f"{limit}\n")
        (group / "memory.current").write_text(f"{used}\n")
        (group / "memory.stat").write_text("anon 4000\ninactive_file 500\n")
    assert arena.available_memory(tmp_path) == expected
