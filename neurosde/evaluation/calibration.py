"""Whether a posterior is as sure as it should be.

Coverage alone detects nothing: the prior itself covers as announced. It is therefore always reported beside contraction
(how much was learnt) and the distance to the exact posterior (whether it was the right thing).
"""

from __future__ import annotations

import numpy as np
from scipy.stats import chi2

LEVELS = np.round(np.arange(0.05, 1.0, 0.05), 2)


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
    # Weibull's plotting positions k/(S + 1) make the expected coverage of S draws exact; numpy's default falls short.
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
