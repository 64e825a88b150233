"""`neurosde benchmark exact`: posteriors beside the exact one, where that is known.

For each ensemble whose exact posterior is known (`neurosde.models.exact_posterior`) and each size, networks
are drawn, recorded, and inferred by every method, which is told dt, τ, σ and the ensemble with its range of gains (or
the one gain). Methods of sbi are trained on `simulations` recordings of the ensemble for each row.

- error: |Ŵ − W|/|W| of the posterior mean; to exact: |Ŵ − exact mean|/|exact mean|.
- sd: root mean variance of a weight, over that of the exact posterior; variance: the least and the largest ratio of
  variances along an eigenvector of Λ, averaged over rows and networks.
- C2ST: how often a classifier tells a draw from one of the exact posterior, ½ at best; it rises with their number.
- log score: log density of the truth, per weight, at a resolution of 0.05 s₀ (so that sparse weights have one), where a
  method has a density.

The first row of each cell is a second run of the exact posterior: what the number of draws alone allows. Draws of the
trained posterior are the network's: closed by Gibbs sampling (`neurosde.models.closing`) they would be compared with
draws of the same sampler.

Results are written after every row, and a command that is given again goes on after the rows that are there.
"""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor
from tqdm import tqdm

from neurosde.datasets.ensembles import Ensemble
from neurosde.evaluation.c2st import c2st
from neurosde.evaluation.kept_rows import KeptRows
from neurosde.evaluation.posterior_benchmark import (
    ensemble_of,
    known_ensembles,
    network_seed,
    relative_errors,
    simulated,
)
from neurosde.evaluation.sbi_baselines import SBI_METHODS, sbi_draws
from neurosde.evaluation.scores import spread_ratios
from neurosde.evaluation.timing import hardware
from neurosde.likelihood import TransitionStatistics
from neurosde.models.diffusion_cfg import CFGPosterior
from neurosde.models.diffusion_prior import STEPS
from neurosde.models.edm import Evidence
from neurosde.models.empirical_bayes import empirical_bayes, ridge
from neurosde.models.exact_posterior import BURN_IN, CHAINS, THIN, ExactPosterior, exact_posterior, gain_nodes
from neurosde.models.gaussian_posterior import GaussianPosterior, gaussian_log_evidence
from neurosde.models.model_files import model_label
from neurosde.models.recorded import recording_evidence
from neurosde.options import OptionParser, add_options, from_options
from neurosde.provenance import global_attributes
from neurosde.validation import check_count, check_positive, check_time_step, optional_package

METHODS = {
    "exact": "exact posterior, once more",
    "cfg": "trained posterior",
    "gaussian": "Gaussian posterior (evidence)",
    "ridge": "ridge (cross-validation)",
    "npe": "NPE (sbi)",
    "npse": "NPSE (sbi)",
    "fmpe": "FMPE (sbi)",
}
METRICS = {
    "error": "relative error of the posterior mean",
    "to_exact": "relative distance of the posterior mean from the exact one",
    "sd": "standard deviation over the exact one",
    "least_variance": "least variance along a direction over the exact one",
    "largest_variance": "largest variance along a direction over the exact one",
    "c2st": "accuracy of a classifier between draws and exact draws",
    "log_score": "log density of the truth per weight, at the resolution",
}
RESOLUTION = 0.05  # of log scores, in units of s₀


