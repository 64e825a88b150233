"""Simulation-based calibration as a curve: ranks' distribution function within simultaneous bands.

If posteriors are right the rank of a truth's feature among S draws is uniform on 0 … S. Of n networks, the number of
ranks below k is then binomial with chance z = k/(S + 1), for every k, and from one k to a later one it grows by a
binomial share of what is left. That Markov chain gives the probability that the whole curve stays within a band
exactly: the band's pointwise level is the largest for which it does with the wanted probability, and the same
probability, at the level of the curve's own most extreme point, is a p-value.

References:
    Validating Bayesian inference algorithms with simulation-based calibration (Talts, Betancourt, Simpson, Vehtari,
    Gelman, 2018), https://arxiv.org/abs/1804.06788
    Graphical test for discrete uniformity and its applications in goodness-of-fit evaluation and multiple sample
    comparison (Säilynoja, Bürkner, Vehtari, 2022), https://arxiv.org/abs/2103.10522
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy.special import gammaln
from scipy.stats import binom

from neurosde.validation import check_count

POINTS = 100  # at most
HALVINGS = 20


@dataclass(frozen=True)
class RankCurves:
    """Distribution functions of ranks, and where those of uniform ranks lie.

    Attributes:
        levels: chance z of a uniform rank to be lower, shape (point,).
        curves: share of the networks whose rank is lower, shape (feature, point).
        lower: lower end of the simultaneous band, shape (point,).
        upper: upper end, shape (point,).
        p: p-value of each feature, shape (feature,); adjust them for their number (`calibration.holm`).
    """

    levels: np.ndarray
    curves: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    p: np.ndarray

    @property
    def inside(self) -> np.ndarray:
        """Whether the whole curve is within the band, shape (feature,)."""
        return np.asarray(((self.lower <= self.curves) & (self.curves <= self.upper)).all(-1))


def uniformity(ranks: np.ndarray, draws: int) -> np.ndarray:
    """P-values of the hypothesis that ranks of the truth among draws are uniform, exact for any number of networks.

    Args:
        ranks: number of draws below the truth, 0 … `draws`, shape (feature, network); see `calibration.ranks`.
        draws: number of draws, independent ones.

    Returns:
        One p-value for each feature, shape (feature,); adjust them for their number (`calibration.holm`).

    Raises:
        ValueError: ranks out of range.
    """
    ranks = _checked(ranks, draws)
    z, counts = _counts(ranks, draws)
    n = ranks.shape[1]
    tails = _tails(n, tuple(z))[counts, np.arange(len(z))].min(-1)
    extremes, of_feature = np.unique(tails, return_inverse=True)  # as many features have the same
    p = np.array([1 - _inside(*_interval(n, z, tail * (1 + 1e-9)), n, z) for tail in extremes])
    return np.asarray(np.clip(p, 0, 1)[of_feature])


def rank_curves(ranks: np.ndarray, draws: int, level: float = 0.95) -> RankCurves:
    """Distribution functions of ranks with simultaneous bands and p-values of uniformity.

    Args:
        ranks: number of draws below the truth, 0 … `draws`, shape (feature, network); see `calibration.ranks`.
        draws: number of draws, independent ones.
        level: probability that the curve of uniform ranks is everywhere within the band. As counts are whole numbers,
            the band's own probability is the next larger one that there is.

    Raises:
        ValueError: ranks out of range, or a level that is not between 0 and 1.
    """
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1; got {level}.")
    ranks = _checked(ranks, draws)
    z, counts = _counts(ranks, draws)
    n = ranks.shape[1]
    lower, upper = _band(n, tuple(z), level)
    return RankCurves(z, counts / n, lower / n, upper / n, uniformity(ranks, draws))


def _checked(ranks: np.ndarray, draws: int) -> np.ndarray:
    check_count(draws, "draws")
    ranks = np.asarray(ranks)
    if ranks.ndim != 2 or ranks.shape[1] == 0 or ranks.min() < 0 or ranks.max() > draws:
        raise ValueError(f"ranks must be (feature, network), between 0 and {draws}; got shape {ranks.shape}.")
    return ranks


def _counts(ranks: np.ndarray, draws: int) -> tuple[np.ndarray, np.ndarray]:
    """Points z (point,), and the number of lower ranks at each, shape (feature, point)."""
    cuts = np.unique(np.linspace(1, draws, min(draws, POINTS)).round().astype(int))
    return cuts / (draws + 1), (ranks[..., None] < cuts).sum(1)


@lru_cache(maxsize=64)
def _band(n: int, levels: tuple[float, ...], level: float) -> tuple[np.ndarray, np.ndarray]:
    """Least and largest count at each point, of the narrowest band that holds all with the probability `level`."""
    z = np.array(levels)
    low, high = (1 - level) / len(z), 1.0  # Bonferroni's inequality
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if _inside(*_interval(n, z, middle), n, z) >= level:
            low = middle
        else:
            high = middle
    return _interval(n, z, low)


@lru_cache(maxsize=8)
def _tails(n: int, levels: tuple[float, ...]) -> np.ndarray:
    """Two-sided pointwise p-value of each count at each point, shape (count, point)."""
    counts, z = np.arange(n + 1)[:, None], np.array(levels)
    return 2 * np.minimum(binom.cdf(counts, n, z), binom.sf(counts - 1, n, z))


def _interval(n: int, z: np.ndarray, tail: float) -> tuple[np.ndarray, np.ndarray]:
    """Least and largest count whose two-sided pointwise p-value is above `tail`."""
    above = _tails(n, tuple(z)) > tail
    some = above.any(0)
    return np.where(some, above.argmax(0), 0), np.where(some, n - above[::-1].argmax(0), -1)


def _inside(lower: np.ndarray, upper: np.ndarray, n: int, z: np.ndarray) -> float:
    """Probability that the counts of n uniform ranks lie within lower … upper at every point."""
    log_factorial = gammaln(np.arange(n + 1) + 1.0)
    before, chance = np.array([0]), np.array([1.0])
    reached = 0.0
    for low, high, at in zip(lower, upper, z, strict=True):
        if low > high:
            return 0.0
        after = np.arange(low, high + 1)
        share = (at - reached) / (1 - reached)
        grown = after[:, None] - before
        possible = grown >= 0
        grown = np.where(possible, grown, 0)
        log_chance = (
            log_factorial[n - before] - log_factorial[grown] - log_factorial[n - after][:, None]
            + grown * np.log(share) + (n - after)[:, None] * np.log1p(-share)
        )  # fmt: skip
        chance = np.exp(np.where(possible, log_chance, -np.inf)) @ chance
        before, reached = after, at
    return float(chance.sum())
