"""What `neurosde benchmark inference` measures of each method, task and network."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from neurosde.evaluation.calibration import contraction, coverage, expected_coverage, in_any_order, ranks
from neurosde.evaluation.dynamics import fixed_point_distance, fixed_points
from neurosde.evaluation.exact_benchmark import RESOLUTION
from neurosde.evaluation.exact_reference import compared_with_exact, exact_reference
from neurosde.evaluation.inference_methods import Inferred
from neurosde.evaluation.inference_tasks import DT, Recorded, unit
from neurosde.evaluation.page_table import Sense
from neurosde.evaluation.posterior_benchmark import DIRECTIONS, FEATURES
from neurosde.evaluation.predictive import held_out_log_likelihood, statistics
from neurosde.evaluation.recovery import SENSES, point_metrics
from neurosde.evaluation.scores import crps, energy_score, log_score
from neurosde.likelihood import transitions
from neurosde.lyapunov import lyapunov_exponents
from neurosde.models.inference import CHECKED_DRAWS
from neurosde.rate_sde import RateSDE
from neurosde.residuals import residual_checks
from neurosde.solve import simulate_rate_network

RANKS = tuple(f"rank of {feature}" for feature in FEATURES)
METRICS: dict[str, tuple[str, Sense]] = {
    **{name: (name.replace("_", " "), sense) for name, sense in SENSES.items()},
    "edge_auc": ("area under the curve of edges", "higher"),
    "sign_accuracy": ("share of right signs", "higher"),
    "singular_value_error": ("singular value error", "lower"),
    "activity_distance": ("distance of activity statistics, mean |log ratio|", "lower"),
    "lyapunov_error": ("error of the largest Lyapunov exponent, 1/tau", "lower"),
    "fixed_point_distance": ("distance of the fixed points, rates", "lower"),
    "held_out": ("log-likelihood of a held-out trial, nats per transition", "higher"),
    "misfit": ("largest score of the residuals", "lower"),
    "energy_score": ("energy score, relative", "lower"),
    "crps": ("mean CRPS over s0", "lower"),
    "log_score": ("mean log density of a weight in units of s0", "higher"),
    "coverage_90": ("coverage of the 90 % intervals", None),
    "contraction": ("contraction", "higher"),
    "to_exact": ("distance of the mean from the exact one, relative", "lower"),
    "sd_ratio": ("standard deviation over the exact one", 1.0),
    "least_variance": ("least variance along a direction over the exact one", 1.0),
    "largest_variance": ("largest variance along a direction over the exact one", 1.0),
    "kl": ("KL of normal laws from the exact posterior, nats a weight", "lower"),
    "kl_floor": ("the same of exact draws", None),
    "c2st_mlp": ("C2ST, perceptron", 0.5),
    "c2st_forest": ("C2ST, random forest", 0.5),
    "c2st_ratio": ("C2ST, ratio of densities", 0.5),
    "credibility": ("credibility of the truth about a random point", None),
    **{name: (f"{name}, share of draws below", None) for name in RANKS},
    "seconds": ("seconds a network", "lower"),
    "memory": ("memory beyond what there was, MB", "lower"),
}
_OF_DRAWS = "NaN of methods without draws"
_OF_EXACT = (
    "NaN where the exact posterior is not known: with Dale's law and clusters, of more neurons than chains are run "
    "for, and where chains did not mix"
)
MISSING = {
    "edge_auc": "NaN where no true weight is zero",
    "activity_distance": "NaN where a statistic is 0, as of activity at rest",
    "fixed_point_distance": "NaN where none is found of the network or of its estimate",
    **dict.fromkeys(("misfit", "energy_score", "crps", "log_score", "coverage_90", "contraction"), _OF_DRAWS),
    **dict.fromkeys(("credibility", *RANKS), _OF_DRAWS),
    "to_exact": _OF_EXACT,
    **dict.fromkeys(("sd_ratio", "least_variance", "largest_variance"), f"{_OF_DRAWS}; {_OF_EXACT}"),
    **dict.fromkeys(
        ("kl", "kl_floor"), f"{_OF_DRAWS}, of fewer than N + 3, and where a row does not vary; {_OF_EXACT}"
    ),
    **dict.fromkeys(("c2st_mlp", "c2st_forest"), f"{_OF_DRAWS}, and of fewer than 10; {_OF_EXACT}"),
    "c2st_ratio": f"NaN where one of both densities is not known in closed form; {_OF_EXACT}",
}  # why a metric is NaN, beside guidances that diverged, of which only costs are known
DYNAMIC_DRAWS = 4  # whose Lyapunov exponents and activity are averaged
POINT_DRAWS = 2  # whose fixed points are found
STARTS = 32  # of Newton's method
POSITIVE = (
    "spread of mean rates",
    "variance",
    "spread of variances",
    "rms covariance",
    "autocorrelation time",
    "dimension",
)  # statistics of activity whose ratios mean something


def measured(found: Inferred, recorded: Recorded, seed: int) -> dict[str, list[float]]:
    """Return each metric that a method has, of each network.

    The largest Lyapunov exponent and the fixed points are those of some draws, for a mean of draws is a network that
    shrinks more than any of them: `lyapunov_error` is |mean exponent of draws − true one|, `fixed_point_distance` the
    mean of `dynamics.fixed_point_distance` over draws. Of a method without draws they are those of its estimate.
    `activity_distance` is the mean over statistics of activity of |log ratio|: of activity simulated with some draws,
    or with the estimate, from the recording's initial states with noise of its own, over that of the recording.
    `misfit` is the largest of the scores by which `neurosde infer` warns (`neurosde.residuals`), of draws: a normal
    number of right posteriors, and one beyond 5 makes it warn.
    """
    truth, task = recorded.weights.numpy(), recorded.task
    estimates = found.estimate.double().numpy()
    rows: list[dict[str, float]] = [point_metrics(one, W) for one, W in zip(estimates, truth, strict=True)]
    drawn = found.estimate[None] if found.draws is None else found.draws
    apart = _lyapunov(drawn[:DYNAMIC_DRAWS]).mean(0) - _lyapunov(recorded.weights)
    s0 = unit(task)
    draws = None if found.draws is None else found.draws.double().numpy()
    for k, row in enumerate(rows):
        row["activity_distance"] = activity_distance(drawn[:DYNAMIC_DRAWS, k], recorded, k, seed)
        row["lyapunov_error"] = abs(float(apart[k]))
        row["fixed_point_distance"] = _fixed_points_apart(drawn[:POINT_DRAWS, k], recorded.weights[k])
        weights = estimates[k] if draws is None else draws[:, k]
        row["held_out"] = held_out_log_likelihood(weights, recorded.held_out[k], task.noise_std)
        if found.draws is not None and draws is not None:
            row |= {
                "misfit": _misfit(found.draws[:CHECKED_DRAWS, k], recorded, k),
                "energy_score": energy_score(draws[:, k], truth[k]),
                "crps": float(crps(draws[:, k], truth[k]).mean()) / s0,
                "log_score": float(log_score(draws[:, k], truth[k], RESOLUTION * s0, seed).mean()) + math.log(s0),
                "coverage_90": float(coverage(draws[:, k], truth[k], np.array([0.9]))[0]),
                "contraction": contraction(draws[:, k], s0**2),
            }
    reference = exact_reference(task, recorded.seeds)
    if reference is not None:
        compared = compared_with_exact(found.estimate, found.draws, found.densities, reference, seed)
        rows = [row | other for row, other in zip(rows, compared, strict=True)]
    names = [name for name in METRICS if any(name in row for row in rows)]
    metrics = {name: [row.get(name, math.nan) for row in rows] for name in names}
    if draws is not None:
        metrics |= _calibration(draws, truth, seed)
    return metrics


def activity_distance(drawn: Tensor, recorded: Recorded, k: int, seed: int) -> float:
    """Mean |log ratio| of statistics of simulated activity and of the k-th recording; NaN where one of them is 0.

    Args:
        drawn: W (draw, post, pre), whose activity's statistics are averaged.
        recorded: the recordings.
        k: which of them.
        seed: of the noise.
    """
    voltage, noise_std = recorded.voltage[k], recorded.task.noise_std
    activity = simulate_rate_network(
        drawn.to(voltage).unsqueeze(1), voltage[:, 0], voltage.shape[1], DT, 1.0, noise_std=noise_std, generator=seed
    )
    of_draws = [statistics(one, DT) for one in activity.numpy()]
    true = statistics(recorded.activity[k].numpy(), DT)
    pairs = np.array([(np.mean([one[name] for one in of_draws]), true[name]) for name in POSITIVE])
    if not (np.isfinite(pairs).all() and (pairs > 0).all()):
        return math.nan
    return float(np.abs(np.diff(np.log(pairs))).mean())


def _calibration(draws: np.ndarray, truth: np.ndarray, seed: int) -> dict[str, Any]:
    draws, truth = in_any_order(draws, truth, seed)
    directions = np.random.default_rng(seed).standard_normal((DIRECTIONS, *truth.shape[1:]))
    of_truth = ranks(draws, truth, directions, seed) / len(draws)
    found = {name: row.tolist() for name, row in zip(RANKS, of_truth, strict=True)}
    return found | {"credibility": expected_coverage(draws, truth, np.roll(truth, 1, axis=0)).tolist()}


def _misfit(draws: Tensor, recorded: Recorded, k: int) -> float:
    s = recorded.statistics[k].noise_scale(recorded.task.noise_std)
    of_recording = transitions(voltage=recorded.voltage[k], dt=DT)
    checks = residual_checks(of_recording, draws.double(), torch.full((len(draws),), s))
    return max(abs(check.score) for check in checks)


def _fixed_points_apart(drawn: Tensor, truth: Tensor) -> float:
    true = fixed_points(RateSDE(truth.double()), STARTS)
    return sum(fixed_point_distance(fixed_points(RateSDE(W.double()), STARTS), true) for W in drawn) / len(drawn)


def _lyapunov(weights: Tensor) -> Tensor:
    return lyapunov_exponents(RateSDE(weights.double()), time=200.0)[..., 0]