@dataclass(frozen=True)
class ExactBenchmark:
    """What to infer, and by what."""

    sizes: tuple[int, ...] = field(default=(5, 10, 20), metadata={"help": "neurons", "flags": ("--N",)})
    families: tuple[str, ...] = field(default=("gaussian", "sparse", "low-rank"), metadata={"help": "ensembles"})
    methods: tuple[str, ...] = field(
        default=("exact", "cfg", "gaussian", "ridge"), metadata={"help": f"of {', '.join(METHODS)}"}
    )
    gain: float = field(
        default=0.0, metadata={"help": "the networks' gain, which methods are told; 0: unknown, as trained"}
    )
    length: int = field(default=100, metadata={"help": "times per trial"})
    trials: int = field(default=2, metadata={"help": "trials per network"})
    networks: int = field(default=16, metadata={"help": "networks per cell of the table"})
    draws: int = field(default=512, metadata={"help": "draws per network"})
    thin: int = field(default=THIN, metadata={"help": "sweeps of the exact posterior's chains from draw to draw"})
    simulations: int = field(default=10_000, metadata={"help": "simulations that methods of sbi are trained on"})
    noise_std: float = field(default=0.3, metadata={"help": "noise sigma"})
    dt: float = field(default=0.1, metadata={"help": "step, in units of tau"})
    steps: int | None = field(
        default=None, metadata={"help": f"noise levels of the sampler (default {STEPS}, more of many neurons)"}
    )
    seed: int = field(default=0, metadata={"help": "seed; networks of training have others"})

    def __post_init__(self) -> None:
        for N in self.sizes:
            check_count(N, "N", 2)
        if unknown := sorted(set(self.methods) - set(METHODS)):
            raise ValueError(f"methods must be of {', '.join(METHODS)}; got {', '.join(unknown)}.")
        check_positive(self.gain, "gain", zero_ok=True)
        check_count(self.length, "length", 3)
        check_count(self.networks, "networks", 2)
        for name in ("trials", "thin", "simulations"):
            check_count(getattr(self, name), name)
        if check_count(self.draws, "draws", 2 * CHAINS) % CHAINS:
            raise ValueError(f"draws must be a multiple of {CHAINS}, the number of chains; got {self.draws}.")
        if self.steps is not None:
            check_count(self.steps, "steps", 2)
        check_positive(self.noise_std, "noise_std")
        check_time_step(self.dt)


@dataclass(frozen=True)
class _Cell:
    """Networks of one row of the table."""

    ensemble: Ensemble
    truth: Tensor
    statistics: list[TransitionStatistics]
    evidence: Evidence
    exact: ExactPosterior
    resolution: Tensor
    blurred: Tensor


@dataclass(frozen=True)
class _Found:
    """What a method says: means (network, post, pre), draws (draw, network, post, pre) and log scores (network,)."""

    mean: Tensor
    draws: Tensor | None = None
    log_score: Tensor | None = None


def exact_benchmark(
    posterior: CFGPosterior, config: ExactBenchmark, checkpoint: str = "", out: Path | None = None
) -> xr.Dataset:
    """Run the benchmark, or what is left of it.

    Args:
        posterior: a trained posterior.
        config: what to run.
        checkpoint: what the posterior is called.
        out: file that is written after every row, and whose rows, if it is there, are not run again.

    Returns:
        Each of `METRICS` (ensemble, neurons, method, network), and `monte_carlo_error` (ensemble, neurons, network), of
        the exact mean in units of the exact sd.

    Raises:
        ValueError: a file of other settings, an ensemble whose exact posterior is not known, or one that the trained
            posterior does not know.
        ImportError: sbi is not installed and a method of it is asked for.
    """
    c = config
    if set(c.methods) & set(SBI_METHODS):
        optional_package("sbi", "sbi")
    for name in c.families:  # before any work
        ensemble_of(posterior, name, ())
    shape = (len(c.families), len(c.sizes), len(c.methods), c.networks)
    dims = ("ensemble", "neurons", "method", "network")
    empty = xr.Dataset(
        {name: (dims, np.full(shape, np.nan), {"long_name": METRICS[name], "units": "1"}) for name in METRICS},
        {"ensemble": list(c.families), "neurons": list(c.sizes), "method": list(c.methods)},
    )
    about = {"long_name": "Monte-Carlo error of the exact mean over the exact sd", "units": "1"}
    of_cells = np.full((*shape[:2], c.networks), np.nan)
    empty["monte_carlo_error"] = (("ensemble", "neurons", "network"), of_cells, about)
    empty.attrs = global_attributes(
        "Posteriors over weights beside the exact one",
        f"{checkpoint}, {c.networks} networks per cell, {c.draws} draws. {hardware(device=posterior.device)}",
        asdict(c) | {"checkpoint": checkpoint},
        c.seed,
    )
    kept = KeptRows(empty, dims[:3], out)
    with tqdm(total=math.prod(shape[:3]), unit="row", disable=None) as progress:
        for i, name in enumerate(c.families):
            for j, N in enumerate(c.sizes):
                missing = [k for k in range(shape[2]) if kept.missing(ensemble=i, neurons=j, method=k)]
                progress.update(shape[2] - len(missing))
                if not missing:
                    continue
                cell = _cell(posterior, name, N, c)
                for k in missing:
                    found = dict(_compared(_found(c.methods[k], posterior, name, cell, c), cell, c.seed))
                    found["monte_carlo_error"] = cell.exact.mean_error
                    kept.add(found, ensemble=i, neurons=j, method=k)
                    progress.update()
    return kept.results


