"""Transition statistics and likelihood against sums and densities written out by hand."""

import numpy as np
import pytest
import scipy.integrate
import scipy.stats
import torch

from neurosde import likelihood, simulate_rate_network
from neurosde.likelihood import transition_statistics

D = torch.float64


def recording(N=4, T=60, trials=3, gain=1.2, sigma=0.3, seed=0, current=None, tau=1.0, drive="scaled", dt=0.1):
    generator = torch.Generator().manual_seed(seed)
    W = gain / N**0.5 * torch.randn(N, N, generator=generator, dtype=D)
    h0 = torch.randn(trials, N, generator=generator, dtype=D)
    x, h = simulate_rate_network(W, h0, T, dt, tau, current, sigma, return_h=True, generator=generator, drive=drive)
    return W, x, h


@pytest.mark.parametrize("drive", ["scaled", "unscaled"])
def test_sums_and_density_by_hand(drive):
    tau, dt, sigma = 1.7, 0.1, 0.3
    current = torch.linspace(-1, 1, 4, dtype=D)
    W, x, h = recording(tau=tau, drive=drive, current=current, sigma=sigma)
    statistics = transition_statistics(x, dt, tau, input=current, drive=drive)
    xx = np.zeros((4, 4))
    log_density = 0.0
    for trial in range(3):
        for t in range(59):
            before, after, rate = h[trial, t].numpy(), h[trial, t + 1].numpy(), x[trial, t].numpy()
            recurrent = W.numpy() @ rate + current.numpy()
            drift = (-before + recurrent) / tau if drive == "scaled" else -before / tau + recurrent
            log_density += scipy.stats.norm.logpdf(after, before + dt * drift, sigma * dt**0.5).sum()
            xx += np.outer(rate, rate)
    np.testing.assert_allclose(statistics.xx, xx, rtol=1e-12)
    assert statistics.count == 177 and statistics.dropped == 0
    assert float(statistics.log_likelihood(W, sigma)) == pytest.approx(log_density, rel=1e-10)


def test_precision_is_the_quadratic_form_of_the_likelihood():
    W, x, _ = recording()
    statistics = transition_statistics(x, 0.1)
    Lambda, B = statistics.precision(0.3)
    others = torch.randn(5, 4, 4, dtype=D)
    quadratic = (others * B).sum((-1, -2)) - 0.5 * (others @ Lambda * others).sum((-1, -2))
    difference = statistics.log_likelihood(others, 0.3) - quadratic
    torch.testing.assert_close(difference, difference[:1].expand(5), rtol=1e-10, atol=0)


def test_log_likelihood_is_differentiable():
    _, x, _ = recording()
    statistics = transition_statistics(x, 0.1)
    W = torch.randn(2, 4, 4, dtype=D, requires_grad=True)
    sigma = torch.tensor(0.4, dtype=D, requires_grad=True)
    assert torch.autograd.gradcheck(statistics.log_likelihood, (W, sigma))


def test_trials_add_and_streaming_changes_nothing(monkeypatch):
    _, x, _ = recording()
    whole = transition_statistics(x, 0.1)
    added = transition_statistics(x[:1], 0.1) + transition_statistics(x[1:], 0.1)
    monkeypatch.setattr(likelihood, "CHUNK", 28)  # seven samples at a time
    streamed = transition_statistics(x, 0.1)
    for other in (added, streamed):
        assert other.count == whole.count
        for name in ("xx", "yx", "yy", "x", "y"):
            torch.testing.assert_close(getattr(other, name), getattr(whole, name), rtol=1e-12, atol=1e-12)


def test_a_free_input_is_integrated_out():
    """One neuron: the likelihood integrated over the input numerically."""
    W, x, _ = recording(N=1, T=12, trials=1, current=torch.tensor([0.7], dtype=D))
    free = transition_statistics(x, 0.1).without_input()

    def density(current):
        return float(transition_statistics(x, 0.1, input=torch.tensor([current])).log_likelihood(W, 0.3))

    peak = max(density(value) for value in np.linspace(-5, 5, 201))
    integral, _ = scipy.integrate.quad(lambda value: np.exp(density(value) - peak), -15, 15, points=[0.7], limit=200)
    assert float(free.log_likelihood(W, 0.3)) == pytest.approx(np.log(integral) + peak, abs=1e-6)


def test_voltage_and_rates_say_the_same():
    _, x, h = recording()
    torch.testing.assert_close(transition_statistics(x, 0.1).yx, transition_statistics(voltage=h, dt=0.1).yx)


def test_saturated_transitions_are_dropped_and_counted():
    _, x, h = recording(gain=6.0, N=8, T=200)
    single = x.float()
    error = 0.5 * torch.finfo(torch.float32).eps * single.abs() / (1 - single * single).clamp_min(1e-12)
    keep = (single.abs() < 1).all(0).all(-1)
    single = single[:, keep]  # what rounds to exactly ±1 is refused, see below
    statistics = transition_statistics(single, 0.1)
    bad = (error[:, keep] > 1e-3).any(-1)
    assert statistics.dropped == int((bad[:, 1:] | bad[:, :-1]).sum()) > 0
    assert statistics.count + statistics.dropped == 3 * (single.shape[1] - 1)
    assert transition_statistics(voltage=h.float(), dt=0.1).dropped == 0


def test_noise_floor_is_the_rounding_of_the_recording():
    """Without noise, what is left of y − Wφ is rounding: the floor announces its size."""
    W, x, _ = recording(sigma=0.0, N=20, gain=2.0, T=40)
    statistics = transition_statistics(x.float(), 0.1)
    assert statistics.dropped == 0
    rounded = torch.atanh(x.float().double())
    y = (rounded[:, 1:] - 0.9 * rounded[:, :-1]) / 0.1
    residual = float((y - x[:, :-1] @ W.mT).square().mean().sqrt())
    # The floor takes eps |x|/2, the largest error; errors are uniform below it, so their rms is 1/√3 to 1/(2√3) of it.
    ratio = residual / statistics.noise_scale(statistics.noise_floor)
    assert 0.5 / 3**0.5 * 0.95 < ratio < 1 / 3**0.5 * 1.05


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"activity": np.array([[0.1, 1.0], [0.2, 0.3]])}, "strictly between -1.0 and 1.0.*got 1 values"),
        ({"activity": np.zeros((1, 3))}, "at least two times"),
        ({"activity": np.full((4, 3), np.nan)}, "finite; got 12"),
        ({"activity": np.zeros((4, 3), dtype=int)}, "floating-point"),
        ({"activity": None}, "got neither"),
        ({"activity": np.zeros((4, 3)), "input": np.zeros(2)}, r"input must be \(3,\)"),
        ({"activity": np.zeros((4, 3)), "phi": "relu"}, "cannot be inverted"),
        ({"activity": np.zeros((4, 3)), "dt": -0.1}, "dt must be positive"),
        ({"activity": np.full((4, 3), np.float32(1) - np.float32(6e-8))}, "all 3 transitions are saturated"),
    ],
)
def test_bad_input_is_named(options, match):
    with pytest.raises(ValueError, match=match):
        transition_statistics(**options)


def test_statistics_of_different_recordings_do_not_add():
    x = np.random.default_rng(0).uniform(-0.5, 0.5, (9, 3))
    one = transition_statistics(x, 0.1)
    with pytest.raises(ValueError, match="same neurons"):
        one + transition_statistics(x, 0.2)
    with pytest.raises(ValueError, match="add recordings first"):
        one + one.without_input()
    with pytest.raises(ValueError, match="noise_std must be positive"):
        one.precision(0.0)
