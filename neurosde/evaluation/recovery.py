"""How near an estimate is to the true weights, entry by entry and as a dynamical system."""

from __future__ import annotations

import numpy as np
from scipy.optimize import linear_sum_assignment

from neurosde.evaluation.page_table import Sense

SENSES: dict[str, Sense] = {
    "relative_error": "lower",
    "correlation": "higher",
    "r2": "higher",
    "eigenvalue_error": "lower",
    "spectral_radius_error": 0.0,
}  # which values of each measure are better


def recovery(estimate: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Compare an estimate of W with the truth.

    - `relative_error`: |Ŵ − W| / |W| (Frobenius); guessing 0 gives 1.
    - `correlation`: of the entries; says nothing about scale.
    - `r2`: 1 − Σ(Ŵ − W)²/Σ(W − mean W)²; negative where guessing the mean is better.
    - `eigenvalue_error`: mean |λ̂ − λ| over the best one-to-one matching, relative to the true spectral radius.
    - `spectral_radius_error`: (ρ̂ − ρ)/ρ.

    Args:
        estimate: Ŵ (post, pre), shape (neuron, neuron).
        truth: W, the same shape.

    Raises:
        ValueError: shapes differ, the estimate is not finite, or the truth is zero.
    """
    estimate, truth = np.asarray(estimate, dtype=np.float64), np.asarray(truth, dtype=np.float64)
    if estimate.shape != truth.shape or truth.ndim != 2:
        raise ValueError(f"estimate and truth must be one (post, pre) shape; got {estimate.shape} and {truth.shape}.")
    if not np.isfinite(estimate).all():
        raise ValueError(f"the estimate must be finite; got {int((~np.isfinite(estimate)).sum())} NaN or infinities.")
    size = np.linalg.norm(truth)
    if size == 0:
        raise ValueError("the true weights are all zero, so that no relative error exists.")
    error = estimate - truth
    found, true = np.linalg.eigvals(estimate), np.linalg.eigvals(truth)
    distances = np.abs(found[:, None] - true)
    matched = distances[linear_sum_assignment(distances)].mean()
    radius, true_radius = np.abs(found).max(), np.abs(true).max()
    constant = estimate.std() == 0 or truth.std() == 0
    return {
        "relative_error": float(np.linalg.norm(error) / size),
        "correlation": float("nan") if constant else float(np.corrcoef(estimate.ravel(), truth.ravel())[0, 1]),
        "r2": float(1 - (error**2).sum() / ((truth - truth.mean()) ** 2).sum()),
        "eigenvalue_error": float(matched / true_radius),
        "spectral_radius_error": float((radius - true_radius) / true_radius),
    }


def point_metrics(estimate: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Return the numbers of `recovery`, and what an estimate says of edges, signs and singular values.

    - `edge_auc`: area under the receiver's curve of |Ŵ_ij| as a score of W_ij ≠ 0; ½ is chance. NaN where no true
      weight is zero, as of a Gaussian ensemble: there are no absent edges to tell from present ones.
    - `sign_accuracy`: share of the weights that are not zero whose sign is right; an estimate of 0 counts as half.
    - `singular_value_error`: |ŝ − s| / |s| of the ordered singular values; |s| = |W|, so that it is at most
      `relative_error` (Mirsky's inequality).

    Args:
        estimate: Ŵ (post, pre), shape (neuron, neuron).
        truth: W, the same shape.

    Raises:
        ValueError: as `recovery`.

    References:
        Symmetric gauge functions and unitarily invariant norms (Mirsky, 1960), https://doi.org/10.1093/qmath/11.1.50
    """
    from sklearn.metrics import roc_auc_score  # here: it takes longer to import than the rest of this module

    found = recovery(estimate, truth)
    estimate, truth = np.asarray(estimate, dtype=np.float64), np.asarray(truth, dtype=np.float64)
    edges = truth != 0
    signs = np.sign(estimate[edges]) * np.sign(truth[edges])
    singular, true_singular = np.linalg.svd(estimate, compute_uv=False), np.linalg.svd(truth, compute_uv=False)
    auc = float("nan") if edges.all() else float(roc_auc_score(edges.ravel(), np.abs(estimate).ravel()))
    return found | {
        "edge_auc": auc,
        "sign_accuracy": float((1 + signs).mean() / 2),
        "singular_value_error": float(np.linalg.norm(singular - true_singular) / np.linalg.norm(true_singular)),
    }
