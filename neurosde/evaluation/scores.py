"""Scores of posterior draws against the truth, and distances of draws from those of the exact posterior.

A score is proper: in expectation over truths, no posterior scores better than the right one. Energy and continuous
ranked probability score are distances, smaller is better, of one unit with W; the log score is a density, larger is
better.

- Energy score: E|W_s − W| − ½ E|W_s − W_s'| in the Frobenius norm, over independent draws of the posterior.
- Continuous ranked probability score (CRPS): the same of every entry by itself; it is also the average over all levels
  of the interval score (twice the integral of the quantile loss).
- Log score: log density of the truth under the marginal law of every entry.

References:
    Strictly proper scoring rules, prediction, and estimation (Gneiting, Raftery, 2007),
    https://doi.org/10.1198/016214506000001437
    Fair scores for ensemble forecasts (Ferro, 2014), https://doi.org/10.1002/qj.2270
"""

from __future__ import annotations

import math

import numpy as np
from scipy.special import logsumexp, psi

from neurosde.validation import check_positive


def energy_score(draws: np.ndarray, truth: np.ndarray) -> float:
    """Energy score of the whole matrix over |W|; draws that are all 0 score 1, those that are all W score 0.

    Without bias for any number of draws: their mean distance is taken over pairs of different ones.

    Args:
        draws: posterior draws (draw, post, pre).
        truth: W (post, pre).

    Raises:
        ValueError: shapes that do not fit, fewer than two draws, or a truth that is zero.
    """
    draws, truth = _checked(draws, truth)
    size = np.linalg.norm(truth)
    if size == 0:
        raise ValueError("the true weights are all zero, so that no relative score exists.")
    S = len(draws)
    from_truth = np.linalg.norm(draws - truth, axis=(-2, -1)).mean()
    centred = (draws - draws.mean(0)).reshape(S, -1)
    squares = (centred**2).sum(-1)
    apart = np.sqrt(np.maximum(squares[:, None] + squares - 2 * centred @ centred.T, 0))
    np.fill_diagonal(apart, 0)
    return float((from_truth - 0.5 * apart.sum() / (S * (S - 1))) / size)


