"""`neurosde benchmark refined`: are refined draws as sure as they should be, and better than those they began as?

Networks of an ensemble that a trained posterior knows are recorded, inferred by it, told the ensemble, and the draws
refined by split Gibbs sampling, which asks for a prior, and at first for what the network says of a part of the
recording. Before and after:

- p, TARP and contraction, see `neurosde.evaluation.posterior_benchmark`;
- norm: |draw|/|W| − 1, mean over draws and networks, with its standard error: a prior that a network has learnt makes
  draws too small or too large;
- score: log density of a held-out trial, transition by transition and neuron by neuron, y ~ N((Wφ)_i, s²) averaged over
  draws, less that of the true weights, in nats a transition and neuron: 0 at best, and how far below 0 is what is not
  known of W. Where the noise of a transition exceeds what is not known of Wφ this tells how good the mean is, and next
  to nothing of the spread, which the other columns tell.

With `--alone` there are two stages more, of networks whose gains are those of the priors that come with neurosde: draws
of the Gaussian posterior, which know nothing of structure, and the same refined by so many sweeps with the prior of the
ensemble's name, which has never seen a recording.

Each network is a row of the file, written when its batch is done; a run that was cut short goes on after the last one.
"""

from __future__ import annotations

import math
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor
from tqdm import tqdm

from neurosde.evaluation.calibration import coverage, expected_coverage, in_any_order, ranks
from neurosde.evaluation.kept_rows import KeptRows
from neurosde.evaluation.posterior_benchmark import (
    DIRECTIONS,
    FEATURES,
    calibration,
    ensemble_of,
    known_ensembles,
    network_seed,
    simulated,
)
from neurosde.evaluation.timing import hardware
from neurosde.likelihood import TransitionStatistics, transitions
from neurosde.models.diffusion_cfg import CFGPosterior
from neurosde.models.diffusion_prior import STEPS, DiffusionPrior, load_prior
from neurosde.models.empirical_bayes import empirical_bayes
from neurosde.models.gaussian_posterior import GaussianPosterior
from neurosde.models.model_files import model_label
from neurosde.models.split_gibbs import NEAR_RHO, NEAR_SWEEPS
from neurosde.options import OptionParser, add_options, from_options
from neurosde.provenance import global_attributes
from neurosde.solve import simulate_rate_network
from neurosde.validation import check_count, check_positive, check_time_step

STAGES = ("before", "after")
ALONE = ("Gaussian posterior", "Gaussian posterior, refined")  # by a prior of weights alone
VALUES = {
    "coverage_90": ("coverage of the 90 % intervals", "1"),
    "contraction": ("1 - posterior variance / mean square of the weights of all networks, of each", "1"),
    "credibility": ("credibility of the truth about a random point", "1"),
    "norm": ("norm of a draw over the true one, less 1, mean over draws", "1"),
    "score": ("log density of held-out transitions, less that of the true weights", "nat"),
    "seconds": ("time that drawing, or refining, took", "s"),
}


@dataclass(frozen=True)
class RefinedCalibration:
    """What to infer and to refine, and how often."""

    families: tuple[str, ...] = field(
        default=("dale", "sparse", "low-rank"), metadata={"help": "ensembles that it was trained on"}
    )
    N: int = field(default=20, metadata={"help": "neurons"})
    length: int = field(default=100, metadata={"help": "times per trial"})
    networks: int = field(default=64, metadata={"help": "networks of each ensemble"})
    trials: int = field(default=2, metadata={"help": "trials per network"})
    draws: int = field(default=31, metadata={"help": "posterior draws per network"})
    sweeps: int = field(default=NEAR_SWEEPS, metadata={"help": "sweeps of split Gibbs"})
    rho: float = field(
        default=NEAR_RHO, metadata={"help": "its first ρ, in units of a weight's spread: how far draws may go"}
    )
    alone: int = field(
        default=0, metadata={"help": "sweeps with a prior of weights alone, from the Gaussian posterior; 0: none"}
    )
    batch: int = field(default=8, metadata={"help": "networks that are inferred and refined side by side"})
    noise_std: float = field(default=0.3, metadata={"help": "noise sigma, which is known"})
    dt: float = field(default=0.1, metadata={"help": "step, in units of tau"})
    steps: int | None = field(
        default=None, metadata={"help": f"noise levels of the sampler (default {STEPS}, more of many neurons)"}
    )
    closing: bool = field(default=True, metadata={"help": "close draws by sweeps of Gibbs sampling, as by default"})
    seed: int = field(default=0, metadata={"help": "seed; networks of training have others"})

    def __post_init__(self) -> None:
        check_count(self.N, "N", 2)
        check_count(self.length, "length", 3)
        for name in ("networks", "draws"):
            check_count(getattr(self, name), name, 2)
        for name in ("trials", "batch"):
            check_count(getattr(self, name), name)
        if self.steps is not None:
            check_count(self.steps, "steps", 2)
        check_count(self.sweeps, "sweeps", 8)
        check_positive(self.rho, "rho")
        if self.alone:
            check_count(self.alone, "alone", 8)
        check_positive(self.noise_std, "noise_std")
        check_time_step(self.dt)

    @property
    def stages(self) -> tuple[str, ...]:
        """What draws there are of each network."""
        return (*STAGES, *ALONE) if self.alone else STAGES


