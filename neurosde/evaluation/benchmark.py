"""`neurosde benchmark recovery`: how well W is recovered where the exact posterior is known.

For each number of neurons and recording length, networks are drawn from the iid Gaussian prior, simulated for one trial
each, and estimated by every method. The exact posterior is told gain and noise; empirical Bayes and ridge have to find
them. Errors are means over networks of |Ŵ − W|/|W|.
"""

from __future__ import annotations

import math
from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from tqdm import tqdm

from neurosde.brownian import as_generator
from neurosde.evaluation import (
    denoising_benchmark,
    engine_calibration,
    exact_benchmark,
    inference_benchmark,
    loader_benchmark,
    posterior_benchmark,
    refined_calibration,
    refinement_benchmark,
    sampling_benchmark,
    sbibm_benchmark,
    simulation_benchmark,
)
from neurosde.evaluation.engine_calibration import EngineCalibration
from neurosde.evaluation.loader_benchmark import LoaderBenchmark
from neurosde.evaluation.recovery import recovery
from neurosde.evaluation.simulation_tasks import SimulationBenchmark
from neurosde.evaluation.timing import hardware
from neurosde.likelihood import transition_statistics
from neurosde.models.empirical_bayes import empirical_bayes, least_squares, ridge
from neurosde.models.gaussian_posterior import GaussianPosterior
from neurosde.options import OptionParser, add_options, from_options
from neurosde.provenance import global_attributes, whole_file
from neurosde.solve import simulate_rate_network
from neurosde.validation import check_count, check_positive, check_time_step

COLUMNS = {
    "least_squares": "least squares",
    "ridge": "ridge (cross-validation)",
    "empirical_bayes": "exact posterior, gain and noise estimated",
    "exact": "exact posterior",
    "coverage_90": "its 90 % coverage",
    "contraction": "its contraction",
}


@dataclass(frozen=True)
class RecoveryBenchmark:
    """What to draw and how often."""

    sizes: tuple[int, ...] = field(default=(5, 10, 20, 50), metadata={"help": "numbers of neurons"})
    lengths: tuple[int, ...] = field(default=(100, 1000), metadata={"help": "times per recording"})
    networks: int = field(default=500, metadata={"help": "networks per cell of the table"})
    gain: float = field(default=1.5, metadata={"help": "gain of the networks", "flags": ("--g", "--gain")})
    noise_std: float = field(default=0.3, metadata={"help": "noise sigma"})
    dt: float = field(default=0.1, metadata={"help": "step"})
    tau: float = field(default=1.0, metadata={"help": "time constant"})
    seed: int = field(default=0, metadata={"help": "seed"})

    def __post_init__(self) -> None:
        for size in self.sizes:
            check_count(size, "sizes")
        for length in self.lengths:
            check_count(length, "lengths", 3)
        check_count(self.networks, "networks", 2)
        check_positive(self.gain, "gain")
        check_positive(self.noise_std, "noise_std")
        check_time_step(self.dt, check_positive(self.tau, "tau"))


def recovery_benchmark(config: RecoveryBenchmark) -> xr.Dataset:
    """Run the benchmark.

    Returns:
        Each figure of merit (neurons, times, network), from which tables take means and standard errors.
    """
    c = config
    shape = (len(c.sizes), len(c.lengths), c.networks)
    results = {name: np.empty(shape) for name in COLUMNS}
    with tqdm(total=math.prod(shape), unit="network", disable=None) as progress:
        for i, N in enumerate(c.sizes):
            for j, T in enumerate(c.lengths):
                generator = as_generator(c.seed)
                W = c.gain / math.sqrt(N) * torch.randn(c.networks, N, N, generator=generator, dtype=torch.float64)
                h0 = torch.randn(c.networks, N, generator=generator, dtype=torch.float64)
                _, h = simulate_rate_network(
                    W, h0, T, c.dt, c.tau, noise_std=c.noise_std, generator=generator, return_h=True
                )
                for k in range(c.networks):
                    for name, value in _one(W[k], h[k], c).items():
                        results[name][i, j, k] = value
                    progress.update()
    dims = ("neurons", "times", "network")
    dataset = xr.Dataset(
        {name: (dims, values, {"long_name": COLUMNS[name], "units": "1"}) for name, values in results.items()},
        coords={"neurons": list(c.sizes), "times": list(c.lengths)},
    )
    dataset.attrs = global_attributes(
        "Recovery of weights where the posterior is known",
        f"Relative error of W, {c.networks} networks per cell, one trial each. {hardware()}",
        c,
        c.seed,
    )
    return dataset


