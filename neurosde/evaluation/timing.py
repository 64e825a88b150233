"""Timing of calls, and what they were timed on: shared by the benchmarks of speed."""

from __future__ import annotations

import gc
import math
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from typing import Any

import torch

from neurosde.julia.doctor import cpu_name
from neurosde.julia.locate import JuliaNotFoundError, dotted, find_julia

LIBRARIES = ("torch", "torchsde", "torchdiffeq", "jax", "jaxlib", "diffrax", "numba", "numpy")


def seconds_per_call(call: Callable[[], Any], calls: int = 1) -> float:
    """Mean seconds of some calls; garbage is collected before, the last output freed after."""
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        for _ in range(calls - 1):
            call()
        kept = call()
        seconds = (time.perf_counter() - start) / calls
    finally:
        gc.enable()
    del kept
    return seconds


def measured_peak(size: int, repeats: int = 5) -> float:
    """Return the best rate of a square float32 matrix product, in GFLOP/s."""
    a, b = torch.randn(2, size, size)
    out = torch.empty(size, size)
    seconds = [seconds_per_call(lambda: torch.mm(a, b, out=out)) for _ in range(repeats + 1)]
    return 2e-9 * size**3 / min(seconds[1:])


@contextmanager
def torch_threads(threads: int | None) -> Iterator[None]:
    """Give torch that many threads, None as many as it has."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    gc.collect()
    gc.freeze()  # what is there already need not be gone through before every measurement
    try:
        yield
    finally:
        gc.unfreeze()
        torch.set_num_threads(before)


def machine() -> dict[str, Any]:
    """Processor, threads and versions, as attributes of a netCDF file."""
    found: dict[str, Any] = {
        "cpu_model": f"{cpu_name()} ({torch.backends.cpu.get_cpu_capability()})",
        "cpu_count": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else math.nan,  # before the run
        "python_version": platform.python_version(),
    }
    for library in LIBRARIES:
        try:
            found[f"{library}_version"] = metadata.version(library)
        except metadata.PackageNotFoundError:
            found[f"{library}_version"] = "not installed"
    try:
        found["julia_version"] = dotted(find_julia().version)
    except JuliaNotFoundError:
        found["julia_version"] = "not installed"
    return found


def hardware(attributes: dict[str, Any] | None = None, device: torch.device | None = None) -> str:
    """Say in a line what `machine` found, by default on this machine now; and the GPU, where one did the work."""
    a = attributes or machine()
    gpu = f"{torch.cuda.get_device_name(device)}, " if device is not None and device.type == "cuda" else ""
    versions = (f"{name} {a[f'{name}_version']}" for name in ("python", *LIBRARIES, "julia"))
    there = [version for version in versions if not version.endswith("not installed")]
    return f"{gpu}{a['cpu_model']}, {a['threads']} threads, {', '.join(there)}"