def crps(draws: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Continuous ranked probability score of each weight, without bias for any number of draws.

    Args:
        draws: posterior draws (draw, post, pre).
        truth: W (post, pre).

    Returns:
        The scores, in the unit of W, shape (post, pre).

    Raises:
        ValueError: shapes that do not fit, or fewer than two draws.
    """
    draws, truth = _checked(draws, truth)
    S = len(draws)
    # Σ_{s<s'} |W_s − W_s'| of sorted draws: the k-th smallest is above k others and below S − 1 − k.
    above = 2 * np.arange(S) - (S - 1.0)
    apart = np.tensordot(above, np.sort(draws, axis=0), 1)
    return np.abs(draws - truth).mean(0) - apart / (S * (S - 1))


def log_score(draws: np.ndarray, truth: np.ndarray, resolution: float, seed: int = 0) -> np.ndarray:
    """Log density of each true weight under its marginal law, at a resolution.

    As in `neurosde.evaluation.exact_benchmark`, truth and posterior are both blurred by normal noise of the resolution,
    so that sparse weights have a density. That of the posterior is estimated from its draws by a normal kernel whose
    variance is that of the blur and of Silverman's bandwidth together. A kernel, and not a normal law of their mean and
    variance: the marginals of sparse, Dale's and clustered weights have spikes and edges, which are what those
    posteriors know. Silverman's bandwidth is 0 where half of the draws are one value, so that a spike stays one. Unlike
    the joint density, the marginal ones do not see whether correlations are right.

    Args:
        draws: posterior draws (draw, post, pre).
        truth: W (post, pre).
        resolution: standard deviation of the blur, in the unit of W; 0.05 g/√N, say.
        seed: of the noise on the truth.

    Returns:
        Log density in nats, shape (post, pre).

    Raises:
        ValueError: shapes that do not fit, fewer than two draws, or a resolution that is not positive.

    References:
        Density estimation for statistics and data analysis (Silverman, 1986), equation 3.31,
        https://doi.org/10.1201/9781315140919
    """
    draws, truth = _checked(draws, truth)
    resolution = check_positive(resolution, "resolution")
    S = len(draws)
    blurred = truth + resolution * np.random.default_rng(seed).standard_normal(truth.shape)
    low, high = np.quantile(draws, [0.25, 0.75], axis=0)
    spread = np.minimum(draws.std(0, ddof=1), (high - low) / 1.349)
    variance = resolution**2 + (0.9 * spread * S**-0.2) ** 2
    exponents = -0.5 * (draws - blurred) ** 2 / variance
    return np.asarray(logsumexp(exponents, axis=0) - math.log(S) - 0.5 * np.log(2 * math.pi * variance))


def spread_ratios(draws: np.ndarray, exact: np.ndarray, directions: np.ndarray) -> dict[str, np.ndarray]:
    """Compare the spread of draws with that of exact ones, as a whole and along directions of the rows of W.

    - `sd`: root mean variance of a weight over the exact one.
    - `least_variance`, `largest_variance`: over directions, of the variance of a row along a direction over the exact
      one; variances are averaged over rows before they are divided.

    Args:
        draws: posterior draws (draw, ..., post, pre).
        exact: draws of the exact posterior, in the same shape but for their number.
        directions: orthonormal directions as columns, shape (..., pre, direction): eigenvectors of Λ, say, from what
            the recording tells least about to what it tells most.

    Returns:
        Each of them, shape (...); NaN where exact draws do not vary.
    """
    # Variance along each direction, averaged over rows.
    of_found, of_exact = ((part @ directions).var(0, ddof=1).mean(-2) for part in (draws, exact))
    known = of_exact > 0
    ratio = np.divide(of_found, of_exact, out=np.full(known.shape, np.nan), where=known)
    total = of_exact.mean(-1)
    whole = np.divide(of_found.mean(-1), total, out=np.full(total.shape, np.nan), where=total > 0)
    return {"sd": np.sqrt(whole), "least_variance": ratio.min(-1), "largest_variance": ratio.max(-1)}


def gaussian_kl(draws: np.ndarray, exact: np.ndarray) -> dict[str, float]:
    """Kullback–Leibler divergence from exact draws to draws, of the normal laws with their moments, per weight.

    Rows of W are taken as independent, which they are under the exact Gaussian posterior; each has a mean and a full
    covariance. With few draws the divergence of two samples of one law is not small, but known.

    - `kl`: ½ {tr(C⁻¹Ĉ) + (m̂ − m)ᵀC⁻¹(m̂ − m) − N − log|Ĉ|/|C|} / N, averaged over rows, in nats.
    - `kl_floor`: its expectation if both were independent draws of one normal law.

    Both are NaN where there are too few draws, of either kind, for N (fewer than N + 3) or where some row has no
    variance along some direction.

    Args:
        draws: posterior draws (draw, post, pre).
        exact: draws of the exact posterior (draw, post, pre), of any number.

    Raises:
        ValueError: draws of different sizes of matrices.
    """
    draws, exact = np.asarray(draws, dtype=np.float64), np.asarray(exact, dtype=np.float64)
    if draws.ndim != 3 or draws.shape[1:] != exact.shape[1:]:
        raise ValueError(f"both must be draws (draw, post, pre) of one shape; got {draws.shape} and {exact.shape}.")
    S, R, N = len(draws), len(exact), draws.shape[-1]
    nothing = {"kl": math.nan, "kl_floor": math.nan}
    if min(S, R) < N + 3:
        return nothing
    moments = [(part.mean(0), _row_covariances(part)) for part in (draws, exact)]
    (mean, covariance), (exact_mean, exact_covariance) = moments
    try:
        roots = [np.linalg.cholesky(part) for part in (covariance, exact_covariance)]
    except np.linalg.LinAlgError:
        return nothing
    log_determinants = [2 * np.log(np.diagonal(root, axis1=-2, axis2=-1)).sum(-1) for root in roots]
    whitened = np.linalg.solve(roots[1], np.concatenate([roots[0], (mean - exact_mean)[..., None]], axis=-1))
    found = (whitened**2).sum((-2, -1)) - N - log_determinants[0] + log_determinants[1]
    # Of Wishart's law with n degrees: E C⁻¹ = n/(n − N − 1) of the true inverse, E log|nC| = Σψ((n − i)/2) + N log 2.
    n = R - 1
    squares = N * n / (n - N - 1) * (1 + 1 / S + 1 / R)
    floor = squares - N - _expected_log_determinant(S - 1, N) + _expected_log_determinant(n, N)
    return {"kl": float(found.mean() / (2 * N)), "kl_floor": floor / (2 * N)}


def _expected_log_determinant(n: int, N: int) -> float:
    """Expected log determinant of a sample covariance with n degrees of freedom, the true one being the identity."""
    return float(psi((n - np.arange(N)) / 2).sum() - N * math.log(n / 2))


def _row_covariances(draws: np.ndarray) -> np.ndarray:
    centred = (draws - draws.mean(0)).transpose(1, 2, 0)
    return centred @ centred.transpose(0, 2, 1) / (len(draws) - 1)


def _checked(draws: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    draws, truth = np.asarray(draws, dtype=np.float64), np.asarray(truth, dtype=np.float64)
    if truth.ndim != 2 or draws.shape[1:] != truth.shape or len(draws) < 2:
        raise ValueError(
            f"draws must be (draw, post, pre), at least two, of a truth (post, pre); got {draws.shape} "
            f"and {truth.shape}."
        )
    return draws, truth
