"""`neurosde benchmark posterior`: a trained posterior beside ridge and the exact Gaussian posterior, and calibrated?

For each ensemble, number of neurons and recording length, networks are drawn, simulated, and inferred by every method.
No method is told more than the recording, dt, τ and σ; the last column of errors belongs to the trained posterior when
it is told the ensemble too. Errors are |Ŵ − W|/|W|. Told the ensemble, the truth is a draw of the posterior's prior, so
that of an exact posterior's draws the truth would be one more:

- coverage of the 90 % intervals, and contraction, 1 − posterior variance / mean square of W;
- p, the smallest p-value over features of W that the rank of the truth among draws is uniform, after Holm;
- TARP, the mean distance of expected coverage from its level, beside what 95 % of exact posteriors would stay below.

Untold, that holds over all ensembles together, of gains as trained: a second table has it for each size and length.

Results are written after every row, and a command that is given again goes on after the rows that are there.
"""

from __future__ import annotations

import math
from argparse import Namespace
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor
from tqdm import tqdm

from neurosde.datasets.ensemble_options import ensemble_from_config
from neurosde.datasets.ensembles import Ensemble
from neurosde.evaluation.calibration import (
    coverage,
    coverage_error,
    coverage_error_of_exact,
    expected_coverage,
    holm,
    in_any_order,
    ranks,
)
from neurosde.evaluation.kept_rows import KeptRows
from neurosde.evaluation.rank_calibration import uniformity
from neurosde.evaluation.timing import hardware
from neurosde.likelihood import TransitionStatistics, transition_statistics
from neurosde.models.diffusion_cfg import CFGPosterior
from neurosde.models.diffusion_prior import STEPS
from neurosde.models.empirical_bayes import empirical_bayes, ridge
from neurosde.models.gaussian_posterior import GaussianPosterior
from neurosde.models.model_files import model_label
from neurosde.options import OptionParser, add_options, from_options
from neurosde.provenance import global_attributes
from neurosde.solve import simulate_rate_network
from neurosde.validation import check_count, check_positive, check_time_step

ERRORS = {
    "ridge": "ridge (cross-validation)",
    "gaussian": "exact Gaussian posterior (evidence)",
    "cfg": "trained posterior",
    "cfg_told": "the same, told the ensemble",
}
CALIBRATION = {
    "coverage_90": "coverage of the 90 % intervals",
    "contraction": "contraction",
    "credibility": "credibility of the truth about a random point",
}
INFORMED = ("untold", "told")
DIRECTIONS = 4  # random projections of W whose ranks are tested
FEATURES = (*(f"projection {k + 1}" for k in range(DIRECTIONS)), "norm", "singular value", "mean", "trace")


@dataclass(frozen=True)
class PosteriorBenchmark:
    """What to infer, and how often."""

    sizes: tuple[int, ...] = field(default=(20, 50), metadata={"help": "neurons", "flags": ("--N",)})
    lengths: tuple[int, ...] = field(default=(100, 1000), metadata={"help": "times per trial"})
    families: tuple[str, ...] = field(default=(), metadata={"help": "ensembles (default: all it was trained on)"})
    gains: tuple[float, ...] = field(
        default=(), metadata={"help": "range of gains (default: as trained, to which calibration refers)"}
    )
    networks: int = field(default=100, metadata={"help": "networks per cell of the table"})
    trials: int = field(default=2, metadata={"help": "trials per network"})
    draws: int = field(default=64, metadata={"help": "posterior draws per network"})
    noise_std: float = field(default=0.3, metadata={"help": "noise sigma, known to all methods"})
    dt: float = field(default=0.1, metadata={"help": "step, in units of tau"})
    steps: int | None = field(
        default=None, metadata={"help": f"noise levels of the sampler (default {STEPS}, more of many neurons)"}
    )
    closing: bool = field(default=True, metadata={"help": "close draws by sweeps of Gibbs sampling, as by default"})
    seed: int = field(default=0, metadata={"help": "seed; networks of training have others"})

    def __post_init__(self) -> None:
        for N in self.sizes:
            check_count(N, "N", 2)
        for length in self.lengths:
            check_count(length, "lengths", 3)
        for name in ("networks", "draws"):
            check_count(getattr(self, name), name, 2)
        check_count(self.trials, "trials")
        if self.steps is not None:
            check_count(self.steps, "steps", 2)
        check_positive(self.noise_std, "noise_std")
        check_time_step(self.dt)
        if self.gains and (len(self.gains) != 2 or not 0 < self.gains[0] <= self.gains[1]):
            raise ValueError(f"gains must be two numbers, the lower one first and positive; got {self.gains}.")


