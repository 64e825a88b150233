"""RateSDE against its equations, and as torchsde and torchdiffeq see it."""

import pytest
import torch
import torchdiffeq
import torchsde

from neurosde import BrownianPath, RateSDE, sdeint

D = torch.float64


def network(N=6, gain=1.2, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    return RateSDE(torch.randn(N, N, generator=generator, dtype=D) * gain / N**0.5, **options)


@pytest.mark.parametrize("drive", ["scaled", "unscaled"])
def test_drift_is_the_equation(drive):
    current = torch.linspace(-1, 1, 6, dtype=D)
    sde = network(tau=2.0, input=current, noise_std=0.3, drive=drive)
    h = torch.randn(4, 6, dtype=D)
    for row, drift in zip(h, sde.f(0.0, h), strict=True):
        recurrent = torch.stack([sum(sde.weights[i, j] * torch.tanh(row[j]) for j in range(6)) for i in range(6)])
        expected = (-row + recurrent + current) / 2 if drive == "scaled" else -row / 2 + recurrent + current
        torch.testing.assert_close(drift, expected, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(sde.g(0.0, h), torch.full_like(h, 0.3))


def test_drives_agree_at_tau_one_and_scale_the_gain_elsewhere():
    h = torch.randn(3, 6, dtype=D)
    torch.testing.assert_close(network().f(0.0, h), network(drive="unscaled").f(0.0, h))
    tau = 2.5
    scaled = RateSDE(network().weights * tau, tau=tau)
    torch.testing.assert_close(scaled.f(0.0, h), network(tau=tau, drive="unscaled").f(0.0, h))


def test_weight_i_j_is_from_j_to_i():
    W = torch.zeros(2, 2, dtype=D)
    W[0, 1] = 1.0
    drift = RateSDE(W).f(0.0, torch.tensor([0.0, 3.0], dtype=D))
    assert drift[0] == pytest.approx(torch.tanh(torch.tensor(3.0, dtype=D)).item())
    assert drift[1] == -3.0


def test_torchsde_solves_it_unchanged():
    sde = network(noise_std=0.3)
    h0 = torch.randn(5, 6, dtype=D)
    ts = torch.linspace(0, 2, 21, dtype=D)
    path = BrownianPath.sample((5, 6), 20, 0.1, generator=1, dtype=D)
    theirs = torchsde.sdeint(sde, h0, ts, method="euler", dt=0.1, bm=path)
    torch.testing.assert_close(sdeint(sde, h0, ts, dt=0.1, bm=path), theirs, rtol=1e-12, atol=1e-12)


def test_torchsde_brownian_interval_drives_our_solver():
    sde = network(noise_std=0.3)
    h0 = torch.randn(5, 6, dtype=D)
    ts = torch.linspace(0, 1, 11, dtype=D)
    bm = torchsde.BrownianInterval(0.0, 1.0, size=(5, 6), dtype=D, entropy=3)
    theirs = torchsde.sdeint(sde, h0, ts, method="euler", dt=0.1, bm=bm)
    # The two accumulate time differently, by an ulp; over such an interval Brownian motion moves by sqrt(2e-16) ~ 1e-8.
    torch.testing.assert_close(sdeint(sde, h0, ts, dt=0.1, bm=bm), theirs, rtol=0, atol=1e-7)


def test_torchsde_adjoint_reaches_the_parameters():
    """Its continuous adjoint of the Itô equation is off by O(dt): ten times less at a tenth of the step."""
    sde = RateSDE(torch.nn.Parameter(network().weights), noise_std=0.3)
    assert [name for name, _ in sde.named_parameters()] == ["weights"]
    h0 = torch.randn(2, 6, dtype=D)
    fine = BrownianPath.sample((2, 6), 200, 0.005, generator=1, dtype=D)
    errors = []
    for path in (fine.coarsen(10), fine):
        ts = torch.linspace(0, 1, path.steps + 1, dtype=D)
        gradients = []
        for h in (
            torchsde.sdeint_adjoint(sde, h0, ts, method="euler", dt=path.dt, bm=path),
            sdeint(sde, h0, ts, dt=path.dt, bm=path),
        ):
            gradients += torch.autograd.grad(h[-1].sum(), sde.weights)
        errors.append(float((gradients[0] - gradients[1]).norm() / gradients[1].norm()))
    assert errors[1] < 0.01
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.3)


def test_torchdiffeq_takes_it_as_right_hand_side():
    sde = network()
    h0 = torch.randn(6, dtype=D)
    ts = torch.linspace(0, 1, 11, dtype=D)
    theirs = torchdiffeq.odeint(sde, h0, ts, method="euler")
    torch.testing.assert_close(sdeint(sde, h0, ts, dt=0.1), theirs, rtol=1e-12, atol=1e-12)


def test_time_varying_input_is_held_between_samples():
    current = torch.arange(4, dtype=D).unsqueeze(1).expand(4, 6)
    sde = network(input=current, input_dt=0.5)
    for t, sample in [(0.0, 0), (0.49, 0), (0.5, 1), (0.4999999, 1), (1.7, 3), (9.0, 3)]:
        assert sde.input_at(t)[0] == sample


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"weights": torch.zeros(64, 32)}, ValueError, r"square .*got \(64, 32\)"),
        ({"weights": torch.full((3, 3), torch.nan)}, ValueError, "finite; got 9 NaN"),
        ({"weights": "W"}, TypeError, "weights must be an array"),
        ({"weights": torch.zeros(3, 3, dtype=torch.complex64)}, TypeError, "real"),
        ({"tau": 0.0}, ValueError, "tau must be positive; got 0"),
        ({"tau": -1.0}, ValueError, "tau must be positive; got -1"),
        ({"noise_std": -0.1}, ValueError, "noise_std must be non-negative"),
        ({"noise_std": torch.ones(2)}, ValueError, "noise_std must be a scalar or broadcast"),
        ({"phi": "swish"}, ValueError, "phi must be one of"),
        ({"phi": 3}, TypeError, "phi must be a name"),
        ({"drive": "both"}, ValueError, "drive must be one of"),
        ({"input": torch.ones(4)}, ValueError, r"input must have shape .*got \(4,\)"),
        ({"input": torch.ones(3), "input_dt": 0.1}, ValueError, "time, neuron"),
        ({"input_dt": 0.1}, ValueError, "needs a time-varying input"),
        ({"input": torch.ones(3, dtype=D)}, TypeError, "dtype"),
    ],
)
def test_bad_input_is_named(options, error, match):
    with pytest.raises(error, match=match):
        RateSDE(**{"weights": torch.zeros(3, 3)} | options)
