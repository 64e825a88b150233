"""Weights from covariances of the activity: what the linear methods in use would say.

Both take x = φ(h) for h itself, as if the network were linear,

    x[t+1] = A x[t] + noise of variance s²,      A = a I + b W      (a, b: `RateSDE.euler_coefficients`),

so that a = 1 − dt/τ and b = dt/τ. Saturation makes them wrong however long the recording; where activity is small they
agree with least squares. Covariances are about the mean over all trials, so that a constant input needs not be known.

- `lagged_covariance_estimate`: Yule and Walker's A = C₁C₀⁻¹, hence Ŵ = (C₁C₀⁻¹ − a I)/b = I + τ(C₁C₀⁻¹ − I)/dt.
- `precision_estimate`: from simultaneous covariances only, which do not tell W from its transpose. If W is symmetric
  and the activity stationary, C₀ = A C₀ A + s²I gives A = (I − s²C₀⁻¹)^½ and Ŵ = (A − a I)/b. To first order in dt that
  is Ŵ = I − ½ τσ² C₀⁻¹: off the diagonal the entries of the inverse covariance, in units of W.

References:
    Time series analysis (Hamilton, 1994), chapter 11, https://doi.org/10.1515/9780691218632
    Estimation of directed effective connectivity from fMRI functional connectivity hints at asymmetries of cortical
    connectome (Gilson, Moreno-Bote, Ponce-Alvarez, Ritter, Deco, 2016), https://doi.org/10.1371/journal.pcbi.1004762
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from neurosde.likelihood import TransitionStatistics, transition_statistics
from neurosde.models.empirical_bayes import least_squares
from neurosde.rate_sde import Drive


def lagged_covariance_estimate(
    activity: ArrayLike | Tensor, dt: float = 0.1, tau: float = 1.0, *, drive: Drive = "scaled"
) -> np.ndarray:
    """Estimate W from covariances at lags 0 and 1 of activity that is taken to be linear.

    Args:
        activity: firing rate, shape (time, neuron) or (trial, time, neuron).
        dt: spacing of the samples.
        tau: time constant.
        drive: see `RateSDE`.

    Returns:
        Ŵ (post, pre), shape (neuron, neuron); of minimum norm where the activity does not span all neurons.

    Raises:
        ValueError: as `neurosde.likelihood.transition_statistics`.
    """
    return least_squares(_linear(activity, dt, tau, drive)).numpy()


def precision_estimate(
    activity: ArrayLike | Tensor,
    dt: float = 0.1,
    tau: float = 1.0,
    *,
    noise_std: float | None = None,
    drive: Drive = "scaled",
) -> np.ndarray:
    """Estimate a symmetric W from the precision matrix of activity that is taken to be linear and stationary.

    Args:
        activity: firing rate, shape (time, neuron) or (trial, time, neuron).
        dt: spacing of the samples.
        tau: time constant.
        noise_std: σ; None takes that of the residuals of `lagged_covariance_estimate`, which needs more transitions
            than neurons.
        drive: see `RateSDE`.

    Returns:
        Ŵ, symmetric, shape (neuron, neuron). What the activity does not span, and what is less variable than the noise
        alone would make it, has A = 0.

    Raises:
        ValueError: as `neurosde.likelihood.transition_statistics`, or too few transitions to tell the noise.
    """
    statistics = _linear(activity, dt, tau, drive)
    n, N = statistics.degrees, statistics.num_neurons
    if noise_std is None:
        if n <= N:
            raise ValueError(f"{n} transitions of {N} neurons do not tell the noise; give noise_std.")
        residual = statistics.yy.sum() - (least_squares(statistics) * statistics.yx).sum()
        scale = (float(residual.clamp(min=0)) / ((n - N) * N)) ** 0.5
    else:
        scale = statistics.noise_scale(noise_std)
    eigenvalues, vectors, _ = statistics.spectrum()
    variance = (scale * statistics.gain) ** 2
    squares = torch.where(eigenvalues > 0, 1 - variance * n / eigenvalues, 0).clamp(min=0)
    decay = 1 - dt / tau
    of_directions = (squares.sqrt() - decay) / statistics.gain
    return ((vectors * of_directions) @ vectors.mT).numpy()


def _linear(activity: ArrayLike | Tensor, dt: float, tau: float, drive: Drive) -> TransitionStatistics:
    return transition_statistics(activity, dt, tau, phi="linear", drive=drive).without_input()
