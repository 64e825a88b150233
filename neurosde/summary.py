"""Summary statistics of activity, as a labelled dataset."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr
from numpy.typing import ArrayLike
from torch import Tensor

from neurosde.validation import check_positive

_LEADING = {0: (), 1: ("trial",), 2: ("network", "trial")}


def summary_stats(
    activity: Tensor | ArrayLike | xr.DataArray, dt: float | None = None, *, lags: Sequence[int] = (1, 5)
) -> xr.Dataset:
    """Describe activity by its first and second moments in space and time.

    Each trial is described on its own (average over `trial` as you like); covariances are about the trial's mean.

    - `mean_rate` (neuron): average over time.
    - `covariance` (neuron, other_neuron): of simultaneous rates.
    - `lagged_covariance` (lag, neuron, other_neuron): cov(x_i(t + lag), x_j(t)).
    - `autocorrelation_time`: ∫ρ(s) ds of the population's autocorrelation, up to its first zero crossing.
    - `dimension`: participation ratio (Σλ)²/Σλ² of the covariance's eigenvalues, between 1 and N.
    - `spectrum` (frequency): population-averaged power spectral density (Welch).

    Dimension and autocorrelation time of constant activity are NaN.

    Args:
        activity: firing rate, shape (time, neuron), (trial, time, neuron) or (network, trial, time, neuron).
        dt: spacing of the samples, in the unit of tau; None takes it from a labelled `time`, else 1.
        lags: lags of the lagged covariances, in samples.

    Returns:
        A dataset with the variables above and the leading axes of `activity`.

    Raises:
        ValueError: wrong number of dimensions, fewer than two samples, a lag that the recording does not reach, NaN.

    References:
        Dimensionality, information and learning in prefrontal cortex (Gao, Trautmann, Yu, et al., 2017),
        https://doi.org/10.1101/214262 (participation ratio)
    """
    if dt is None and isinstance(activity, xr.DataArray) and activity.coords.get("time", activity).ndim == 1:
        times = activity["time"].to_numpy()
        dt = float(times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else 1.0
    dt = check_positive(1.0 if dt is None else dt, "dt")
    if isinstance(activity, xr.DataArray):
        wanted = [d for d in ("network", "trial") if d in activity.dims] + ["time", "neuron"]
        if set(wanted) != set(activity.dims):
            raise ValueError(f"activity must have dims (network,) (trial,) time, neuron; got {activity.dims}.")
        activity = activity.transpose(*wanted).to_numpy()
    x = np.asarray(activity.detach().cpu() if isinstance(activity, Tensor) else activity, dtype=np.float64)
    if not 2 <= x.ndim <= 4 or x.shape[-2] < 2 or x.shape[-1] < 1:
        raise ValueError(f"activity must be (..., time, neuron) with at least two times; got shape {x.shape}.")
    if not np.isfinite(x).all():
        raise ValueError("activity must be finite; got NaN or infinite values.")
    samples = x.shape[-2]
    if any(not 0 < lag < samples for lag in lags):
        raise ValueError(f"lags must lie between 1 and {samples - 1} samples; got {tuple(lags)}.")

    mean = x.mean(-2)
    centred = x - mean[..., None, :]
    covariance = np.swapaxes(centred, -1, -2) @ centred / samples
    lagged = [np.swapaxes(centred[..., lag:, :], -1, -2) @ centred[..., :-lag, :] / (samples - lag) for lag in lags]
    from scipy.signal import welch  # here, since it takes as long to import as the rest of neurosde together

    frequency, power = welch(centred, fs=1 / dt, axis=-2, nperseg=min(256, samples), detrend=False)

    leading = _LEADING[x.ndim - 2]
    pair = (*leading, "neuron", "other_neuron")
    return xr.Dataset(
        {
            "mean_rate": ((*leading, "neuron"), mean, _label("mean firing rate")),
            "covariance": (pair, covariance, _label("covariance of simultaneous firing rates")),
            "lagged_covariance": (
                (*leading, "lag", "neuron", "other_neuron"),
                np.stack(lagged, axis=len(leading)),
                _label("covariance of a neuron's rate with another's one lag earlier"),
            ),
            "autocorrelation_time": (
                leading,
                _autocorrelation_time(centred, dt),
                _label("integrated autocorrelation time of the population", "tau"),
            ),
            "dimension": (leading, _participation_ratio(covariance), _label("participation ratio")),
            "spectrum": (
                (*leading, "frequency"),
                power.mean(-1),
                _label("population-averaged power spectral density", "tau"),
            ),
        },
        coords={
            "lag": ("lag", np.asarray(lags) * dt, _label("lag", "tau")),
            "frequency": ("frequency", frequency, _label("frequency", "1/tau")),
        },
    )


def _label(long_name: str, units: str = "1") -> dict[str, str]:
    return {"long_name": long_name, "units": units}


def _autocorrelation_time(centred: np.ndarray, dt: float) -> np.ndarray:
    samples = centred.shape[-2]
    spectrum = np.fft.rfft(centred, n=2 * samples, axis=-2)
    autocovariance = np.fft.irfft(np.abs(spectrum) ** 2, axis=-2)[..., :samples, :].sum(-1)
    autocovariance /= samples - np.arange(samples)
    with np.errstate(invalid="ignore", divide="ignore"):
        rho = autocovariance / autocovariance[..., :1]
    before_zero = np.logical_and.accumulate(rho > 0, axis=-1)
    integral = dt * ((rho * before_zero).sum(-1) - 0.5)  # trapezoid: half of ρ(0) = 1
    return np.where(autocovariance[..., 0] > 0, integral, np.nan)


def _participation_ratio(covariance: np.ndarray) -> np.ndarray:
    trace = np.trace(covariance, axis1=-2, axis2=-1)
    squares = (covariance**2).sum((-1, -2))
    with np.errstate(invalid="ignore"):
        return np.where(trace > 0, trace**2 / np.where(squares > 0, squares, 1), np.nan)
