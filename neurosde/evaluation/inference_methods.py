"""What `neurosde benchmark inference` compares: estimates of W, and posteriors.

All methods know τ, dt and σ; the gain is told to `exact`, `prior` and the methods of sbi only, the ensemble to `prior`,
`cfg-told` and those of sbi. Draws of the prior have neurons in the ensemble's order, so that with Dale's law and with
clusters the prior and those of sbi know which neurons inhibit and which belong together; no other method does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neurosde.datasets.ensembles import Gaussian
from neurosde.evaluation.covariance_methods import lagged_covariance_estimate, precision_estimate
from neurosde.evaluation.curbd import curbd
from neurosde.evaluation.inference_tasks import DT, Recorded
from neurosde.evaluation.sbi_baselines import SBI_METHODS, sbi_draws
from neurosde.models.diffusion_cfg import CFGPosterior
from neurosde.models.empirical_bayes import empirical_bayes, least_squares, ridge
from neurosde.models.gaussian_posterior import GaussianPosterior
from neurosde.models.refiner_options import Refiner
from neurosde.models.split_gibbs import NEAR_RHO, NEAR_SWEEPS

METHODS = {
    "least-squares": "least squares",
    "ridge": "ridge (cross-validation)",
    "covariance": "lagged covariances",
    "precision": "inverse covariance",
    "curbd": "CURBD",
    "gaussian": "Gaussian posterior (evidence)",
    "exact": "Gaussian posterior, told the gain",
    "prior": "prior, told ensemble and gain",
    "cfg": "trained posterior",
    "cfg-told": "trained posterior, told the ensemble",
    "cfg-gibbs": "trained posterior, refined (split Gibbs)",
    "cfg-mmps": "trained posterior, refined (MMPS)",
    "cfg-pigdm": "trained posterior, refined (ΠGDM)",
    "npe": "NPE (sbi), told ensemble and gain",
    "npse": "NPSE (sbi), told ensemble and gain",
    "fmpe": "FMPE (sbi), told ensemble and gain",
}
TRAINED = tuple(name for name in METHODS if name.startswith("cfg"))
DEFAULT = tuple(name for name in METHODS if name not in (*SBI_METHODS, "cfg-mmps", "cfg-pigdm"))


@dataclass(frozen=True)
class Inferred:
    """What a method says of each network.

    Attributes:
        estimate: Ŵ (seed, post, pre).
        draws: of the posterior, shape (draw, seed, post, pre); None of a method without one.
        densities: the posterior of each network, of a method whose posteriors are Gaussian.
    """

    estimate: Tensor
    draws: Tensor | None = None
    densities: list[GaussianPosterior] | None = None


def infer_by(
    method: str, recorded: Recorded, *, draws: int, seed: int, simulations: int, checkpoint: str = "base"
) -> Inferred:
    """Infer all networks of a task.

    Args:
        method: one of `METHODS`.
        recorded: the recordings.
        draws: of each posterior.
        seed: of the draws.
        simulations: that methods of sbi are trained on.
        checkpoint: file, folder or name of the trained posterior.

    Raises:
        ValueError: an unknown method.
        ImportError: sbi is not installed.
        FloatingPointError: a guidance diverged.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {method!r}.")
    if method in TRAINED:
        return _trained(method, recorded, draws, seed, CFGPosterior.from_pretrained(checkpoint))
    if method in SBI_METHODS:
        task = recorded.task
        found = sbi_draws(
            method, task.kind, recorded.statistics, noise_std=task.noise_std, dt=DT, trials=task.trials, T=task.times,
            simulations=simulations, draws=draws, seed=seed,
        )  # fmt: skip
        return Inferred(found.mean(1), found.transpose(0, 1))
    if method == "prior":
        task = recorded.task
        source = torch.Generator().manual_seed(seed)
        found = task.kind.sample_weights(draws * len(recorded.seeds), task.neurons, source)
        found = found.view(draws, len(recorded.seeds), task.neurons, task.neurons)
        prior = None
        if isinstance(task.kind, Gaussian):
            s0, eye = math.sqrt(task.kind.variance(task.neurons)), torch.eye(task.neurons, dtype=torch.float64)
            prior = GaussianPosterior(0 * eye, eye, s0 * eye.diagonal(), s0**2, task.noise_std)
        return Inferred(found.mean(0), found, None if prior is None else [prior] * len(recorded.seeds))
    if method in ("gaussian", "exact"):
        posteriors = [_gaussian(recorded, k, told=method == "exact") for k in range(len(recorded.seeds))]
        return Inferred(
            torch.stack([one.mean for one in posteriors]),
            torch.stack([one.sample((draws,), seed + k) for k, one in enumerate(posteriors)], 1),
            posteriors,
        )
    return Inferred(torch.stack([_ESTIMATES[method](recorded, k) for k in range(len(recorded.seeds))]))


def _gaussian(recorded: Recorded, k: int, *, told: bool) -> GaussianPosterior:
    task, statistics = recorded.task, recorded.statistics[k]
    variance = task.kind.variance(task.neurons) if told else None
    found = empirical_bayes(statistics, noise_std=task.noise_std, prior_variance=variance)
    return GaussianPosterior.from_statistics(statistics, task.noise_std, found.prior_variance)


def _trained(method: str, recorded: Recorded, draws: int, seed: int, model: CFGPosterior) -> Inferred:
    task = recorded.task
    family = task.ensemble if method == "cfg-told" and task.ensemble in model.families else None
    posterior = model.condition(recorded.statistics, noise_std=task.noise_std, family=family)
    found = posterior.sample((draws,), generator=seed)
    if method not in _REFINERS:
        return Inferred(posterior.mean, found)
    refined = []
    near: dict[str, Any] = {"sweeps": NEAR_SWEEPS, "rho": NEAR_RHO} if _REFINERS[method] == "gibbs" else {}
    for k, statistics in enumerate(recorded.statistics):
        alone = model.condition(statistics, noise_std=task.noise_std)
        one = alone.refine(found[:, k], method=_REFINERS[method], **near, generator=seed + k)
        if bool(one.diverged.any()):
            raise FloatingPointError(f"{method} diverges for {int(one.diverged.sum())} of {draws} draws.")
        refined.append(one.draws)
    found = torch.stack(refined, 1)
    return Inferred(found.mean(0), found)


def _covariance(recorded: Recorded, k: int) -> Tensor:
    return torch.from_numpy(lagged_covariance_estimate(recorded.activity[k], DT))


def _precision(recorded: Recorded, k: int) -> Tensor:
    return torch.from_numpy(precision_estimate(recorded.activity[k], DT, noise_std=recorded.task.noise_std))


def _curbd(recorded: Recorded, k: int) -> Tensor:
    return torch.as_tensor(curbd(recorded.activity[k], DT).weights, dtype=torch.float64)


_REFINERS: dict[str, Refiner] = {"cfg-gibbs": "gibbs", "cfg-mmps": "mmps", "cfg-pigdm": "pigdm"}
_ESTIMATES: dict[str, Callable[[Recorded, int], Tensor]] = {
    "least-squares": lambda recorded, k: least_squares(recorded.statistics[k]),
    "ridge": lambda recorded, k: ridge(recorded.statistics[k]),
    "covariance": _covariance,
    "precision": _precision,
    "curbd": _curbd,
}
