"""Local classifier two-sample test: is the posterior right for this recording?

A classifier is trained on pairs (θ, x): θ the truth that x was simulated from in the one class, a draw of the
posterior given x in the other. At an observation x_o its chance d that a draw is one of the posterior is ½ if the
posterior there is right; the statistic is the mean of (d − ½)² over draws of the posterior given x_o, for which no
truth is needed. What it would be by chance is found by training again on pairs whose classes were exchanged at random.
If posteriors are right everywhere, truth and draw of a pair are exchangeable given x, so that the p-value is exact
whatever the classifier learns: p ≤ α with probability α at most. Where one is wrong only elsewhere a small p-value can
still be had, since a classifier is smooth: the statistic, and not the p-value, says where it is wrong most.

Both θ and x stand for features of weights and recording, few enough for a classifier to learn from the pairs there are.

References:
    L-C2ST: local diagnostics for posterior approximations in simulation-based inference (Linhart, Gramfort, Rodrigues,
    2023), https://arxiv.org/abs/2306.03580
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from neurosde.evaluation.perceptrons import HELD_BACK, STEPS, Perceptrons, train_perceptrons
from neurosde.validation import check_count

LEAST = 2 * HELD_BACK  # pairs
DECAY = 0.1  # of weights; with 1 a posterior half as wide as the right one is hardly told from it


@dataclass(frozen=True)
class LocalTest:
    """What a local classifier two-sample test found.

    Attributes:
        statistic: mean of (d − ½)² at each observation, shape (observation,); 0: no difference, ¼: told for certain.
        null: the same with classes exchanged at random, shape (permutation, observation).
        p: p-value at each observation, shape (observation,); adjust them for their number (`calibration.holm`).
    """

    statistic: np.ndarray
    null: np.ndarray
    p: np.ndarray


def local_c2st(
    truths: np.ndarray,
    draws: np.ndarray,
    conditions: np.ndarray,
    observed_draws: np.ndarray,
    observed_conditions: np.ndarray,
    *,
    permutations: int = 99,
    seed: int = 0,
) -> LocalTest:
    """Test posteriors at observations, given simulations of the prior and one posterior draw for each.

    Args:
        truths: features of the truths, shape (pair, feature).
        draws: features of one posterior draw given each simulation, in the same shape.
        conditions: features of the simulations, shape (pair, condition).
        observed_draws: features of posterior draws given each observation, shape (observation, draw, feature).
        observed_conditions: features of the observations, shape (observation, condition).
        permutations: number of times that classes are exchanged; the smallest p-value is 1/(permutations + 1).
        seed: of exchanges, initial weights and batches.

    Raises:
        ValueError: shapes that do not fit, too few pairs, or values that are not finite.
    """
    arrays = [np.asarray(one, dtype=np.float64) for one in (truths, draws, conditions)]
    at = [np.asarray(one, dtype=np.float64) for one in (observed_draws, observed_conditions)]
    _check(arrays, at)
    check_count(permutations, "permutations")
    pairs = len(arrays[0])
    rows = np.concatenate([np.hstack([arrays[0], arrays[2]]), np.hstack([arrays[1], arrays[2]])])
    centre, spread = rows.mean(0), rows.std(0)
    unit = np.where(spread > 1e-9 * np.abs(rows).max(0), spread, np.inf)
    features = torch.from_numpy((rows - centre) / unit).float()

    generator = torch.Generator().manual_seed(seed)
    exchanged = torch.rand(permutations + 1, pairs, generator=generator) < 0.5
    exchanged[0] = False
    labels = torch.cat([exchanged, ~exchanged], dim=1).float()
    order = torch.randperm(pairs, generator=generator)  # both of a pair are trained on, or held back
    back = pairs // HELD_BACK
    held, train = (torch.cat([part, part + pairs]).expand(len(labels), -1) for part in (order[:back], order[back:]))
    network = Perceptrons(len(labels), features.shape[1], generator)
    train_perceptrons(network, features, labels, train, held, generator, decay=DECAY, patience=STEPS)
    statistics = np.empty((permutations + 1, len(at[0])))
    for k, (of_draws, condition) in enumerate(zip(*at, strict=True)):
        here = np.hstack([of_draws, np.tile(condition, (len(of_draws), 1))])
        standardised = torch.from_numpy((here - centre) / unit).float()
        with torch.no_grad():
            chance = network(standardised.expand(len(labels), *standardised.shape)).sigmoid().double()
        statistics[:, k] = (chance - 0.5).square().mean(-1).numpy()
    found, null = statistics[0], statistics[1:]
    return LocalTest(found, null, (1 + (null >= found).sum(0)) / (permutations + 1))


def _check(arrays: list[np.ndarray], at: list[np.ndarray]) -> None:
    truths, draws, conditions = arrays
    if truths.ndim != 2 or truths.shape != draws.shape or conditions.ndim != 2 or len(conditions) != len(truths):
        raise ValueError(
            "truths and draws must be (pair, feature) of one shape, and conditions (pair, condition); got "
            f"{truths.shape}, {draws.shape} and {conditions.shape}."
        )
    observed, where = at
    size, about = truths.shape[1], conditions.shape[1]
    if observed.ndim != 3 or observed.shape[2] != size or where.shape != (len(observed), about):
        raise ValueError(
            f"observed_draws must be (observation, draw, {size}) and observed_conditions (observation, {about}); got "
            f"{observed.shape} and {where.shape}."
        )
    if len(truths) < LEAST:
        raise ValueError(f"a local test needs at least {LEAST} pairs; got {len(truths)}.")
    if not all(np.isfinite(one).all() for one in (*arrays, *at)):
        raise ValueError("features must be finite; got NaN or infinite values. Leave those pairs out.")
