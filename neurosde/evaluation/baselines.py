"""What every method has to be compared with: guessing zero, least squares, ridge, the exact Gaussian posterior."""

from __future__ import annotations

import numpy as np
import pandas as pd

from neurosde.evaluation.recovery import recovery
from neurosde.likelihood import TransitionStatistics
from neurosde.models.empirical_bayes import empirical_bayes, least_squares, ridge
from neurosde.models.gaussian_posterior import GaussianPosterior


def baseline_estimates(statistics: TransitionStatistics) -> dict[str, np.ndarray]:
    """Point estimates of W (post, pre) that need nothing but the recording."""
    found = empirical_bayes(statistics)
    exact = GaussianPosterior.from_statistics(statistics, found.noise_std, found.prior_variance)
    return {
        "zero": np.zeros(tuple(statistics.xx.shape)),
        "least squares": least_squares(statistics).numpy(),
        "ridge (cross-validation)": ridge(statistics).numpy(),
        "exact Gaussian posterior (evidence)": exact.mean.numpy(),
    }


def baseline_table(statistics: TransitionStatistics, truth: np.ndarray) -> pd.DataFrame:
    """Recovery of each baseline, one row each."""
    rows = {name: recovery(estimate, truth) for name, estimate in baseline_estimates(statistics).items()}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("estimate")