def _cell(posterior: CFGPosterior, name: str, N: int, c: ExactBenchmark) -> _Cell:
    ensemble = ensemble_of(posterior, name, (c.gain, c.gain) if c.gain else ())
    generator = torch.Generator().manual_seed(
        network_seed(c.seed, list(known_ensembles(posterior)).index(name), N, c.length)
    )
    truth, statistics = simulated(
        ensemble, c.networks, N, c.length, trials=c.trials, noise_std=c.noise_std, dt=c.dt, generator=generator
    )
    scales = torch.tensor([one.noise_scale(c.noise_std) for one in statistics], dtype=torch.float64)
    evidence = recording_evidence(statistics).over_noise(scales.square())
    exact = _exact(ensemble, evidence, c, c.seed)
    unit = posterior.condition(statistics, **_told(posterior, name, ensemble, N, c)).unit.cpu()
    resolution = RESOLUTION * unit
    noise = torch.randn(truth.shape, generator=generator, dtype=torch.float64)
    blurred = truth + resolution[:, None, None] * noise
    return _Cell(ensemble, truth, statistics, evidence, exact, resolution, blurred)


def _exact(ensemble: Ensemble, evidence: Evidence, c: ExactBenchmark, seed: int) -> ExactPosterior:
    return exact_posterior(ensemble, evidence, c.draws, burn_in=max(BURN_IN, 8 * c.thin), thin=c.thin, seed=seed)


def _told(posterior: CFGPosterior, name: str, ensemble: Ensemble, N: int, c: ExactBenchmark) -> dict[str, Any]:
    gain = math.sqrt(N * ensemble.variance(N)) if c.gain else None
    family = name if name in posterior.families else None
    return {"noise_std": c.noise_std, "family": family, "gain": gain}


def _found(method: str, posterior: CFGPosterior, name: str, cell: _Cell, c: ExactBenchmark) -> _Found:
    N = cell.truth.shape[-1]
    if method == "exact":
        again = _exact(cell.ensemble, cell.evidence, c, c.seed + 1)
        return _Found(again.mean, again.weights, _mixture_score(cell) if name == "gaussian" else None)
    if method == "cfg":
        given = posterior.condition(cell.statistics, **_told(posterior, name, cell.ensemble, N, c))
        source = torch.Generator(posterior.device).manual_seed(c.seed)
        draws = given.sample((c.draws,), steps=c.steps, closing=False, generator=source).cpu()
        score = given.log_prob(cell.blurred.to(posterior.device), resolution=RESOLUTION, generator=c.seed).cpu()
        return _Found(given.mean.cpu(), draws, score)
    if method == "ridge":
        return _Found(torch.stack([ridge(one) for one in cell.statistics]))
    if method == "gaussian":
        parts = [_gaussian(one, cell.ensemble, c) for one in cell.statistics]
        draws = torch.stack([one.sample((c.draws,), c.seed) for one in parts], 1)
        scores = [_blurred(one, s).log_prob(W) for one, s, W in zip(parts, cell.resolution, cell.blurred, strict=True)]
        return _Found(torch.stack([one.mean for one in parts]), draws, torch.stack(scores))
    draws = sbi_draws(
        method, cell.ensemble, cell.statistics, noise_std=c.noise_std, dt=c.dt, trials=c.trials, T=c.length,
        simulations=c.simulations, draws=c.draws, seed=c.seed, progress=True,
    )  # fmt: skip
    return _Found(draws.mean(1), draws.transpose(0, 1))


def _gaussian(statistics: TransitionStatistics, ensemble: Ensemble, c: ExactBenchmark) -> GaussianPosterior:
    v = ensemble.variance(statistics.num_neurons) if c.gain else None
    found = empirical_bayes(statistics, noise_std=c.noise_std, prior_variance=v)
    return GaussianPosterior.from_statistics(statistics, c.noise_std, found.prior_variance)


def _blurred(posterior: GaussianPosterior, resolution: Tensor) -> GaussianPosterior:
    sd = (posterior.direction_sd.square() + resolution**2).sqrt()
    return GaussianPosterior(posterior.mean, posterior.directions, sd, posterior.prior_variance, posterior.noise_std)


