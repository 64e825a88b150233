"""Posterior-predictive checks: would these weights have produced activity like the recorded one?

A small p-value says that the model misses something. A large one is no evidence that W is right: many wirings produce
the same statistics.
"""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from neurosde.likelihood import TransitionStatistics
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


def held_out_log_likelihood(
    weights: ArrayLike | Tensor, held_out: TransitionStatistics, noise_std: float | Tensor
) -> float:
    """Log density of held-out transitions, for each of them, in nats: of an estimate of W, or of a posterior's draws.

    Of draws it is the log of their mean density, log (1/S) Σ_s p(held out | W_s), the posterior-predictive density.
    With long held-out recordings the best draw outweighs all others, so that few draws of many weights look worse than
    the posterior is.

    Args:
        weights: an estimate (post, pre), or posterior draws (draw, post, pre).
        held_out: sums over transitions that the weights were not inferred from.
        noise_std: σ per √time, or one for each draw, shape (draw,).

    Raises:
        ValueError: weights of another size.
    """
    W = torch.as_tensor(np.asarray(weights) if not isinstance(weights, Tensor) else weights.detach().cpu()).double()
    N = held_out.num_neurons
    if W.ndim not in (2, 3) or W.shape[-2:] != (N, N):
        raise ValueError(f"weights must be ({N}, {N}) or (draw, {N}, {N}); got {tuple(W.shape)}.")
    density = held_out.log_likelihood(W, noise_std).reshape(-1)
    return float(density.logsumexp(0) - math.log(len(density))) / held_out.count
