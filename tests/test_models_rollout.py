"""Lyapunov times and the likelihood through roll-outs: against closed forms, pairs of trajectories and transitions."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from problems import GAUSSIAN, D, normal

from neurosde import BrownianPath, simulate_rate_network
from neurosde.cli import main
from neurosde.datasets import generate_activity_trials, sample_weight_matrix
from neurosde.datasets.recordings import Recording
from neurosde.likelihood import transition_statistics
from neurosde.models import (
    Evidence,
    FunctionGradient,
    FunctionGuidance,
    GuidedDiffusion,
    InferenceConfig,
    RolloutLikelihood,
    folding_time,
    infer,
    lyapunov_time,
)
from neurosde.models.dps import DiffusionPosteriorSampling, PseudoinverseGuidance

DT = 0.1


def recorded(N=3, T=12, g=1.5, sigma=0.3, trials=2, seed=0, tau=1.0, phi="tanh", drive="scaled", current=None):
    """Weights and a recording of them, with the voltage."""
    source = torch.Generator().manual_seed(seed)
    W = torch.randn(N, N, generator=source, dtype=D) * g / N**0.5
    h0 = torch.randn(trials, N, generator=source, dtype=D)
    x, h = simulate_rate_network(
        W, h0, T, DT, tau, current, sigma, return_h=True, phi=phi, drive=drive, generator=source, engine="torch"
    )
    known = None if current is None else current.numpy()
    return W, Recording(x.numpy(), "here", dt=DT, tau=tau, voltage=h.numpy(), input=known, drive=drive)


def with_gradient(function, W):
    W = W.clone().requires_grad_()
    value = function(W)
    return value.detach(), torch.autograd.grad(value.sum(), W)[0]


# Lyapunov times


@pytest.mark.parametrize("drive", ["scaled", "unscaled"])
def test_of_a_constant_normal_jacobian_both_times_are_exact(drive):
    N, c, tau = 6, 3.0, 1.4
    Q = torch.linalg.qr(normal(N, N))[0]
    rest = torch.zeros(2, 301, N, dtype=D)  # φ' = 1
    b = DT / tau if drive == "scaled" else DT
    phases = torch.linalg.eigvals(Q)
    rate = math.log(float((1 - DT / tau + b * c * phases).abs().max())) / DT
    options = {"dt": DT, "tau": tau, "drive": drive}
    assert rate > 0.4
    batch = torch.stack([c * Q, torch.zeros(N, N), 0.5 * Q])
    expected = torch.tensor([1 / rate, math.inf, math.inf], dtype=D)
    torch.testing.assert_close(lyapunov_time(batch, rest, **options), expected)
    torch.testing.assert_close(folding_time(batch, rest, **options), expected)


def test_nearby_trajectories_part_as_fast():
    """Of 100 neurons, noise-free and driven by noise: distances of many pairs of trajectories along one path."""
    N, T, pairs = 100, 800, 48
    W = normal(N, N) * 2.5 / N**0.5
    for sigma in (0.0, 0.1):
        settled = simulate_rate_network(W, normal(N, seed=1), 300, DT, 1.0, return_h=True, engine="torch")[1][-1]
        noise = BrownianPath.sample((N,), T - 1, DT, generator=2, dtype=D).increments
        together = BrownianPath(noise[:, None].expand(-1, pairs + 1, -1), DT)
        h0 = settled + 1e-10 * torch.cat([torch.zeros(1, N, dtype=D), normal(pairs, N, seed=3)])
        _, h = simulate_rate_network(W, h0, T, DT, 1.0, None, sigma, return_h=True, bm=together, engine="torch")
        distance = (h[1:] - h[0]).square().sum((0, -1)).sqrt()
        assert float(distance[-1]) < 1e-3  # still nearby
        parted = float((distance[-1] / distance[(T - 1) // 4]).log()) / (DT * (T - 1 - (T - 1) // 4))
        rate = 1 / float(lyapunov_time(W, h[:1], DT))
        # The norm of a random tangent and the largest singular value differ by a factor within e on a path of 60 τ.
        assert abs(rate - parted) < 1 / 60 and rate > 0.06


def test_gradients_grow_within_the_lyapunov_time_at_the_latest():
    for seed in range(4):
        W, here = recorded(30, 400, 2.5, 0.05, seed=seed)
        path = (torch.as_tensor(here.voltage), DT)
        assert float(folding_time(W, *path)) <= float(lyapunov_time(W, *path)) * 1.01
    assert float(folding_time(W, *path, longest=0.2)) == math.inf
    several = folding_time(torch.stack([W, 0 * W]), *path)
    torch.testing.assert_close(several, torch.stack([folding_time(W, *path), several.new_tensor(math.inf)]))


# The likelihood


@pytest.mark.parametrize("drive", ["scaled", "unscaled"])
def test_of_one_step_it_is_the_transition_likelihood(drive):
    current = normal(20, 3, seed=5)
    _, here = recorded(3, 20, tau=1.3, drive=drive, current=current)
    rates = np.float32(here.activity)
    rates[0, 7] = np.float32(1 - 2**-22)  # saturated: two transitions are left out, and a window ends
    W = normal(4, 3, 3, seed=6)
    settings = {"dt": DT, "tau": 1.3, "drive": drive}
    for given in (here, Recording(rates, "here", input=current.numpy(), **settings)):
        what = {"voltage": given.voltage} if given.voltage is not None else {"activity": given.activity}
        statistics = transition_statistics(**what, **settings, input=current)
        one = RolloutLikelihood(given, 0.4, window=DT, horizon=math.inf)
        assert one.steps == 1 and one.windows == one.transitions == statistics.count
        found = with_gradient(one, W)
        expected = with_gradient(lambda V, s=statistics: s.log_likelihood(V, 0.4), W)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert statistics.dropped == 2
    longer = RolloutLikelihood(given, 0.4, window=1.0, horizon=math.inf)
    assert longer.steps == 10 and longer.windows == 2 + 2 + 1 and longer.transitions == 36  # 6, 10 + 1; 10 + 9


def test_of_a_linear_network_windows_of_any_length_say_the_same():
    W, here = recorded(3, 23, 0.8, phi="linear", current=normal(3, seed=2))
    one, all_of_it = (
        RolloutLikelihood(here, 0.3, window=w, horizon=math.inf, phi="linear", engine="torch") for w in (DT, 2.2)
    )
    assert all_of_it.windows == 2
    for V in (W, normal(2, 3, 3)):
        torch.testing.assert_close(with_gradient(all_of_it, V), with_gradient(one, V), rtol=1e-8, atol=1e-8)


def test_it_is_the_gaussian_of_the_accumulated_covariance():
    """The dense covariance of all deviations of a window, of noise carried along by the Jacobians of the roll-out."""
    N, K, sigma = 2, 4, 0.5
    W, here = recorded(N, K + 1, 2.0, sigma, trials=1)
    h = [torch.as_tensor(here.voltage[0, 0])]
    for _ in range(K):
        h.append(h[-1] + DT * (W @ h[-1].tanh() - h[-1]))
    jacobians = [(1 - DT) * torch.eye(N, dtype=D) + DT * W * (1 - one.tanh().square()) for one in h]
    covariance = torch.zeros(K, N, K, N, dtype=D)
    for j in range(K):  # noise of step j, from state j + 1 on
        carried = [torch.zeros(N, N, dtype=D)] * j + [torch.eye(N, dtype=D)]
        for k in range(j + 1, K):
            carried.append(jacobians[k] @ carried[-1])
        all_times = torch.stack(carried)
        covariance += sigma**2 * DT * torch.einsum("aik,bjk->aibj", all_times, all_times)
    deviation = torch.as_tensor(here.voltage[0, 1:]) - torch.stack(h[1:])
    expected = scipy.stats.multivariate_normal.logpdf(
        deviation.flatten().numpy(), np.zeros(N * K), covariance.reshape(N * K, N * K).numpy()
    )
    found = RolloutLikelihood(here, sigma, window=K * DT, horizon=math.inf)
    assert found.windows == 1 and float(found(W)) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("phi", ["tanh", "sigmoid"])
def test_derivatives_and_batches(phi):
    W, here = recorded(3, 8, phi=phi)
    options = {"window": 0.3, "horizon": math.inf, "phi": phi, "engine": "torch"}
    likelihood = RolloutLikelihood(here, 0.3, **options)
    assert likelihood.windows == 2 * 3
    draws = W + 0.3 * normal(2, 3, 3, seed=4)
    assert torch.autograd.gradcheck(likelihood, draws.clone().requires_grad_())
    assert torch.autograd.gradgradcheck(likelihood, draws[:1].clone().requires_grad_())
    torch.testing.assert_close(likelihood(draws), torch.stack([likelihood(one) for one in draws]))
    assert likelihood(draws.reshape(2, 1, 3, 3)).shape == (2, 1)


@pytest.mark.usefixtures("julia")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (D, 1e-10)])
def test_gradients_through_julia_are_those_through_torch(dtype, tolerance):
    W, here = recorded(20, 100)
    draws = W + 0.1 * normal(5, 20, 20, seed=1)
    values, gradients = zip(
        *(
            with_gradient(RolloutLikelihood(here, 0.3, horizon=0.5, engine=engine, dtype=dtype), draws.to(dtype))
            for engine in ("julia", "torch")
        ),
        strict=True,
    )
    torch.testing.assert_close(*values, rtol=tolerance, atol=0)
    assert float((gradients[0] - gradients[1]).norm() / gradients[1].norm()) < tolerance


def test_chaos_is_met_with_windows_that_bear_it():
    W, here = recorded(20, 1000, 2.5, 0.05, trials=1, seed=14)
    path = (torch.as_tensor(here.voltage), DT)
    lyapunov, horizon = float(lyapunov_time(W, *path)), float(folding_time(W, *path))
    assert 0 < horizon < lyapunov < 100
    off = W + 0.02 * normal(20, 20)
    value, slope = with_gradient(RolloutLikelihood(here, 0.05, window=DT, horizon=horizon), off)
    for window in (None, horizon):
        likelihood = RolloutLikelihood(here, 0.05, window=window, horizon=horizon)
        found, gradient = with_gradient(likelihood, off)
        assert likelihood.window <= horizon and gradient.isfinite().all()
        assert 0.5 < float(gradient.norm() / slope.norm()) < 2 and abs(float(found / value) - 1) < 0.02
    through_all = with_gradient(RolloutLikelihood(here, 0.05, window=99.9, horizon=math.inf), off)[1]
    assert float(through_all.norm() / slope.norm()) > 100
    with pytest.warns(UserWarning, match=r"window = 99.9 is longer than 1.63, .*; it was cut to 16 steps, 1.6"):
        cut = RolloutLikelihood(here, 0.05, window=99.9, horizon=horizon)
    assert cut.steps == 16


# Guidance by it


def test_guided_by_windows_of_one_step_is_guided_by_the_evidence():
    N, unit = 4, 0.6
    _, here = recorded(N, 60)
    statistics = transition_statistics(voltage=here.voltage, dt=DT)
    evidence = Evidence.of(*statistics.precision(0.3)).scaled(unit)
    likelihood = RolloutLikelihood(here, 0.3, window=DT, horizon=math.inf, engine="torch")
    x, s = normal(5, N, N, seed=3), torch.tensor(0.7, dtype=D)
    own = FunctionGuidance(GAUSSIAN, likelihood, N, unit, tolerance=1e-9, iterations=60)
    torch.testing.assert_close(own(x, s), PseudoinverseGuidance(GAUSSIAN, evidence)(x, s), rtol=1e-6, atol=1e-6)
    gradient = FunctionGradient(GAUSSIAN, likelihood, N, unit)
    torch.testing.assert_close(gradient(x, s), DiffusionPosteriorSampling(GAUSSIAN, evidence)(x, s))
    for guidance in ("pigdm", "dps"):
        options = {"guidance": guidance, "steps": 4, "rho": 0.3}
        by_function = GuidedDiffusion(GAUSSIAN, log_prob=lambda J: likelihood(unit * J), **options)
        plain = GuidedDiffusion(GAUSSIAN, **options)
        torch.testing.assert_close(
            by_function.refine(x, evidence, 0).draws, plain.refine(x, evidence, 0).draws, rtol=1e-2, atol=1e-2
        )


def test_the_refiner_says_what_it_did(tmp_path, capsys):
    N = 5
    W = sample_weight_matrix(N, g=2.5, ensemble="dale", generator=0)
    x = generate_activity_trials(W, 2, 41, DT, noise_std=0.3, generator=1)
    np.save(tmp_path / "rec.npy", x.numpy())
    out, refined = tmp_path / "posterior.nc", tmp_path / "refined.nc"
    known = ["--dt", "0.1", "--noise-std", "0.3", "--draws", "4", "--predictive-draws", "2"]
    assert main(["infer", str(tmp_path / "rec.npy"), *known, "--out", str(out)]) == 0
    capsys.readouterr()
    again = ["refine", str(out), "--method", "pigdm", "--likelihood", "rollout", "--rho", "0.3", "--family", "dale"]
    assert main([*again, "--out", str(refined)]) == 0
    assert "of roll-outs over 16 windows of at most 0.5; gradients" in capsys.readouterr().out
    assert main([*again[:4], "--window", "50"]) == 2
    assert "window is for likelihood 'rollout'" in capsys.readouterr().err


def test_a_window_beyond_the_horizon_is_cut_and_noted():
    """Chaos, and draws from it, which are refined through the recording of it."""
    _, here = recorded(20, 1000, 2.5, 0.05, trials=1, seed=14)
    config = InferenceConfig(
        noise_std=0.05, draws=4, predictive_draws=0, refine="dps", likelihood="rollout", window=50.0, rho=0.01
    )
    with pytest.warns(UserWarning, match="window = 50 is longer than"):
        found = infer(here, config)
    assert found.draws.isfinite().all() and any("(50 was asked for)" in note for note in found.notes)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (
            lambda here: RolloutLikelihood(here, 0.3, window=0.05, horizon=1.0),
            "window must be at least a step, dt = 0.1",
        ),
        (lambda here: RolloutLikelihood(here, 0.3, horizon=0.0), "horizon must be a positive time"),
        (lambda here: RolloutLikelihood(here, 0.0, horizon=1.0), "noise_std must be positive"),
        (lambda here: RolloutLikelihood(here, 0.3, horizon=1.0)(normal(4, 4)), r"weights must be \(..., 3, 3\)"),
        (lambda here: lyapunov_time(normal(4, 4), normal(1, 5, 3), DT), r"voltage must be \(trial, time, 4\)"),
        (lambda here: folding_time(normal(3, 3), normal(1, 5, 3), DT, longest=-1.0), "longest must be positive"),
        (lambda here: GuidedDiffusion(GAUSSIAN, "mmps", log_prob=lambda W: W.sum()), "guides by one of"),
        (
            lambda here: InferenceConfig(refine="gibbs", likelihood="rollout"),
            "'rollout' is for draws refined by 'pigdm' or",
        ),
        (lambda here: InferenceConfig(refine="dps", window=1.0), "window is for likelihood 'rollout'"),
        (lambda here: InferenceConfig(likelihood="exact"), "likelihood must be one of"),
        (
            lambda here: InferenceConfig(refine="dps", likelihood="rollout", estimate_input=True),
            "takes the input as known",
        ),
    ],
)
def test_bad_input_says_what_was_expected(call, match):
    with pytest.raises(ValueError, match=match):
        call(recorded()[1])
