"""Linear covariance methods and CURBD: right where they must be, and wrong where they are known to be."""

import math

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch

from neurosde import simulate_rate_network
from neurosde.evaluation.covariance_methods import lagged_covariance_estimate, precision_estimate
from neurosde.evaluation.curbd import CURBDSettings, curbd
from neurosde.evaluation.recovery import recovery

DT, SIGMA = 0.1, 0.3


def recorded(W, T, noise_std=SIGMA, phi="tanh", seed=0, trials=1, tau=1.0, **more):
    h0 = torch.zeros(trials, len(W), dtype=torch.float64)
    x = simulate_rate_network(W, h0, T, DT, tau, noise_std=noise_std, phi=phi, generator=seed, engine="torch", **more)
    return x.numpy()


def weights(N, gain, seed=0):
    return gain / math.sqrt(N) * np.random.default_rng(seed).standard_normal((N, N))


def squared_error(x, estimate, W, noise_std=SIGMA, tau=1.0):
    """Of the regression in units of its standard error: χ² with N² degrees if the estimator is right."""
    before = x[:, :-1].reshape(-1, len(W))
    before = before - before.mean(0)
    variance = noise_std**2 * tau**2 / DT
    return np.einsum("ij,jk,ik->", estimate - W, before.T @ before, estimate - W) / variance


@pytest.mark.parametrize("more", [{}, {"tau": 2.0}, {"tau": 2.0, "drive": "unscaled"}])
def test_lagged_covariances_of_a_linear_network_have_the_error_of_the_regression(more):
    W = weights(8, 0.4)
    current = torch.linspace(-1, 1, 8, dtype=torch.float64)
    x = recorded(W, 4000, phi="linear", trials=2, I=current, **more)
    estimate = lagged_covariance_estimate(x, DT, **more)
    # With tau = 2 the unscaled drive moves h by dt·Wφ: its noise is that of a scaled one with τ = 1.
    square = squared_error(x, estimate, W, tau=1.0 if "drive" in more else more.get("tau", 1.0))
    low, high = scipy.stats.chi2.ppf([1e-4, 1 - 1e-4], 64)
    assert low < square < high


def test_lagged_covariances_are_right_for_small_activity_and_not_for_saturated():
    W = weights(8, 0.4)
    small, large = recorded(W, 4000, 0.02), recorded(W, 4000, 2.0)
    high = scipy.stats.chi2.ppf(1 - 1e-4, 64)
    assert squared_error(small, lagged_covariance_estimate(small, DT), W, 0.02) < high
    assert recovery(lagged_covariance_estimate(large, DT), W)["relative_error"] > 0.5


def test_the_precision_matrix_gives_symmetric_weights_at_any_step():
    """Against the stationary covariance, and against simulations with the error that their length leaves."""
    N, T = 5, 100_000
    W = weights(N, 0.4)
    W = (W + W.T) / 2
    x = recorded(W, T, phi="linear")
    A = (1 - DT) * np.eye(N) + DT * W
    C = scipy.linalg.solve_discrete_lyapunov(A, SIGMA**2 * DT * np.eye(N))
    roots = scipy.linalg.sqrtm(np.eye(N) - SIGMA**2 * DT * np.linalg.inv(C)).real
    np.testing.assert_allclose((roots - (1 - DT) * np.eye(N)) / DT, W, atol=1e-9)
    # Variances of a process of correlation time τ_c have a relative error of √(2τ_c/(T dt)); Ŵ ≈ I − ½ τσ² C₀⁻¹.
    slowest = 1 / (1 - np.linalg.eigvalsh(W).max())
    error = 4 * math.sqrt(2 * slowest / (T * DT)) * np.linalg.norm(np.eye(N) - W)
    for sigma in (SIGMA, None):
        estimate = precision_estimate(x, DT, noise_std=sigma)
        assert np.linalg.norm(estimate - W) < error < np.linalg.norm(W) / 2
        np.testing.assert_allclose(estimate, estimate.T, atol=1e-12)
    skew = weights(N, 0.8, 1)
    wrong = precision_estimate(recorded(skew, T, phi="linear"), DT)
    assert np.linalg.norm(wrong - skew) > 0.5 * np.linalg.norm(skew)


def test_too_short_recordings_need_the_noise():
    x = recorded(weights(8, 0.5), 6)
    with pytest.raises(ValueError, match="give noise_std"):
        precision_estimate(x, DT)
    assert np.isfinite(precision_estimate(x, DT, noise_std=SIGMA)).all()


def test_curbd_fits_activity_which_does_not_make_its_weights_right():
    W = weights(20, 1.8, 3)
    h0 = np.random.default_rng(0).standard_normal((1, 20))
    x = simulate_rate_network(W, h0, 150, DT, 1.0).numpy()
    fit = curbd(x, DT, settings=CURBDSettings(passes=60))
    assert fit.explained_variance[-1] > 0.9 and fit.free_explained_variance > 0.9
    assert fit.explained_variance[-1] > fit.explained_variance[0]
    # What it says it explains is what its weights make: without the input noise, but for that.
    again = simulate_rate_network(fit.weights, np.arctanh(x[:, 0]), 150, DT, 1.0).numpy()
    explained = 1 - ((again - x) ** 2).sum() / ((x - x.mean((0, 1))) ** 2).sum()
    assert explained == pytest.approx(fit.free_explained_variance, abs=0.1)
    assert recovery(fit.weights, W)["relative_error"] > 0.5


def test_curbd_without_noise_or_learning_is_the_simulator():
    """With a learning rate of next to nothing J stays N(0, g²/N), and the error is that of its own activity."""
    x = recorded(weights(6, 1.2), 40, trials=2)
    fit = curbd(x, DT, 2.0, CURBDSettings(passes=1, learning_rate=1e-12, noise=0, substeps=2, gain=0.8, seed=4))
    J = 0.8 / math.sqrt(6) * np.random.default_rng(4).standard_normal((6, 6))
    np.testing.assert_allclose(fit.weights, J, atol=1e-9)
    made = simulate_rate_network(J, np.arctanh(x[:, 0]), 79, DT / 2, 2.0).numpy()[:, ::2]
    explained = 1 - ((made - x) ** 2).sum() / ((x - x.mean((0, 1))) ** 2).sum()
    assert fit.free_explained_variance == pytest.approx(explained, abs=1e-6)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"must lie in \(-1, 1\)"):
        curbd(np.full((5, 3), 1.5))
    with pytest.raises(ValueError, match="constant"):
        curbd(np.full((5, 3), 0.5))
    with pytest.raises(ValueError, match="passes must be at least 1"):
        CURBDSettings(passes=0)
    with pytest.raises(ValueError, match="activity must be"):
        lagged_covariance_estimate(np.zeros(3))
