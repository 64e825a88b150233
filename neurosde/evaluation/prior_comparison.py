"""How far sampled weight matrices are from fresh draws of the ensemble that they are meant to be of.

For each statistic, d is the Wasserstein-1 distance between its empirical distributions in two sets of as many matrices.
It is never 0 between finite sets, so what counts is

    ratio = mean_r d(samples, fresh_r) / mean_{r<s} d(fresh_r, fresh_s),

1 on average where the samples are of the ensemble's law. By how much it fluctuates then is seen by leaving each fresh
set out in turn and taking it for the samples: from these ratios under the null hypothesis come the standard error and
the bound that 95 % of further ones stay below.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pandas as pd
import scipy.stats

from neurosde.evaluation.c2st import FOLDS, TwoSampleTest, c2st
from neurosde.evaluation.weight_statistics import WeightStatistics, check_matrices, weight_statistics

POOL_POINTS = 2**16  # kept of a pooled distribution: means of so many equal shares of its sorted values
SHOWN = 32  # matrices of either kind that are kept for figures
EQUAL = 1e-9  # of the largest value: distances below are rounding
MIN_SETS = 3  # one to leave out, two to compare

KINDS = ("per matrix", "pooled")


@dataclass(frozen=True)
class PriorEvaluation:
    """Results of comparing samples of a prior with its ensemble.

    Attributes:
        table: a row for each statistic: `kind` (per matrix, pooled), `ratio`, `standard_error`, `null_95`,
            `distance` (mean d to a fresh set), `floor` (mean d between fresh sets), `sampled` and `fresh` (means).
        summary: the ratio averaged over all statistics of a kind, with its own standard error and null_95.
        tests: a classifier two-sample test against each fresh set on the per-matrix statistics; empty where there are
            too few matrices for it.
        samples: statistics of the samples; pooled ones sorted, and thinned to at most `POOL_POINTS`.
        fresh: statistics of each fresh set.
        sampled_weights: the first matrices W of the samples, shape (network, post, pre).
        fresh_weights: the first matrices of the first fresh set.
    """

    table: pd.DataFrame
    summary: pd.DataFrame
    tests: list[TwoSampleTest]
    samples: WeightStatistics
    fresh: list[WeightStatistics]
    sampled_weights: np.ndarray
    fresh_weights: np.ndarray

    @property
    def c2st(self) -> TwoSampleTest:
        """Accuracy averaged over the fresh sets, with the error of a single test: all share the same samples."""
        accuracy = float(np.mean([one.accuracy for one in self.tests])) if self.tests else math.nan
        return TwoSampleTest(accuracy, math.sqrt(accuracy * (1 - accuracy) / (2 * self.count)))

    @property
    def count(self) -> int:
        """Number of matrices in each set."""
        return len(next(iter(self.samples.per_matrix.values())))


def evaluate_prior(samples: np.ndarray, fresh_sets: Iterable[np.ndarray], *, seed: int = 0) -> PriorEvaluation:
    """Compare sampled matrices with several sets of fresh draws.

    Args:
        samples: W, shape (network, post, pre).
        fresh_sets: at least three independent sets of the same shape. They may be made as they are asked for: one is in
            memory at a time.
        seed: of the classifier.

    Raises:
        ValueError: sets of other shapes or too few of them, or values that are not finite.
    """
    samples = check_matrices(samples, "the samples")
    ours = _thinned(weight_statistics(samples))
    theirs: list[WeightStatistics] = []
    shown = samples[:0]
    for number, one in enumerate(fresh_sets):
        if np.shape(one) != samples.shape:
            raise ValueError(
                f"fresh sets must have the samples' shape {samples.shape}; got {np.shape(one)} for set {number}."
            )
        fresh = check_matrices(one, f"fresh set {number}")
        shown = shown if number else fresh[:SHOWN].copy()
        theirs.append(_thinned(weight_statistics(fresh)))
    if len(theirs) < MIN_SETS:
        raise ValueError(f"a comparison takes at least {MIN_SETS} fresh sets; got {len(theirs)}. Draw more.")
    rows, ratios = {}, {}
    for kind, name, values in _distributions([ours, *theirs]):
        distances = _distances(values)
        ratio, null = _ratio(distances), _null_ratios(distances)
        rows[name] = {
            "kind": kind,
            **_row(ratio, null),
            "distance": distances[0, 1:].mean(),
            "floor": _floor(distances[1:, 1:]),
            "sampled": values[0].mean(),
            "fresh": np.mean([one.mean() for one in values[1:]]),
        }
        ratios[name] = np.array([ratio, *null])
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("statistic")
    summary = {}
    for kind in KINDS:
        means = np.mean([ratios[name] for name in table.index[table["kind"] == kind]], axis=0)
        summary[kind] = _row(means[0], means[1:])
    tests = []
    if len(samples) >= 2 * FOLDS:
        tests = [c2st(ours.table(), one.table(), seed=seed + number) for number, one in enumerate(theirs)]
    return PriorEvaluation(
        table,
        pd.DataFrame.from_dict(summary, orient="index").rename_axis("kind"),
        tests,
        ours,
        theirs,
        samples[:SHOWN].copy(),
        shown,
    )


def _thinned(statistics: WeightStatistics) -> WeightStatistics:
    return WeightStatistics(statistics.per_matrix, {name: thin(pool) for name, pool in statistics.pooled.items()})


def thin(values: np.ndarray, points: int = POOL_POINTS) -> np.ndarray:
    """Return sorted values, or the means of that many equal shares of them; Wasserstein distances hardly change."""
    ordered = np.sort(values)
    if len(ordered) <= points:
        return ordered
    edges = np.linspace(0, len(ordered), points + 1).astype(np.int64)
    return np.add.reduceat(ordered, edges[:-1]) / np.diff(edges)


def _distributions(sets: list[WeightStatistics]) -> Iterable[tuple[str, str, list[np.ndarray]]]:
    """Kind and name of each statistic, and its sorted values in each set."""
    for name in sets[0].per_matrix:
        yield KINDS[0], name, [np.sort(one.per_matrix[name]) for one in sets]
    for name in sets[0].pooled:
        yield KINDS[1], name, [one.pooled[name] for one in sets]


def _distances(values: list[np.ndarray]) -> np.ndarray:
    """Wasserstein-1 distances between sets of as many sorted values: (set, set); what is rounding is 0."""
    stacked = np.stack(values)
    found = np.array([np.abs(stacked - one).mean(1) for one in stacked])
    return np.where(found <= EQUAL * np.abs(stacked).max(), 0.0, found)


def _floor(distances: np.ndarray) -> float:
    return float(distances[np.triu_indices(len(distances), 1)].mean())


def _ratio(distances: np.ndarray) -> float:
    """Mean distance of set 0 to the others over that among the others; 1 where all are equal."""
    ours, floor = float(distances[0, 1:].mean()), _floor(distances[1:, 1:])
    if floor == 0:
        return 1.0 if ours == 0 else math.inf
    return ours / floor


def _null_ratios(distances: np.ndarray) -> list[float]:
    """The ratio of each fresh set to the other fresh ones."""
    found = []
    for k in range(1, len(distances)):
        order = [k, *(i for i in range(1, len(distances)) if i != k)]
        found.append(_ratio(distances[np.ix_(order, order)]))
    return found


def _row(ratio: float, null: Iterable[float]) -> dict[str, float]:
    """Ratio, standard error and the one-sided 95 % bound for one further log-normal ratio (Student's t: few sets)."""
    null = np.asarray(list(null))
    if not np.isfinite(null).all():
        return {"ratio": ratio, "standard_error": math.inf, "null_95": math.inf}
    logs, R = np.log(np.maximum(null, 1e-12)), len(null)
    half = float(scipy.stats.t.ppf(0.95, R - 1)) * float(logs.std(ddof=1)) * math.sqrt(1 + 1 / R)
    return {"ratio": ratio, "standard_error": float(null.std(ddof=1)), "null_95": float(np.exp(logs.mean() + half))}
