"""L-C2ST of a method over the tasks of `neurosde benchmark inference`.

Each network is a pair (θ, x): θ the features of W whose ranks are tested, too, x those of the mean of the Gaussian
posterior of the recording, with its evidence for the size of weights, and the sizes of the recording. All networks of
all tasks that a method has inferred train the classifiers together, since those of one task are too few, and each
network is an observation, too: a truth and the draws of its posterior are exchangeable given the recording, whichever
of the draws is the pair's, so that p-values are exact there as well (`neurosde.evaluation.local_c2st`).

As with ranks this holds where networks are drawn from the prior of the posterior that is tested. Of few networks a
classifier learns gross differences only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from neurosde.evaluation.calibration import projections
from neurosde.evaluation.inference_methods import Inferred
from neurosde.evaluation.inference_tasks import Recorded, unit
from neurosde.evaluation.local_c2st import LEAST, local_c2st
from neurosde.evaluation.posterior_benchmark import DIRECTIONS
from neurosde.models.empirical_bayes import empirical_bayes
from neurosde.models.gaussian_posterior import GaussianPosterior

OBSERVED = 15  # draws of each posterior at which classifiers are asked
PERMUTATIONS = 49  # 4 s a method; the least p is 0.02
Pairs = dict[str, list[list[float]] | list[list[list[float]]]]


def local_pairs(found: Inferred, recorded: Recorded, seed: int) -> Pairs | None:
    """Return features of truths, draws and recordings; None of a method without draws.

    Returns:
        `truths` (network, feature), `draws` (network, draw, feature), the first of which is the pair's, and
        `conditions` (network, condition).
    """
    if found.draws is None:
        return None
    task = recorded.task
    s0, N = unit(task), task.neurons
    directions = np.random.default_rng(seed).standard_normal((DIRECTIONS, N, N))
    # To be of one size whatever N is: projections and the norm grow as N, singular values and the trace as its root.
    scale = np.array([*[N] * DIRECTIONS, N, math.sqrt(N), 1 / N, math.sqrt(N)]) * s0

    def features(weights: torch.Tensor) -> np.ndarray:
        return np.moveaxis(projections(weights.double().numpy(), directions), 0, -1) / scale

    means, about = [], []
    for statistics in recorded.statistics:
        prior = empirical_bayes(statistics, noise_std=task.noise_std)
        means.append(GaussianPosterior.from_statistics(statistics, task.noise_std, prior.prior_variance).mean)
        about.append([math.log(prior.prior_variance / s0**2), math.log(N), math.log(task.times * task.trials)])
    draws = found.draws[: OBSERVED + 1].transpose(0, 1)
    return {
        "truths": features(recorded.weights).tolist(),
        "draws": features(draws).tolist(),
        "conditions": np.hstack([features(torch.stack(means)), np.array(about)]).tolist(),
    }


@dataclass(frozen=True)
class LocalTests:
    """What the test found of one method.

    Attributes:
        statistic: mean over the networks of each task, shape (task,); 0: no difference found, ¼: told for certain. NaN
            of tasks without draws.
        p: of each task's statistic, shape (task,).
        overall: p-value of the mean over all networks.
    """

    statistic: np.ndarray
    p: np.ndarray
    overall: float


def local_tests(pairs: Sequence[Mapping[str, object] | None], seed: int) -> LocalTests:
    """Test a method.

    Args:
        pairs: `local_pairs` of each task, None where there is none.
        seed: of classifiers and exchanges.

    Returns:
        The tests; NaN where there are fewer networks than a local test needs.
    """
    nothing = LocalTests(np.full(len(pairs), math.nan), np.full(len(pairs), math.nan), math.nan)
    there = [(k, one) for k, one in enumerate(pairs) if one is not None]
    if not there:
        return nothing
    truths, draws, conditions = (
        np.concatenate([np.array(one[name]) for _, one in there]) for name in ("truths", "draws", "conditions")
    )
    of_task = np.concatenate([np.full(len(np.array(one["truths"])), k) for k, one in there])
    if len(truths) < LEAST:
        return nothing
    found = local_c2st(truths, draws[:, 0], conditions, draws[:, 1:], conditions, permutations=PERMUTATIONS, seed=seed)
    statistic, p = nothing.statistic.copy(), nothing.p.copy()
    for k, _ in there:
        here = of_task == k
        statistic[k] = found.statistic[here].mean()
        p[k] = _p_value(found.statistic[here].mean(), found.null[:, here].mean(1))
    return LocalTests(statistic, p, _p_value(found.statistic.mean(), found.null.mean(1)))


def _p_value(statistic: float, null: np.ndarray) -> float:
    return float((1 + (null >= statistic).sum()) / (len(null) + 1))