def _one(W: torch.Tensor, h: torch.Tensor, c: RecoveryBenchmark) -> dict[str, float]:
    N = len(W)
    statistics = transition_statistics(voltage=h, dt=c.dt, tau=c.tau)
    exact = GaussianPosterior.from_statistics(statistics, c.noise_std, c.gain**2 / N)
    found = empirical_bayes(statistics)
    estimates = {
        "least_squares": least_squares(statistics),
        "ridge": ridge(statistics),
        "empirical_bayes": GaussianPosterior.from_statistics(statistics, found.noise_std, found.prior_variance).mean,
        "exact": exact.mean,
    }
    errors = {name: recovery(value.numpy(), W.numpy())["relative_error"] for name, value in estimates.items()}
    low, high = exact.interval(0.9)
    covered = float(((low <= W) & (high >= W)).double().mean())
    return errors | {"coverage_90": covered, "contraction": exact.contraction}


def markdown_table(results: xr.Dataset) -> str:
    """Means over networks with their standard errors, as a markdown table."""
    lines = ["| N | T | " + " | ".join(COLUMNS.values()) + " |", "|---" * (len(COLUMNS) + 2) + "|"]
    for N in results["neurons"].values:
        for T in results["times"].values:
            cell = results.sel(neurons=N, times=T)
            cells = []
            for name in COLUMNS:
                values = cell[name].to_numpy()
                cells.append(f"{values.mean():.3f} ± {values.std(ddof=1) / math.sqrt(len(values)):.3f}")
            lines.append(f"| {N} | {T} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def add_arguments(parser: OptionParser) -> None:
    """Add the options of `neurosde benchmark`."""
    kinds = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    sub: Any = kinds.add_parser("simulate", help="speed of simulation and its gradient, beside other libraries")
    add_options(sub, SimulationBenchmark)
    sub.set_defaults(run=simulation_benchmark.run)
    sub = kinds.add_parser("engines", help="cost of either engine, from which engine=auto chooses")
    add_options(sub, EngineCalibration)
    sub.set_defaults(run=engine_calibration.run)
    sub = kinds.add_parser("loader", help="speed of reading cubes into torch, beside other ways")
    add_options(sub, LoaderBenchmark)
    sub.set_defaults(run=loader_benchmark.run)
    sub = kinds.add_parser("denoising", help="a trained prior beside the best denoiser there is, where that is known")
    denoising_benchmark.add_arguments(sub)
    sub = kinds.add_parser("sampling", help="cost of drawing weights from a trained prior")
    sampling_benchmark.add_arguments(sub)
    sub = kinds.add_parser("posterior", help="a trained posterior beside ridge and the exact Gaussian one")
    posterior_benchmark.add_arguments(sub)
    sub = kinds.add_parser("exact", help="posteriors beside the exact one, where that is known; also those of sbi")
    exact_benchmark.add_arguments(sub)
    sub = kinds.add_parser("refinement", help="refiners beside the exact posterior, with the prior's exact denoiser")
    refinement_benchmark.add_arguments(sub)
    sub = kinds.add_parser("inference", help="every method on every task: one cube of results and a report")
    inference_benchmark.add_arguments(sub)
    sub = kinds.add_parser("sbibm", help="a vector diffusion beside published methods, on tasks of sbibm")
    sbibm_benchmark.add_arguments(sub)
    sub = kinds.add_parser(
        "refined", help="draws of a trained posterior before and after refining: calibrated, better?"
    )
    refined_calibration.add_arguments(sub)
    sub = kinds.add_parser("recovery", help="recovery of W where the exact posterior is known")
    add_options(sub, RecoveryBenchmark)
    sub.add_argument("--out", type=Path, default=Path("results/recovery.nc"), help="data (default results/recovery.nc)")
    sub.set_defaults(run=run)


def run(options: Namespace) -> int:
    """Run the benchmark, print its table, write its data."""
    config = from_options(RecoveryBenchmark, options)
    results = recovery_benchmark(config)
    with whole_file(options.out) as temporary:
        results.to_netcdf(temporary, engine="netcdf4")
    print(markdown_table(results))
    print(f"\n{config.networks} networks per row, mean ± standard error; {hardware()}\nData: {options.out}")
    return 0
