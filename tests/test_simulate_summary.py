"""Summary statistics against processes whose moments are known."""

import numpy as np
import pytest
import torch
import xarray as xr

from neurosde import summary_stats


def test_labels_and_shapes():
    stats = summary_stats(torch.randn(2, 3, 40, 5), dt=0.1, lags=(1, 4))
    assert isinstance(stats, xr.Dataset)
    assert stats.covariance.dims == ("network", "trial", "neuron", "other_neuron")
    assert stats.lagged_covariance.sizes == {"network": 2, "trial": 3, "lag": 2, "neuron": 5, "other_neuron": 5}
    np.testing.assert_allclose(stats.lag, [0.1, 0.4])
    assert all({"long_name", "units"} <= set(v.attrs) for v in stats.data_vars.values())


def test_moments_against_numpy():
    x = np.random.default_rng(0).normal(size=(300, 4))
    stats = summary_stats(x)
    np.testing.assert_allclose(stats.mean_rate, x.mean(0))
    np.testing.assert_allclose(stats.covariance, np.cov(x.T, bias=True))
    centred = x - x.mean(0)
    np.testing.assert_allclose(stats.lagged_covariance.sel(lag=5.0)[1, 2], (centred[5:, 1] @ centred[:-5, 2]) / 295)
    eigenvalues = np.linalg.eigvalsh(np.cov(x.T))
    np.testing.assert_allclose(stats.dimension, eigenvalues.sum() ** 2 / (eigenvalues**2).sum())


def test_autocorrelation_time_of_an_ar1_process():
    """x[t+1] = a x[t] + noise has ρ(l) = a^l, hence ∫ρ = dt (½ + a/(1−a)) by the trapezoid rule."""
    a, dt, T, N = 0.9, 0.1, 4000, 200
    rng = np.random.default_rng(0)
    x = np.empty((T, N))
    x[0] = rng.normal(size=N) / np.sqrt(1 - a**2)
    for t in range(T - 1):
        x[t + 1] = a * x[t] + rng.normal(size=N)
    expected = dt * (0.5 + a / (1 - a))
    # 200 neurons × 4000·(1−a)/(1+a) ≈ 42 000 effective samples; the truncated tail costs a few per cent.
    assert float(summary_stats(x, dt=dt).autocorrelation_time) == pytest.approx(expected, rel=0.05)
    spectrum = summary_stats(x, dt=dt).spectrum
    # Parseval: the spectrum integrates to the variance; Welch's windows leave a few per cent.
    assert float(spectrum.integrate("frequency")) == pytest.approx(1 / (1 - a**2), rel=0.05)


def test_dimension_counts_the_directions():
    x = np.zeros((100, 6))
    x[:, 0] = np.sin(np.arange(100))
    assert float(summary_stats(x).dimension) == pytest.approx(1)
    assert np.isnan(float(summary_stats(np.ones((50, 3))).dimension))
    assert np.isnan(float(summary_stats(np.ones((50, 3))).autocorrelation_time))


def test_a_labelled_time_axis_gives_the_step():
    x = np.random.default_rng(0).normal(size=(80, 3)).cumsum(0)
    labelled = xr.DataArray(x, dims=("time", "neuron"), coords={"time": np.arange(80) * 0.25})
    xr.testing.assert_allclose(summary_stats(labelled), summary_stats(x, 0.25))
    xr.testing.assert_allclose(summary_stats(labelled.drop_vars("time")), summary_stats(x, 1.0))


@pytest.mark.parametrize(
    ("activity", "options", "match"),
    [
        (np.zeros(5), {}, r"\(\.\.\., time, neuron\)"),
        (np.zeros((1, 5)), {}, "two times"),
        (np.full((9, 2), np.nan), {}, "finite"),
        (np.zeros((9, 2)), {"lags": (9,)}, "lags must lie between 1 and 8"),
        (np.zeros((9, 2)), {"dt": -1}, "dt must be positive"),
        (xr.DataArray(np.zeros((9, 2)), dims=("time", "unit")), {}, "dims"),
    ],
)
def test_bad_input_is_named(activity, options, match):
    with pytest.raises(ValueError, match=match):
        summary_stats(activity, **options)