def posterior_benchmark(
    posterior: CFGPosterior, config: PosteriorBenchmark, checkpoint: str = "", out: Path | None = None
) -> xr.Dataset:
    """Run the benchmark, or what is left of it.

    Args:
        posterior: a trained posterior.
        config: what to run.
        checkpoint: what the posterior is called.
        out: file that is written after every row of the table, and whose rows, if it is there, are not run again.

    Returns:
        Errors of all methods (ensemble, neurons, times, network), and, told the ensemble or not, `coverage_90`,
        `contraction`, `credibility` (…, informed, network) and `rank` (…, informed, feature, network).

    Raises:
        ValueError: a file of other settings, or an ensemble that the posterior was not trained on.
    """
    c = config
    ensembles = {name: ensemble_of(posterior, name, c.gains) for name in c.families or known_ensembles(posterior)}
    cells = (len(ensembles), len(c.sizes), len(c.lengths))
    shapes: dict[str, dict[str, int]] = dict.fromkeys(ERRORS, {})
    shapes |= dict.fromkeys(CALIBRATION, {"informed": len(INFORMED)})
    shapes["rank"] = {"informed": len(INFORMED), "feature": len(FEATURES)}
    dims = ("ensemble", "neurons", "times")
    about = ERRORS | CALIBRATION | {"rank": "number of draws below the truth"}
    empty = xr.Dataset(
        {
            name: (
                (*dims, *extra, "network"),
                np.full((*cells, *extra.values(), c.networks), np.nan),
                {"long_name": about[name], "units": "1"},
            )
            for name, extra in shapes.items()
        },
        {
            "ensemble": list(ensembles), "neurons": list(c.sizes), "times": list(c.lengths),
            "informed": list(INFORMED), "feature": list(FEATURES),
        },
    )  # fmt: skip
    empty.attrs = global_attributes(
        "A trained posterior over weights beside baselines",
        f"{checkpoint}, {c.networks} networks per cell, {c.draws} draws. {hardware(device=posterior.device)}",
        asdict(c) | {"checkpoint": checkpoint},
        c.seed,
    ) | {"draws": c.draws, "as_trained": int(not c.families and not c.gains)}
    kept = KeptRows(empty, dims, out)
    with tqdm(total=math.prod(cells), unit="row", disable=None) as progress:
        for i, (name, ensemble) in enumerate(ensembles.items()):
            for j, N in enumerate(c.sizes):
                for k, T in enumerate(c.lengths):
                    row = {"ensemble": i, "neurons": j, "times": k}
                    if kept.missing(**row):
                        generator = torch.Generator().manual_seed(network_seed(c.seed, i, N, T))
                        W, statistics = simulated(
                            ensemble, c.networks, N, T,
                            trials=c.trials, noise_std=c.noise_std, dt=c.dt, generator=generator,
                        )  # fmt: skip
                        kept.add(_cell(posterior, name, W, statistics, c), **row)
                    progress.update()
    return kept.results


def simulated(
    ensemble: Ensemble,
    networks: int,
    N: int,
    T: int,
    *,
    trials: int,
    noise_std: float,
    dt: float,
    generator: torch.Generator,
) -> tuple[Tensor, list[TransitionStatistics]]:
    """Draw networks W (network, post, pre), and record `trials` of T times of each, τ = 1."""
    W = ensemble.sample_weights(networks, N, generator)
    h0 = torch.randn(networks, trials, N, generator=generator, dtype=torch.float64)
    _, h = simulate_rate_network(
        W.unsqueeze(1), h0, T, dt, 1.0, noise_std=noise_std, generator=generator, return_h=True
    )
    return W, [transition_statistics(voltage=one, dt=dt) for one in h]


def _cell(
    posterior: CFGPosterior, name: str, W: Tensor, statistics: list[TransitionStatistics], c: PosteriorBenchmark
) -> dict[str, Any]:
    truth, N = W.numpy(), W.shape[-1]
    directions = np.random.default_rng(c.seed).standard_normal((DIRECTIONS, N, N))
    found, calibration = {}, []
    for key, family in (("cfg", None), ("cfg_told", name if name in posterior.families else None)):
        given = posterior.condition(statistics, noise_std=c.noise_std, family=family)
        found[key] = relative_errors(given.mean.cpu(), W)
        source = torch.Generator(posterior.device).manual_seed(c.seed)
        draws = given.sample((c.draws,), steps=c.steps, closing=c.closing, generator=source).cpu().numpy()
        shuffled, shuffled_truth = in_any_order(draws, truth, c.seed)
        # Points about which to count draws: other networks' truths, near where draws may be.
        references = np.roll(shuffled_truth, 1, axis=0)
        calibration.append(
            {
                "coverage_90": [coverage(draws[:, r], truth[r], np.array([0.9]))[0] for r in range(len(W))],
                "contraction": 1 - draws.var(0, ddof=1).mean((-2, -1)) / np.square(truth).mean(),
                "credibility": expected_coverage(shuffled, shuffled_truth, references),
                "rank": ranks(shuffled, shuffled_truth, directions, c.seed),
            }
        )
    evidence = [empirical_bayes(one, noise_std=c.noise_std) for one in statistics]
    exact = [
        GaussianPosterior.from_statistics(one, c.noise_std, prior.prior_variance).mean
        for one, prior in zip(statistics, evidence, strict=True)
    ]
    found["gaussian"] = relative_errors(torch.stack(exact), W)
    found["ridge"] = relative_errors(torch.stack([ridge(one) for one in statistics]), W)
    return found | {key: np.stack([one[key] for one in calibration]) for key in calibration[0]}