def _mixture_score(cell: _Cell) -> Tensor:
    """Log density of the blurred truth under the exact posterior of Gaussian weights, shape (network,)."""
    N, e = cell.truth.shape[-1], cell.evidence
    assert e.vectors is not None
    gains, chances = gain_nodes(cell.ensemble)
    variances = gains.square() / N
    weight = (chances.log() + gaussian_log_evidence(e, variances)).log_softmax(-1).mT
    v = variances.view(-1, 1, 1)
    factor = 1 + v * e.eigenvalues
    variance = (v / factor + cell.resolution.square().unsqueeze(-1)).unsqueeze(-2)
    off = cell.blurred @ e.vectors - e.cross * (v / factor).unsqueeze(-2)
    density = -0.5 * (off.square() / variance + (2 * math.pi * variance).log()).sum((-1, -2))
    return (weight + density).logsumexp(0)


def _compared(found: _Found, cell: _Cell, seed: int) -> Iterator[tuple[str, Any]]:
    exact, directions = cell.exact, cell.evidence.vectors
    assert directions is not None
    yield "error", relative_errors(found.mean, cell.truth)
    yield "to_exact", relative_errors(found.mean, exact.mean)
    if found.log_score is not None:
        yield "log_score", found.log_score / cell.truth[0].numel()
    if found.draws is None:
        return
    of_exact, of_found = exact.weights @ directions, found.draws @ directions
    yield from spread_ratios(found.draws.numpy(), exact.weights.numpy(), directions.numpy()).items()
    spread = of_exact.std(0)
    unit = torch.where(spread > 0, spread, math.inf)  # a row without connections in any draw
    pairs = [(one / unit).flatten(2).numpy() for one in (of_exact, of_found)]
    yield "c2st", [c2st(pairs[0][:, k], pairs[1][:, k], seed=seed).accuracy for k in range(len(cell.truth))]


def markdown_table(results: xr.Dataset) -> str:
    """A row per ensemble, size and method: means over networks, with the standard errors of errors and C2ST."""
    head = ["ensemble", "N", "method", "error", "to exact", "sd", "variance", "C2ST", "log score"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    root = math.sqrt(results.sizes["network"])

    def mean(values: xr.DataArray, digits: int = 3) -> str:
        return "" if bool(values.isnull().all()) else f"{float(values.mean()):.{digits}f}"

    def with_error(values: xr.DataArray) -> str:
        return mean(values) and f"{mean(values)} ± {float(values.std(ddof=1)) / root:.3f}"

    for name in results["ensemble"].values:
        for N in results["neurons"].values:
            for method in results["method"].values:
                cell = results.sel({"ensemble": name, "neurons": N, "method": method})
                ends = [mean(cell[f"{end}_variance"], 2) for end in ("least", "largest")]
                row = [
                    name, str(N), METHODS[method], with_error(cell["error"]), mean(cell["to_exact"]), mean(cell["sd"]),
                    " … ".join(ends).strip(" …"), with_error(cell["c2st"]), mean(cell["log_score"]),
                ]  # fmt: skip
                lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def add_arguments(parser: OptionParser) -> None:
    """Add the options of `neurosde benchmark exact`."""
    parser.add_argument("checkpoint", nargs="?", default="base", help="file, folder or name of a trained posterior")
    add_options(parser, ExactBenchmark)
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("results/exact-benchmark.nc"),
        help="data; rows in it are kept (default results/exact-benchmark.nc)",
    )
    parser.set_defaults(run=run)


def run(options: Namespace) -> int:
    """Run the benchmark, print its table, write its data."""
    config = from_options(ExactBenchmark, options)
    posterior = CFGPosterior.from_pretrained(options.checkpoint, options.device)
    results = exact_benchmark(posterior, config, model_label(options.checkpoint, "posterior"), options.out)
    print(markdown_table(results))
    error = results["monte_carlo_error"]
    print(
        f"\n{config.networks} networks per row, {config.trials} x {config.length} times, {config.draws} draws, mean ± "
        f"standard error; Monte-Carlo error of exact means {float(error.mean()):.3f} sd, at most "
        f"{float(error.max()):.3f}; {hardware(device=posterior.device)}\nData: {options.out}"
    )
    return 0
