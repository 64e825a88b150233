"""Whether a posterior is as sure as it should be.

Coverage alone detects nothing: the prior itself covers as announced. It is therefore always reported beside contraction
(how much was learnt) and the distance to the exact posterior (whether it was the right thing).
"""

from __future__ import annotations

import numpy as np
from scipy.stats import chi2

LEVELS = np.round(np.arange(0.05, 1.0, 0.05), 2)
_NULL_SETS = 2000


def coverage(draws: np.ndarray, truth: np.ndarray, levels: np.ndarray = LEVELS) -> np.ndarray:
    """Share of the weights whose true value lies in the central interval of the draws, for each level.

    Args:
        draws: posterior draws (draw, post, pre).
        truth: W (post, pre).
        levels: nominal levels in (0, 1).

    Returns:
        Coverage of each level, shape (level,).
    """
    tails = (1 - np.asarray(levels)) / 2
    # Weibull's plotting positions k/(S + 1) make the expected coverage of S draws exact where (S + 1) times a tail is a
    # whole number, as for 19 or 39 draws at 0.9; 31 and 32 exact draws cover 0.908. numpy's default falls short of it.
    lower = np.quantile(draws, tails, axis=0, method="weibull")
    upper = np.quantile(draws, 1 - tails, axis=0, method="weibull")
    return ((lower <= truth) & (truth <= upper)).mean((-2, -1))


def contraction(draws: np.ndarray, prior_variance: float) -> float:
    """1 − posterior variance / prior variance, averaged over the weights."""
    return float(1 - draws.var(0, ddof=1).mean() / prior_variance)


def distance_to_exact(draws: np.ndarray, mean: np.ndarray, factor: np.ndarray) -> dict[str, float]:
    """Compare draws with the exact Gaussian posterior they should come from.

    - `mean_error`: |mean of draws − exact mean| / |exact mean|.
    - `mean_error_floor`: the same for exact draws, from their number alone.
    - `whitened_variance`: mean variance of the draws in units of the exact posterior's; 1 is exact.

    Args:
        draws: posterior draws (draw, post, pre).
        mean: exact mean (post, pre).
        factor: F (pre, direction), the exact covariance of each row being F Fᵀ.
    """
    size = np.linalg.norm(mean)
    whitened = np.linalg.solve(factor, (draws - mean).reshape(-1, mean.shape[-1]).T)
    expected = np.sqrt(len(mean) * (factor**2).sum() / len(draws))
    return {
        "mean_error": float(np.linalg.norm(draws.mean(0) - mean) / size),
        "mean_error_floor": float(expected / size),
        "whitened_variance": float((whitened**2).mean()),
    }


def truth_under_posterior(truth: np.ndarray, mean: np.ndarray, factor: np.ndarray) -> dict[str, float]:
    """Squared whitened distance of the truth, χ² with one degree per weight if the posterior is right.

    - `truth_chi2`: the distance over its degrees of freedom; 1 is expected.
    - `truth_p`: two-sided p-value.
    """
    whitened = np.linalg.solve(factor, (truth - mean).T)
    square, freedom = float((whitened**2).sum()), truth.size
    below = chi2.cdf(square, freedom)
    return {"truth_chi2": square / freedom, "truth_p": float(2 * min(below, 1 - below))}


