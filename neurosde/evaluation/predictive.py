"""Posterior-predictive checks: would these weights have produced activity like the recorded one?

A small p-value says that the model misses something. A large one is no evidence that W is right: many wirings produce
the same statistics.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from neurosde.summary import summary_stats


def predictive_check(observed: np.ndarray, predicted: np.ndarray, dt: float) -> pd.DataFrame:
    """Compare statistics of the recording with those of activity simulated from posterior draws.

    Args:
        observed: recorded firing rate, shape (trial, time, neuron).
        predicted: simulated firing rate, shape (draw, trial, time, neuron).
        dt: spacing of the samples.

    Returns:
        One row per statistic: `observed`, `predicted` (mean over draws), `sd` (over draws), `p` (two-sided).
    """
    truth = statistics(observed, dt)
    replicas = pd.DataFrame([statistics(one, dt) for one in predicted], columns=list(truth))
    rows = {}
    for name, value in truth.items():
        replicated = replicas[name].dropna().to_numpy()
        above = (1 + (replicated >= value).sum()) / (len(replicated) + 1)
        below = (1 + (replicated <= value).sum()) / (len(replicated) + 1)
        known = len(replicated) > 1 and np.isfinite(value)
        rows[name] = {
            "observed": value,
            "predicted": replicated.mean() if known else np.nan,
            "sd": replicated.std(ddof=1) if known else np.nan,
            "p": min(1.0, 2 * min(above, below)) if known else np.nan,
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("statistic")


def statistics(activity: np.ndarray, dt: float) -> dict[str, float]:
    """Scalar summaries of activity (trial, time, neuron), averaged over trials."""
    stats = summary_stats(activity, dt, lags=(1,)).mean("trial")
    variances = np.diagonal(stats.covariance.to_numpy())
    off_diagonal = stats.covariance.to_numpy()[~np.eye(len(variances), dtype=bool)]
    lagged = np.diagonal(stats.lagged_covariance.isel(lag=0).to_numpy())
    total = variances.sum()
    return {
        "mean rate": float(stats.mean_rate.mean()),
        "spread of mean rates": float(stats.mean_rate.std()),
        "variance": float(variances.mean()),
        "spread of variances": float(variances.std()),
        "rms covariance": float(np.sqrt((off_diagonal**2).mean())) if len(off_diagonal) else float("nan"),
        "lag-1 autocorrelation": float(lagged.sum() / total) if total > 0 else float("nan"),
        "autocorrelation time": float(stats.autocorrelation_time),
        "dimension": float(stats.dimension),
    }