def refined_calibration(
    posterior: CFGPosterior, config: RefinedCalibration, path: str | Path, checkpoint: str = ""
) -> xr.Dataset:
    """Run the benchmark, or what is left of it.

    Args:
        posterior: a trained posterior.
        config: what to infer and to refine.
        path: file of the rows, which is written after each batch of networks.
        checkpoint: what the posterior is called.

    Returns:
        Each of `VALUES` (ensemble, stage, network) and `rank` (ensemble, stage, feature, network).

    Raises:
        FileNotFoundError: no prior of an ensemble's name.
        ValueError: an ensemble that the posterior does not know, or a file of another configuration.
    """
    c, path = config, Path(path)
    for name in c.families:
        ensemble_of(posterior, name, ())  # refuses one that it does not know
    priors = {name: load_prior(name, posterior.device) for name in c.families if c.alone}
    ensembles = {name: ensemble_of(posterior, name, _gains(priors.get(name))) for name in c.families}
    kept = KeptRows(_empty(c, checkpoint, posterior), ("ensemble", "network"), path)
    directions = np.random.default_rng(c.seed).standard_normal((DIRECTIONS, c.N, c.N))
    with tqdm(total=len(c.families) * c.networks, unit="network", disable=None) as progress:
        for i, (name, ensemble) in enumerate(ensembles.items()):
            known = list(known_ensembles(posterior)).index(name)
            source = torch.Generator().manual_seed(network_seed(c.seed, known, c.N, c.length))
            W, statistics = simulated(
                ensemble, c.networks, c.N, c.length, trials=c.trials, noise_std=c.noise_std, dt=c.dt, generator=source
            )
            h0 = torch.randn(c.networks, c.N, generator=source, dtype=torch.float64)
            _, held_out = simulate_rate_network(
                W, h0, c.length, c.dt, 1.0, noise_std=c.noise_std, generator=source, return_h=True
            )
            truth = W.numpy()
            for first in range(0, c.networks, c.batch):
                batch = range(first, min(first + c.batch, c.networks))
                if not any(kept.missing(ensemble=i, network=k) for k in batch):
                    progress.update(len(batch))
                    continue
                some, seed = [statistics[k] for k in batch], network_seed(c.seed, known, first)
                found = _refined(posterior, name, some, c, seed)
                if c.alone:
                    found += _refined_alone(posterior, priors[name], some, c, seed)
                for place, k in enumerate(batch):
                    rows = []
                    for drawn, seconds in found:
                        draws = drawn[:, place]
                        each, one = in_any_order(draws.numpy()[:, None], truth[k : k + 1], c.seed + k)
                        norms = np.linalg.norm(each, axis=(-2, -1)) / max(float(np.linalg.norm(one)), 1e-300)
                        scale = statistics[k].noise_scale(c.noise_std)
                        rows.append({
                            "coverage_90": coverage(draws.numpy(), truth[k], np.array([0.9]))[0],
                            "contraction": 1 - draws.var(0).mean() / np.square(truth).mean(),
                            "credibility": expected_coverage(each, one, truth[k - 1 : k] if k else truth[-1:])[0],
                            "norm": norms.mean() - 1,
                            "score": held_out_score(draws, W[k], held_out[k], c.dt, scale),
                            "seconds": seconds / len(batch),
                            "rank": ranks(each, one, directions, c.seed + k)[:, 0],
                        })  # fmt: skip
                    kept.add({key: np.stack([row[key] for row in rows]) for key in rows[0]}, ensemble=i, network=k)
                    progress.update()
    return kept.results


def _empty(c: RefinedCalibration, checkpoint: str, posterior: CFGPosterior) -> xr.Dataset:
    shape = (len(c.families), len(c.stages), c.networks)
    dims = ("ensemble", "stage", "network")
    data: dict[str, Any] = {
        key: (dims, np.full(shape, np.nan), {"long_name": what, "units": unit}) for key, (what, unit) in VALUES.items()
    }
    about = {"long_name": "number of draws below the truth", "units": "1"}
    data["rank"] = ((*dims[:2], "feature", "network"), np.full((*shape[:2], len(FEATURES), c.networks), np.nan), about)
    results = xr.Dataset(data, {"ensemble": list(c.families), "stage": list(c.stages), "feature": list(FEATURES)})
    results.attrs = global_attributes(
        "Calibration of refined draws",
        f"{checkpoint}, {c.networks} networks per ensemble. {hardware(device=posterior.device)}",
        asdict(c) | {"checkpoint": checkpoint},
        c.seed,
    ) | {"draws": c.draws}
    return results


