"""`neurosde benchmark sampling`: what drawing weights from a trained prior costs, against their size."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
import xarray as xr
from tqdm import tqdm

from neurosde.evaluation.resident import peak, reset_peak
from neurosde.evaluation.timing import hardware, seconds_per_call
from neurosde.models.diffusion_prior import STEPS, DiffusionPrior, default_steps, load_prior
from neurosde.options import OptionParser, add_options, from_options
from neurosde.provenance import global_attributes, whole_file
from neurosde.validation import check_count


@dataclass(frozen=True)
class SamplingBenchmark:
    """What to draw, and how often."""

    sizes: tuple[int, ...] = field(default=(10, 20, 50, 100, 200), metadata={"help": "neurons", "flags": ("--N",)})
    num: int = field(default=100, metadata={"help": "matrices per draw"})
    steps: int | None = field(default=None, metadata={"help": f"noise levels (default {STEPS}, more of many neurons)"})
    repeats: int = field(default=3, metadata={"help": "timed draws, after one that is not"})
    seed: int = field(default=0, metadata={"help": "seed"})

    def __post_init__(self) -> None:
        for N in self.sizes:
            check_count(N, "N", 2)
        for name in ("num", "repeats"):
            check_count(getattr(self, name), name)
        if self.steps is not None:
            check_count(self.steps, "steps", 2)
        check_count(self.seed, "seed", 0)


def sampling_benchmark(prior: DiffusionPrior, config: SamplingBenchmark, checkpoint: str = "") -> xr.Dataset:
    """Time draws.

    Returns:
        `seconds` (neurons, repeat) of a draw of `num` matrices, and `memory` (neurons), what it took at its peak beside
        the network, in bytes: of the GPU, or of this process.
    """
    c = config
    on_gpu = prior.device.type == "cuda"
    seconds = np.empty((len(c.sizes), c.repeats))
    memory = np.empty(len(c.sizes))

    def draw(N: int) -> None:
        prior.sample(c.num, N, steps=c.steps, generator=c.seed)
        if on_gpu:
            torch.cuda.synchronize()

    for i, N in enumerate(tqdm(c.sizes, unit="size", disable=None)):
        before = reset_peak()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        draw(N)
        memory[i] = (torch.cuda.max_memory_allocated() if on_gpu else peak()) - before
        for k in range(c.repeats):
            seconds[i, k] = seconds_per_call(partial(draw, N))
    attributes = global_attributes(
        "Cost of drawing from a prior", f"{checkpoint}. {hardware(device=prior.device)}", c, c.seed
    )
    return xr.Dataset(
        {
            "seconds": (("neurons", "repeat"), seconds, {"long_name": "time of a draw", "units": "s"}),
            "memory": ("neurons", memory, {"long_name": "memory of a draw", "units": "byte"}),
        },
        coords={"neurons": list(c.sizes)},
        attrs=attributes,
    )


def markdown_table(results: xr.Dataset, num: int) -> str:
    """A row per number of neurons."""
    lines = [f"| N | {num} matrices | spread | per matrix | memory |", "|---|---|---|---|---|"]
    for N in results["neurons"].values:
        seconds = results["seconds"].sel(neurons=N).values
        median = float(np.median(seconds))
        lines.append(
            f"| {N} | {median:.2f} s | {seconds.min():.2f}–{seconds.max():.2f} s | {1e3 * median / num:.1f} ms | "
            f"{float(results['memory'].sel(neurons=N)) / 1e6:.0f} MB |"
        )
    return "\n".join(lines)


def add_arguments(parser: OptionParser) -> None:
    """Add the options of `neurosde benchmark sampling`."""
    parser.add_argument("checkpoint", help="a trained prior: file, folder, or the name of one that comes along")
    add_options(parser, SamplingBenchmark)
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    parser.add_argument(
        "--out", type=Path, default=Path("results/sampling.nc"), help="data (default results/sampling.nc)"
    )
    parser.set_defaults(run=run)


def run(options: Namespace) -> int:
    """Run the benchmark, print its table, write its data."""
    config = from_options(SamplingBenchmark, options)
    prior = load_prior(options.checkpoint, options.device)
    results = sampling_benchmark(prior, config, options.checkpoint)
    with whole_file(options.out) as temporary:
        results.to_netcdf(temporary, engine="netcdf4")
    print(markdown_table(results, config.num))
    where = hardware(device=prior.device)
    levels = ", ".join(str(config.steps or default_steps(N)) for N in config.sizes)
    print(f"\n{levels} noise levels, median of {config.repeats}; {where}\nData: {options.out}")
    return 0
