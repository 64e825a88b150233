"""Lyapunov exponents, fixed points and held-out likelihood of networks for which they are known."""

import math

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
import torch

from neurosde import RateSDE, simulate_rate_network
from neurosde.evaluation.dynamics import FixedPoints, _starts, fixed_point_distance, fixed_points
from neurosde.evaluation.predictive import held_out_log_likelihood
from neurosde.likelihood import transition_statistics
from neurosde.lyapunov import lyapunov_exponents


def weights(N, gain, seed=0):
    z = torch.randn(N, N, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return gain / math.sqrt(N) * z


@pytest.mark.parametrize(("tau", "drive"), [(1.0, "scaled"), (2.0, "scaled"), (2.0, "unscaled")])
def test_without_weights_distances_shrink_with_the_time_constant(tau, drive):
    sde, dt = RateSDE(np.zeros((3, 3)), tau, drive=drive), 0.1
    of_map = lyapunov_exponents(sde, dt=dt, time=20, count=3, level="map")
    np.testing.assert_allclose(of_map, math.log(1 - dt / tau) / dt, rtol=1e-12)
    # Runge and Kutta's growth of a linear equation is off by (dt/τ)⁵/120 a step.
    np.testing.assert_allclose(lyapunov_exponents(sde, dt=dt, time=20), -1 / tau, atol=(dt / tau) ** 5 / 100 / dt)


def test_exponents_of_a_linear_network_are_the_real_parts_of_its_eigenvalues():
    """A scaled orthogonal matrix and a symmetric one, as a batch; saturation is out of play near h = 0."""
    symmetric = weights(6, 0.8, 1)
    W = torch.stack([0.9 * torch.linalg.qr(weights(6, 1.0)).Q, (symmetric + symmetric.mT) / 2])
    eigenvalues = np.linalg.eigvals(W.numpy())
    found = lyapunov_exponents(RateSDE(W, 2.0, phi="linear"), dt=0.2, time=1000, transient=200, count=6)
    # Within a pair of conjugate eigenvalues the basis turns: an error of the order 1/time.
    np.testing.assert_allclose(found, np.sort(eigenvalues.real - 1)[:, ::-1] / 2, atol=4e-3)
    of_map = lyapunov_exponents(RateSDE(W, 2.0), dt=0.2, time=1000, transient=200, level="map")
    largest = np.log(np.abs(1 + 0.1 * (eigenvalues - 1))).max(-1) / 0.2
    np.testing.assert_allclose(of_map[:, 0], largest, atol=4e-3)


def test_all_exponents_together_are_the_growth_of_volume():
    """Of a chaotic map: Σ exponents = mean log|det M|, along the same path by the simulator."""
    N, dt = 12, 0.1
    W = weights(N, 2.5)
    found = lyapunov_exponents(RateSDE(W), dt=dt, time=100, transient=0, count=N, level="map", generator=7)
    h0 = torch.randn(N, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    x = simulate_rate_network(W, h0, 1000, dt, 1.0, engine="torch")
    steps = (1 - dt) * torch.eye(N) + dt * W * (1 - x.square()).unsqueeze(1)
    # Rounding grows along the path, so that the ends of the paths differ; the mean hardly does.
    assert float(found.sum()) == pytest.approx(float(torch.linalg.slogdet(steps)[1].mean()) / dt, rel=0.01)


def test_a_random_network_is_silent_below_gain_one():
    """Its exponent is that of the linear network, (max Re λ − 1)/τ."""
    W = weights(100, 0.5)
    found = float(lyapunov_exponents(RateSDE(W), time=100))
    assert found == pytest.approx(float(torch.linalg.eigvals(W).real.max()) - 1, abs=0.02) and found < -0.3


def test_a_random_network_is_chaotic_far_above_and_neighbours_part_as_the_exponent_says():
    """Against the distance of two paths, set back to 1e-7 after every step."""
    W = torch.stack([weights(100, 2.5, k) for k in range(4)])
    assert float(lyapunov_exponents(RateSDE(W), time=100).mean()) > 0.02
    found = lyapunov_exponents(RateSDE(W), time=200, level="map")[:, 0]
    assert found.shape == (4,) and float(found.mean()) > 0.02
    h = torch.randn(4, 100, dtype=torch.float64)
    near = h + 1e-8 * torch.ones_like(h)
    growth = torch.zeros(4, dtype=torch.float64)
    for k in range(2500):
        h, near = (one + 0.1 * ((W @ torch.tanh(one).unsqueeze(-1)).squeeze(-1) - one) for one in (h, near))
        apart = (near - h).norm(dim=-1, keepdim=True)
        growth += (k >= 500) * torch.log(apart / 1e-7).squeeze(-1) / 200
        near = h + (near - h) / apart * 1e-7
    # Over 400 time constants such exponents of one network differ by 0.015 from start to start, hence over 200 by 0.02.
    assert float(found.mean()) == pytest.approx(float(growth.mean()), abs=4 * 0.02 * math.sqrt(2 / 4))


def test_activity_that_diverges_has_no_exponent():
    found = lyapunov_exponents(RateSDE(3 * torch.eye(2, dtype=torch.float64), phi="linear"), time=400)
    assert torch.isnan(found).all()


@pytest.mark.parametrize("drive", ["scaled", "unscaled"])
def test_without_weights_the_only_fixed_point_is_the_input(drive):
    current = torch.tensor([0.5, -1.0, 0.0], dtype=torch.float64)
    found = fixed_points(RateSDE(np.zeros((3, 3)), 2.0, drive=drive))
    torch.testing.assert_close(found.voltage, torch.zeros(1, 3).double())
    assert found.growth_rate.tolist() == [-0.5] and bool(found.stable) and found.found.tolist() == [128]
    driven = fixed_points(RateSDE(np.zeros((3, 3)), 2.0, current, drive=drive), 5)
    torch.testing.assert_close(driven.voltage[0], current * (1 if drive == "scaled" else 2))


def test_a_network_of_rank_one_has_the_points_of_its_scalar_equation():
    """h = κ m with κ = Σ n φ(κ m): at κ = 0 and at one pair ±κ."""
    rng = np.random.default_rng(0)
    N = 40
    m = rng.normal(size=N)
    n = 1.8 * m / (m @ m) + rng.normal(size=N) / N
    kappa = scipy.optimize.brentq(lambda k: n @ np.tanh(k * m) - k, 0.1, 10, xtol=1e-14)
    found = fixed_points(RateSDE(np.outer(m, n)))
    assert found.failed == 0 and found.unstable.tolist() == [0, 0, 1]
    slope = n @ (m * (1 - np.tanh(kappa * m) ** 2))
    np.testing.assert_allclose(found.growth_rate, [slope - 1, slope - 1, n @ m - 1], atol=1e-7)
    expected = np.array(sorted([-kappa * m, kappa * m, 0 * m], key=lambda point: point[0]))
    voltage = found.voltage.numpy()
    np.testing.assert_allclose(voltage[voltage[:, 0].argsort()], expected, atol=1e-7)


def test_fixed_points_of_a_chaotic_network_are_fixed_and_unstable():
    sde = RateSDE(weights(30, 2.5, 3), 2.0)
    found = fixed_points(sde, 64)
    assert len(found.voltage) > 3 and int(found.found.sum()) + found.failed == 64
    assert float(sde.f(0.0, found.voltage).abs().max()) < 1e-8
    distances = torch.cdist(found.voltage, found.voltage) + torch.eye(len(found.voltage))
    assert float(distances.min()) > 1e-4 and bool((found.unstable > 0).any())
    again = fixed_points(sde, found.voltage)
    assert again.found.tolist() == [1] * len(found.voltage)
    torch.testing.assert_close(again.voltage, found.voltage)


def test_held_out_transitions_have_the_density_of_their_noise():
    W, sigma, dt = weights(4, 1.2), 0.3, 0.1
    h0 = torch.zeros(2, 4, dtype=torch.float64)
    x, h = simulate_rate_network(W, h0, 60, dt, 1.0, noise_std=sigma, generator=0, return_h=True, engine="torch")
    held_out = transition_statistics(x, dt, voltage=h)

    def log_density(weights, sigma):
        mean = h[:, :-1] + dt * (x[:, :-1] @ weights.mT - h[:, :-1])
        return scipy.stats.norm(mean, sigma * math.sqrt(dt)).logpdf(h[:, 1:]).sum()

    n = 2 * 59
    assert held_out_log_likelihood(W, held_out, sigma) == pytest.approx(log_density(W, sigma) / n, rel=1e-9)
    draws, sigmas = torch.stack([W, 0 * W, 1.1 * W]), torch.tensor([0.3, 0.4, 0.3], dtype=torch.float64)
    each = [log_density(one, float(s)) for one, s in zip(draws, sigmas, strict=True)]
    expected = (np.logaddexp.reduce(each) - math.log(3)) / n
    assert held_out_log_likelihood(draws.numpy(), held_out, sigmas) == pytest.approx(expected, rel=1e-9)
    # A Gaussian's expected log density, and what the noise of n·4 residuals leaves.
    entropy = 4 * (0.5 * math.log(2 * math.pi * math.e * sigma**2 * dt))
    assert held_out_log_likelihood(W, held_out, sigma) == pytest.approx(-entropy, abs=4 * math.sqrt(4 / 2 / n))


def test_bad_input_is_named():
    two, moving = RateSDE(np.zeros((2, 3, 3))), RateSDE(np.zeros((3, 3)), input=np.zeros((5, 3)), input_dt=0.1)
    with pytest.raises(ValueError, match="one network at a time"):
        fixed_points(two)
    for call in (fixed_points, lyapunov_exponents):
        with pytest.raises(ValueError, match="constant in time"):
            call(moving)
    with pytest.raises(ValueError, match="level must be one of"):
        lyapunov_exponents(two, level="flow")
    with pytest.raises(ValueError, match="at most the number of neurons, 3"):
        lyapunov_exponents(two, count=4)
    with pytest.raises(ValueError, match=r"starts must be \(start, 3\)"):
        fixed_points(RateSDE(np.zeros((3, 3))), torch.zeros(3))
    statistics = transition_statistics(np.zeros((5, 3)))
    with pytest.raises(ValueError, match=r"weights must be \(3, 3\)"):
        held_out_log_likelihood(np.zeros((2, 2)), statistics, 0.3)


def test_starts_are_as_wide_as_what_the_weights_make_of_rates():
    """With an unscaled drive h balances at τ(Wx + I), with a scaled one at Wx + I, whatever τ is."""
    W = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    wide = {
        (drive, tau): _starts(RateSDE(W, tau=tau, input=torch.ones(6, dtype=torch.float64), drive=drive), 8, 1)[:4]
        for drive in ("scaled", "unscaled") for tau in (1.0, 4.0)
    }  # fmt: skip
    torch.testing.assert_close(wide["scaled", 4.0], wide["scaled", 1.0])
    torch.testing.assert_close(wide["unscaled", 4.0], 4 * wide["unscaled", 1.0])


def test_distance_of_fixed_points_by_hand():
    """The network tanh(2h) − h of one neuron and its copies: 0 and ±a with a = 2 tanh a; a weaker one has 0 alone."""
    a = scipy.optimize.brentq(lambda h: h - 2 * math.tanh(h), 0.5, 3)
    strong, weak = (fixed_points(RateSDE(np.array([[w]])), 32) for w in (2.0, 0.5))
    assert len(strong.voltage) == 3 and len(weak.voltage) == 1
    assert fixed_point_distance(strong, strong) == 0
    for found, true in ((strong, weak), (weak, strong)):
        assert fixed_point_distance(found, true) == pytest.approx(2 * math.tanh(a) / 3, rel=1e-6)
    nothing = FixedPoints(*(torch.zeros(0, 1) for _ in range(4)), failed=3)
    assert math.isnan(fixed_point_distance(nothing, strong))
    # Signs of three neurons of four are the other way round: √(4 · 3/4) apart where rates are 1.
    voltage = 20 * torch.ones(1, 4, dtype=torch.float64)
    one, other = (
        FixedPoints(voltage * torch.tensor([1, s, s, s]), *(torch.zeros(1) for _ in range(3)), failed=0)
        for s in (1, -1)
    )
    assert fixed_point_distance(one, other) == pytest.approx(math.sqrt(3))