def in_any_order(draws: np.ndarray, truth: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Relabel the neurons of each network at random, alike in its draws and its truth.

    Ensembles number neurons by their kind, all excitatory ones first, and a posterior that is equivariant to
    relabelling does not know that. Along directions, and about points, that are the same for all networks or numbered
    like them, such truths are no draws of its prior, and right posteriors would look wrong.

    Args:
        draws: posterior draws (draw, network, post, pre).
        truth: W (network, post, pre).
        seed: of the orders.

    Returns:
        Draws and truth, of the same shapes.
    """
    count, N = truth.shape[:2]
    order = np.random.default_rng(seed).permuted(np.tile(np.arange(N), (count, 1)), axis=1)

    def relabelled(weights: np.ndarray) -> np.ndarray:
        rows, columns = (order[:, :, None], order[:, None, :])
        if weights.ndim > truth.ndim:
            rows, columns = rows[None], columns[None]
        return np.take_along_axis(np.take_along_axis(weights, rows, axis=-2), columns, axis=-1)

    return relabelled(draws), relabelled(truth)


def projections(weights: np.ndarray, directions: np.ndarray) -> np.ndarray:
    """One-dimensional features of W whose ranks are tested.

    Args:
        weights: W, shape (..., post, pre).
        directions: matrices A (direction, post, pre); features are Σ_ij A_ij W_ij.

    Returns:
        The projections, then |W|, the largest singular value, the mean and the trace, shape (feature, ...).
    """
    of_directions = np.einsum("kij,...ij->k...", directions, weights)
    singular = np.linalg.norm(weights, 2, axis=(-2, -1))
    others = [np.linalg.norm(weights, axis=(-2, -1)), singular, weights.mean((-2, -1)), weights.trace(0, -2, -1)]
    return np.concatenate([of_directions, np.stack(others)])


def ranks(draws: np.ndarray, truth: np.ndarray, directions: np.ndarray, seed: int = 0) -> np.ndarray:
    """Ranks of the truth's features among those of draws; ties, which sparse weights make, are broken at random.

    Args:
        draws: posterior draws (draw, network, post, pre).
        truth: W (network, post, pre).
        directions: see `projections`.
        seed: of the ties.

    Returns:
        Number of draws below the truth, shape (feature, network).
    """
    of_draws, of_truth = projections(draws, directions), projections(truth, directions)[:, None]
    ties = (of_draws == of_truth).sum(1)
    return (of_draws < of_truth).sum(1) + np.random.default_rng(seed).integers(ties + 1)


def holm(p: np.ndarray) -> np.ndarray:
    """P-values adjusted for their number by Holm's method, in the same order.

    References:
        A simple sequentially rejective multiple test procedure (Holm, 1979), https://www.jstor.org/stable/4615733
    """
    order = np.argsort(p)
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(stepped, 1.0)
    return adjusted


def expected_coverage(draws: np.ndarray, truth: np.ndarray, references: np.ndarray) -> np.ndarray:
    """Credibility of each truth in the balls about random points (TARP): uniform if the posteriors are right.

    Args:
        draws: posterior draws (draw, network, post, pre).
        truth: W (network, post, pre).
        references: points that depend on no truth, of the same shape; see `in_any_order`.

    Returns:
        Share of the draws that are nearer to the network's reference than the truth is, shape (network,).

    References:
        Sampling-based accuracy testing of posterior estimators for general inference (Lemos, Coogan, Hezaveh,
        Perreault-Levasseur, 2023), https://arxiv.org/abs/2302.03026
    """
    of_truth = np.linalg.norm(truth - references, axis=(-2, -1))
    of_draws = np.linalg.norm(draws - references, axis=(-2, -1))
    return (of_draws < of_truth).mean(0)


def coverage_error(credibility: np.ndarray) -> float:
    """Mean |expected coverage − level| over all levels, of credibilities that should be uniform in [0, 1]."""
    ordered = np.sort(credibility)
    levels = np.linspace(0, 1, 1001)
    return float(np.abs(np.searchsorted(ordered, levels, side="right") / len(ordered) - levels).mean())


def coverage_error_of_exact(count: int, draws: int, level: float = 0.95) -> float:
    """Return what the share `level` of exact posteriors' coverage errors stays below, by simulation.

    Args:
        count: number of networks.
        draws: number of draws of each, among which credibilities are uniform.
        level: of the quantile.
    """
    null = np.random.default_rng(0).integers(draws + 1, size=(_NULL_SETS, count)) / draws
    return float(np.quantile([coverage_error(one) for one in null], level))