def relative_errors(estimates: Tensor, W: Tensor) -> Tensor:
    """|Ŵ − W|/|W| of each network, shape (network,); NaN where there are no weights, as in tiny sparse networks."""
    size = W.flatten(1).norm(dim=1)
    return (estimates - W).flatten(1).norm(dim=1) / torch.where(size > 0, size, math.nan)


def known_ensembles(posterior: CFGPosterior) -> dict[str, dict[str, Any]]:
    """Parameters of the ensembles that a posterior was trained on, by their names.

    Raises:
        ValueError: it was trained on several of one name.
    """
    kinds = posterior.config.ensembles
    known = {kind["name"]: kind for kind in kinds}
    if len(known) < len(kinds):
        raise ValueError(
            f"the posterior was trained on several ensembles of one name, {[kind['name'] for kind in kinds]}; a "
            "benchmark does not know which to draw from."
        )
    return known


def ensemble_of(posterior: CFGPosterior, name: str, gains: tuple[float, ...]) -> Ensemble:
    """Ensemble of that name that a posterior was trained on, with another range of gains if one is given.

    Raises:
        ValueError: the posterior does not know it.
    """
    known = known_ensembles(posterior)
    chosen = dict(known[name], gain=gains[0], gain_high=gains[1]) if gains and name in known else known.get(name)
    found = ensemble_from_config({"ensemble": chosen})
    if found is None:
        raise ValueError(f"families must be of the ensembles {sorted(known)} of the posterior; got {name!r}.")
    return found


def network_seed(*key: int) -> int:
    """Seed of networks that no training has seen, for a seed, an ensemble's index, a size and a length."""
    return int(np.random.SeedSequence(key, spawn_key=(2,)).generate_state(1, np.uint64)[0] >> np.uint64(1))


def calibration(results: xr.Dataset) -> dict[str, float]:
    """Coverage, contraction, uniformity of ranks and TARP of a selection of networks (and ensembles)."""
    draws, count = int(results.attrs["draws"]), results["credibility"].size
    of_truth = results["rank"].transpose("feature", ...).to_numpy().reshape(len(FEATURES), -1)
    return {
        "coverage_90": float(results["coverage_90"].mean()),
        "contraction": float(results["contraction"].mean()),
        "p": float(holm(uniformity(of_truth.astype(int), draws)).min()),
        "tarp": coverage_error(results["credibility"].to_numpy().ravel()),
        "tarp_null": coverage_error_of_exact(count, draws),
    }


def markdown_tables(results: xr.Dataset) -> str:
    """A row per cell: mean errors with their standard errors, and calibration; then the latter over all ensembles."""
    columns = ["coverage", "contraction", "p", "TARP (95 % of exact ones)"]
    heads = ["ensemble", "N", "T", *ERRORS.values(), *columns], ["N", "T", *columns]
    cells, pooled = ([f"| {' | '.join(head)} |", "|---" * len(head) + "|"] for head in heads)
    root = math.sqrt(results.sizes["network"])
    for name in results["ensemble"].values:
        for N in results["neurons"].values:
            for T in results["times"].values:
                cell = results.sel(ensemble=name, neurons=N, times=T)
                errors = [
                    f"{float(cell[key].mean()):.3f} ± {float(cell[key].std(ddof=1)) / root:.3f}" for key in ERRORS
                ]
                row = [str(name), str(N), str(T), *errors, *_calibration_cells(cell.sel(informed="told"))]
                cells.append(f"| {' | '.join(row)} |")
    if not results.attrs["as_trained"]:
        return "\n".join(cells)
    for N in results["neurons"].values:
        for T in results["times"].values:
            cell = results.sel(neurons=N, times=T, informed="untold")
            pooled.append(f"| {' | '.join([str(N), str(T), *_calibration_cells(cell)])} |")
    return "\n".join([*cells, "", "Not told the ensemble, over all of them:", "", *pooled])


def _calibration_cells(results: xr.Dataset) -> list[str]:
    found = calibration(results)
    numbers = [f"{found[key]:.3f}" for key in ("coverage_90", "contraction")]
    return [*numbers, f"{found['p']:.2g}", f"{found['tarp']:.3f} ({found['tarp_null']:.3f})"]


def add_arguments(parser: OptionParser) -> None:
    """Add the options of `neurosde benchmark posterior`."""
    parser.add_argument("checkpoint", nargs="?", default="base", help="file, folder or name of a trained posterior")
    add_options(parser, PosteriorBenchmark)
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("results/posterior-benchmark.nc"),
        help="data; rows in it are kept (default results/posterior-benchmark.nc)",
    )
    parser.set_defaults(run=run)


def run(options: Namespace) -> int:
    """Run the benchmark, print its table, write its data."""
    config = from_options(PosteriorBenchmark, options)
    posterior = CFGPosterior.from_pretrained(options.checkpoint, options.device)
    results = posterior_benchmark(posterior, config, model_label(options.checkpoint, "posterior"), options.out)
    print(markdown_tables(results))
    print(
        f"\n{config.networks} networks per row, {config.trials} trials each, mean ± standard error; "
        f"{hardware(device=posterior.device)}\nData: {options.out}"
    )
    return 0
