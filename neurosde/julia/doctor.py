"""`neurosde doctor`: what neurosde runs on, which Julia it uses, and whether it computes what torch computes."""

from __future__ import annotations

import os
import platform
import time
from argparse import Namespace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from neurosde._version import __version__
from neurosde.brownian import BrownianPath
from neurosde.julia.locate import Julia, JuliaNotFoundError, UnusableJuliaError, dotted, find_julia
from neurosde.options import OptionParser
from neurosde.solve import simulate_rate_network

LIBRARIES = ("torch", "torchsde", "torchdiffeq", "xarray", "netCDF4")
TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-12}  # largest difference over largest rate


def add_arguments(parser: OptionParser) -> None:
    """Add the options of `neurosde doctor`: none."""


def run(options: Namespace) -> int:
    """Print what there is; returns 1 if there is a Julia that does not work, else 0."""
    print(f"neurosde: {__version__}")
    print(f"Python: {platform.python_version()} ({platform.platform()})")
    for library in LIBRARIES:
        print(f"{library}: {_version(library)}")
    print(f"CPU: {cpu_name()}, {os.cpu_count()} logical cores; torch uses {torch.get_num_threads()} threads")
    print(f"CUDA: {torch.cuda.get_device_name() if torch.cuda.is_available() else 'none'}")
    try:
        julia = find_julia()
    except UnusableJuliaError as error:
        print(f"julia: {error}")
        return 1
    except JuliaNotFoundError:
        print("julia: not found, torch is used; neurosde install-julia gets one")
        return 0
    return _examine(julia)


def cpu_name() -> str:
    """Return what the processor calls itself."""
    try:
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def deviation(dtype: torch.dtype) -> float:
    """Return the largest difference between the rates of the two engines, relative to the largest rate.

    A chaotic network of 37 neurons × 5 trials, 50 times, both engines on the same Brownian path: neither number is a
    multiple of a vector's width.
    """
    N, K, T, dt = 37, 5, 50, 0.1
    generator = torch.Generator().manual_seed(0)
    W = 1.5 / N**0.5 * torch.randn(N, N, generator=generator, dtype=dtype)
    h0 = torch.randn(K, N, generator=generator, dtype=dtype)
    path = BrownianPath.sample((K, N), T - 1, dt, generator=generator, dtype=dtype)
    reference = simulate_rate_network(W, h0, T, dt, 1.0, noise_std=0.3, engine="torch", bm=path)
    found = simulate_rate_network(W, h0, T, dt, 1.0, noise_std=0.3, engine="julia", bm=path)
    return float((found - reference).abs().max() / reference.abs().max())


def _examine(julia: Julia) -> int:
    print(f"julia: {dotted(julia.version)}, {julia.executable} (from {julia.source})")
    try:
        from neurosde.julia.worker import describe

        started = time.perf_counter()
        worker = describe()
        seconds = time.perf_counter() - started
        print(
            f"julia worker: Julia {worker['version']}, {worker['threads']} threads, CPU target {worker['cpu']}, LLVM "
            f"{worker['llvm']}, vectors of {worker['lanes_bits']} bits; started in {seconds:.2f} s"
        )
        good = True
        for dtype, tolerance in TOLERANCES.items():
            error = deviation(dtype)
            good &= error <= tolerance  # not for NaN
            verdict = "good" if error <= tolerance else "BAD"
            print(f"julia self-test: {dtype} differs from torch by {error:.1e} (at most {tolerance:.0e}): {verdict}")
    except Exception as error:  # whatever it is, saying it is this command's work
        print(f"julia self-test: failed, {type(error).__name__}: {' '.join(str(error).split())}")
        return 1
    return 0 if good else 1


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return "not installed"