def _refined(
    posterior: CFGPosterior, name: str, statistics: Sequence[TransitionStatistics], c: RefinedCalibration, seed: int
) -> list[tuple[Tensor, float]]:
    """Draws before and after, (draw, network, post, pre), on the CPU, and the seconds that they took."""
    given = posterior.condition(statistics, noise_std=c.noise_std, family=name)
    source = torch.Generator(posterior.device).manual_seed(seed)
    began = time.perf_counter()
    draws = given.sample((c.draws,), steps=c.steps, closing=c.closing, generator=source)
    before, drawn = draws.cpu(), time.perf_counter()
    refined = given.refine(draws, sweeps=c.sweeps, rho=c.rho, closing=c.closing, generator=source).draws.cpu()
    return [(before, drawn - began), (refined, time.perf_counter() - drawn)]


def _gains(prior: DiffusionPrior | None) -> tuple[float, ...]:
    """Range of the gains that a prior of one ensemble was trained on; () without one."""
    if prior is None:
        return ()
    (trained,) = prior.config.training["ensembles"]
    return trained["gain"], trained["gain_high"]


def _refined_alone(
    posterior: CFGPosterior,
    prior: DiffusionPrior,
    statistics: Sequence[TransitionStatistics],
    c: RefinedCalibration,
    seed: int,
) -> list[tuple[Tensor, float]]:
    """Draws of the Gaussian posterior, and the same refined with a prior that saw no recording; see `_refined`."""
    given, began = posterior.condition(statistics, noise_std=c.noise_std), time.perf_counter()
    gaussian = []
    for k, one in enumerate(statistics):
        variance = empirical_bayes(one, noise_std=c.noise_std).prior_variance
        gaussian.append(GaussianPosterior.from_statistics(one, c.noise_std, variance).sample((c.draws,), seed + k))
    draws = torch.stack(gaussian, 1)
    drawn, source = time.perf_counter(), torch.Generator(posterior.device).manual_seed(seed)
    found = given.refine(draws.to(posterior.device), prior=prior, sweeps=c.alone, closing=c.closing, generator=source)
    return [(draws, drawn - began), (found.draws.cpu(), time.perf_counter() - drawn)]


def held_out_score(draws: Tensor, truth: Tensor, voltage: Tensor, dt: float, scale: float) -> float:
    """Log score of draws on a trial that they have not seen, less that of the true weights, in nats.

    The density of each transition of each neuron is the mean over draws of N(y; (Wφ)_i, s²). τ is 1.

    Args:
        draws: W, shape (draw, post, pre).
        truth: the true weights, shape (post, pre).
        voltage: h of the trial, shape (time, neuron).
        dt: step.
        scale: s, see `neurosde.likelihood`.

    Returns:
        The mean over transitions and neurons.
    """
    scores = []
    for one in transitions(voltage=voltage, dt=dt):
        for weights in (draws, truth.unsqueeze(0)):
            off = (one.y - one.x @ weights.to(one.x).mT) / scale  # (draw, transition, neuron)
            scores.append((-0.5 * off.square()).logsumexp(0) - math.log(len(weights)))
    return float(torch.cat(scores[::2]).mean() - torch.cat(scores[1::2]).mean())


def markdown_table(results: xr.Dataset) -> str:
    """A row per ensemble and stage; of the networks that are done."""
    head = [
        "ensemble",
        "draws",
        "norm",
        "held-out score",
        "contraction",
        "coverage",
        "p",
        "TARP (95 % of exact ones)",
        "s",
    ]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]

    def with_error(values: xr.DataArray, digits: int) -> str:
        return f"{float(values.mean()):.{digits}f} ± {float(values.std(ddof=1)) / math.sqrt(values.size):.{digits}f}"

    for name in results["ensemble"].values:
        for stage in results["stage"].values:
            cell = results.sel(ensemble=name, stage=stage).dropna("network")
            found = calibration(cell)
            row = [
                str(name), str(stage), with_error(cell["norm"], 3), with_error(cell["score"], 4),
                f"{found['contraction']:.3f}", f"{found['coverage_90']:.3f}", f"{found['p']:.2g}",
                f"{found['tarp']:.3f} ({found['tarp_null']:.3f})", f"{float(cell['seconds'].mean()):.1f}",
            ]  # fmt: skip
            lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def add_arguments(parser: OptionParser) -> None:
    """Add the options of `neurosde benchmark refined`."""
    parser.add_argument("checkpoint", nargs="?", default="base", help="file, folder or name of a trained posterior")
    add_options(parser, RefinedCalibration)
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("results/refined-calibration.nc"),
        help="data; rows in it are kept (default results/refined-calibration.nc)",
    )
    parser.set_defaults(run=run)


def run(options: Namespace) -> int:
    """Run the benchmark, or what is left of it, and print its table."""
    config = from_options(RefinedCalibration, options)
    posterior = CFGPosterior.from_pretrained(options.checkpoint, options.device)
    results = refined_calibration(posterior, config, options.out, model_label(options.checkpoint, "posterior"))
    print(markdown_table(results))
    print(
        f"\n{config.networks} networks of {config.N} neurons per ensemble, {config.trials} x {config.length} times, "
        f"{config.draws} draws, mean ± standard error; {hardware(device=posterior.device)}\nData: {options.out}"
    )
    return 0
