"""Statistics of weight matrices that do not depend on how neurons are labelled.

All are of J = W √N, whose entries are of order one at every N, or of the spectrum of W, which is too. With r_i and c_j
the row and column sums of J − mean J, the second-order motifs are mean correlations of pairs of connections,

    chain Σ_j c_j r_j,   convergent Σ_i r_i² − |J − mean J|²,   divergent Σ_j c_j² − |J − mean J|²,

each over N |J − mean J|², and the third-order ones are the cycle tr W³ and the feed-forward loop tr(W W Wᵀ).

References:
    Motif statistics and spike correlations in neuronal networks (Hu, Trousdale, Josić, Shea-Brown, 2013),
    https://doi.org/10.1088/1742-5468/2013/03/P03012
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

CHUNK_ENTRIES = 2**22  # of weights treated at a time
NEAR_ZERO = 0.1  # of the root mean square: 8 % of Gaussian entries are below


@dataclass(frozen=True)
class WeightStatistics:
    """Statistics of some matrices.

    Attributes:
        per_matrix: one value for each matrix, shape (network,), by name.
        pooled: values of all matrices together, 1-D, by name.
    """

    per_matrix: dict[str, np.ndarray]
    pooled: dict[str, np.ndarray]

    def table(self) -> np.ndarray:
        """The statistics of each matrix, shape (network, statistic)."""
        return np.stack(list(self.per_matrix.values()), axis=1)


def check_matrices(weights: np.ndarray, name: str) -> np.ndarray:
    """Return weights as an array (network, post, pre).

    Raises:
        ValueError: another shape, fewer than two networks, or values that are not finite; the message names which.
    """
    weights = np.asarray(weights)
    if weights.ndim != 3 or weights.shape[1] != weights.shape[2] or weights.shape[1] == 0:
        raise ValueError(f"{name} must hold weights (network, post, pre), square; got {weights.shape}.")
    if len(weights) < 2:
        raise ValueError(f"{name} must hold at least 2 networks; got {len(weights)}.")
    wrong = np.flatnonzero(~np.isfinite(weights).all((1, 2)))
    if len(wrong):
        count = int((~np.isfinite(weights[wrong[0]])).sum())
        raise ValueError(
            f"weights of network {wrong[0]} in {name} must be finite; got {count} NaN or infinite values "
            f"({len(wrong)} of {len(weights)} networks have some). Sample them again, or leave them out."
        )
    return weights


def weight_statistics(weights: np.ndarray) -> WeightStatistics:
    """Compute all statistics, in float64.

    Args:
        weights: W, shape (network, post, pre).
    """
    count, N, _ = weights.shape
    step = max(1, CHUNK_ENTRIES // (N * N))
    parts = [_statistics(np.asarray(weights[k : k + step], dtype=np.float64)) for k in range(0, count, step)]
    return WeightStatistics(
        {name: np.concatenate([one.per_matrix[name] for one in parts]) for name in parts[0].per_matrix},
        {name: np.concatenate([one.pooled[name] for one in parts]) for name in parts[0].pooled},
    )


def _statistics(W: np.ndarray) -> WeightStatistics:
    N = W.shape[-1]
    J = W * math.sqrt(N)
    mean = J.mean((1, 2))
    centred = J - mean[:, None, None]
    rows, columns = centred.sum(2), centred.sum(1)
    square, power = (J**2).sum((1, 2)), (centred**2).sum((1, 2))
    row_norms, column_norms = np.sqrt((J**2).mean(2)), np.sqrt((J**2).mean(1))
    rms = np.sqrt(square) / N
    diagonal = np.diagonal(J, axis1=1, axis2=2)
    off = ~np.eye(N, dtype=bool)
    two_steps = W @ W
    eigenvalues = np.linalg.eigvals(W)
    singular = np.linalg.svd(W, compute_uv=False)
    sign_sums, exist = np.sign(J).sum(1), (J != 0).sum(1)
    per_matrix = {
        "gain": rms,
        "mean": mean,
        "density": (J != 0).mean((1, 2)),
        "near-zero share": (np.abs(J) < NEAR_ZERO * rms[:, None, None]).mean((1, 2)),
        "kurtosis": _ratio((centred**4).mean((1, 2)), (power / N**2) ** 2),
        "asymmetry": _ratio(((J - J.mT) ** 2).sum((1, 2)), 2 * square),
        "reciprocity": _correlation(J[:, off], J.mT[:, off]),
        "sd of row norms": row_norms.std(1),
        "sd of column norms": column_norms.std(1),
        "sd of row means": J.mean(2).std(1),
        "sd of column means": J.mean(1).std(1),
        "diagonal mean": diagonal.mean(1),
        "diagonal norm": np.sqrt((diagonal**2).mean(1)),
        "chain motif": _ratio((rows * columns).sum(1), N * power),
        "convergent motif": _ratio((rows**2).sum(1) - power, N * power),
        "divergent motif": _ratio((columns**2).sum(1) - power, N * power),
        "cycle motif": np.einsum("kij,kji->k", two_steps, W),
        "feed-forward motif": np.einsum("kij,kij->k", two_steps, W),
        "spectral radius": np.abs(eigenvalues).max(1),
        "spectral abscissa": eigenvalues.real.max(1),
        **{f"singular value {k + 1}": singular[:, k] for k in range(min(3, N))},
        "sign consistency": _ratio(np.abs(sign_sums), exist).mean(1),
        "mixed columns": ((J > 0).any(1) & (J < 0).any(1)).mean(1),
    }
    pooled = {
        "eigenvalue, real part": eigenvalues.real.ravel(),
        "eigenvalue, modulus": np.abs(eigenvalues).ravel(),
        "singular value": singular.ravel(),
        "entry": J.ravel(),
        "row norm": row_norms.ravel(),
        "column norm": column_norms.ravel(),
    }
    return WeightStatistics(per_matrix, pooled)


def _ratio(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    """Ratio, 0 where there is nothing to relate to."""
    return np.divide(top, bottom, out=np.zeros_like(top, dtype=np.float64), where=bottom > 0)


def _correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Correlation along the last axis of arrays that hold the same values in another order; 0 where constant."""
    if a.shape[1] == 0:
        return np.zeros(len(a))
    a, b = a - a.mean(1, keepdims=True), b - b.mean(1, keepdims=True)
    return _ratio((a * b).sum(1), (a * a).sum(1))
