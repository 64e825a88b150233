"""`neurosde benchmark loader --cube`: stream a cube of any size once, and see whether memory stays where it is."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import xarray as xr
from tqdm import tqdm

from neurosde.datasets.loaders import loader
from neurosde.evaluation.resident import peak, reset_peak

STEPS = 10  # at which memory is looked at


def stream_cube(path: Path, variables: tuple[str, ...], batch_size: int, memory: int, seed: int) -> xr.Dataset:
    """Read every network of a cube once, shuffled.

    Args:
        path: the cube: one file, or a folder of shards.
        variables: what to read.
        batch_size: networks per batch.
        memory: bytes that the loader may use; less than the cube has.
        seed: seed of the order.

    Returns:
        read (step), bytes that were given up to then; seconds (step) since the first batch was asked for; memory
        (step): the largest resident set up to then, in bytes. Attribute `before` is the set before the loader was made,
        `networks` their number.

    Raises:
        ValueError: the cube fits in the memory, or is not whole.
    """
    before = reset_peak()
    batches = loader(path, variables, batch_size=batch_size, shuffle=True, seed=seed, memory=memory)
    if batches.cube.in_memory:
        raise ValueError(
            f"{path} must be larger than the {memory} bytes that streaming may take; it fits. Leave --cube out, or "
            "give a larger cube."
        )
    marks = set(np.linspace(0, len(batches), STEPS + 1).round().astype(int)[1:].tolist())
    found, read, networks = [], 0, 0
    start = time.perf_counter()
    for k, batch in enumerate(tqdm(batches, unit="batch", disable=None), 1):
        networks += len(batch[variables[0]])
        read += sum(values.nbytes for values in batch.values())
        if k in marks:
            found.append((read, time.perf_counter() - start, peak()))
    given, seconds, memories = np.array(found).T
    return xr.Dataset(
        {
            "read": ("step", given, {"long_name": "bytes given up to this step", "units": "byte"}),
            "seconds": ("step", seconds, {"long_name": "time since the start", "units": "s"}),
            "memory": ("step", memories, {"long_name": "largest resident set up to this step", "units": "byte"}),
        },
        attrs={"before": before, "networks": networks},
    )


def summary(results: xr.Dataset) -> str:
    """Say in words how fast it went and what it took."""
    read, seconds = float(results["read"][-1]), float(results["seconds"][-1])
    first, last = (float(results["memory"][k]) / 1e6 for k in (0, -1))
    networks, share = int(results.attrs["networks"]), float(results["read"][0]) / read
    return (
        f"{networks} networks, {read / 1e9:.2f} GB, in {seconds:.1f} s: {networks / seconds:.0f} networks/s, "
        f"{read / 1e9 / seconds:.2f} GB/s.\n"
        f"Largest resident set: {results.attrs['before'] / 1e6:.0f} MB before the loader was made, {first:.0f} MB when "
        f"{share:.0%} were read, {last:.0f} MB in the end."
    )
