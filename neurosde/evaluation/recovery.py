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
        ValueError: shapes differ, or the truth is zero.
    """
    estimate, truth = np.asarray(estimate, dtype=np.float64), np.asarray(truth, dtype=np.float64)
    if estimate.shape != truth.shape or truth.ndim != 2:
        raise ValueError(f"estimate and truth must be one (post, pre) shape; got {estimate.shape} and {truth.shape}.")
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
