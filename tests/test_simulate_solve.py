"""The solvers: engines against each other, gradients, convergence orders and stationary statistics."""

import numpy as np
import pytest
import scipy.linalg
import torch
import torchdiffeq

from neurosde import BrownianPath, RateSDE, odeint, sdeint, simulate_rate_network
from neurosde.activation import ACTIVATIONS

D = torch.float64
ENGINES = ["torch", "torchsde"]


def weights(N, gain=1.2, seed=0, batch=(), dtype=D):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*batch, N, N, generator=generator, dtype=dtype) * gain / N**0.5


def by_hand(W, h0, T, dt, tau, current, sigma, noise, drive="scaled"):
    """The recursion of the README in plain numpy, one network and one trial."""
    h, voltages = h0.copy(), []
    for t in range(T):
        voltages.append(h)
        recurrent = W @ np.tanh(h) + current[t]
        drift = (-h + recurrent) / tau if drive == "scaled" else -h / tau + recurrent
        h = h + dt * drift + sigma * noise[t]
    return np.tanh(np.stack(voltages)), np.stack(voltages)


def test_seed_example():
    W = weights(50, 1.5, dtype=torch.float32).requires_grad_()
    activity = simulate_rate_network(W, torch.randn(50), 100, 0.1, 1.0)
    assert activity.shape == (100, 50)
    activity.square().mean().backward()
    assert W.grad.shape == (50, 50)
    assert bool(W.grad.abs().sum() > 0)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("drive", ["scaled", "unscaled"])
def test_against_numpy(engine, drive):
    rng = np.random.default_rng(0)
    T, N, dt, tau = 12, 5, 0.1, 1.7
    W, h0, current = rng.normal(size=(N, N)), rng.normal(size=N), rng.normal(size=(T, N))
    sigma, noise = rng.uniform(0.1, 0.5, N), rng.normal(size=(T, N)) * dt**0.5
    x, h = simulate_rate_network(
        W,
        h0,
        T,
        dt,
        tau,
        current,
        sigma,
        return_h=True,
        drive=drive,
        engine=engine,
        bm=BrownianPath(torch.tensor(noise[:-1]), dt),
    )
    expected_x, expected_h = by_hand(W, h0, T, dt, tau, current, sigma, noise, drive)
    np.testing.assert_allclose(x, expected_x, rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(h, expected_h, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("engine", ENGINES)
def test_batch_equals_loop(engine):
    """Networks × trials by broadcasting: W (B, 1, N, N) with h0 (B, K, N) gives activity (B, K, T, N)."""
    B, K, T, N = 3, 4, 6, 5
    W, h0 = weights(N, batch=(B, 1)), torch.randn(B, K, N, dtype=D)
    current, sigma = torch.randn(B, 1, T, N, dtype=D), torch.rand(B, 1, 1, dtype=D)
    tau = torch.rand(B, 1, 1, dtype=D) + 0.5
    path = BrownianPath.sample((B, K, N), T - 1, 0.1, generator=0, dtype=D)
    activity = simulate_rate_network(W, h0, T, 0.1, tau, current, sigma, engine=engine, bm=path)
    assert activity.shape == (B, K, T, N)
    for b in range(B):
        for k in range(K):
            alone = simulate_rate_network(
                W[b, 0],
                h0[b, k],
                T,
                0.1,
                float(tau[b]),
                current[b, 0],
                float(sigma[b]),
                bm=BrownianPath(path.increments[:, b, k], 0.1),
            )
            torch.testing.assert_close(activity[b, k], alone, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("W_batch", "h_batch"), [((), ()), ((), (4,)), ((4,), (4,)), ((2, 1), (3,)), ((2, 3), (2, 3))])
def test_any_batch_shape(W_batch, h_batch):
    N, T = 4, 5
    W, h0 = weights(N, batch=W_batch), torch.randn(*h_batch, N, dtype=D)
    batch = torch.broadcast_shapes(W_batch, h_batch)
    activity = simulate_rate_network(W, h0, T, 0.1, 1.0)
    assert activity.shape == (*batch, T, N)
    flat_W = W.expand(*batch, N, N).reshape(-1, N, N)
    flat_h = h0.expand(*batch, N).reshape(-1, N)
    for one, W_one, h_one in zip(activity.reshape(-1, T, N), flat_W, flat_h, strict=True):
        torch.testing.assert_close(one, simulate_rate_network(W_one, h_one, T, 0.1, 1.0), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_engines_agree_to_rounding_on_the_same_seed(dtype):
    sde = RateSDE(weights(20, 1.5, dtype=dtype), noise_std=0.3)
    h0, ts = torch.randn(8, 20, dtype=dtype), torch.arange(50, dtype=D) * 0.1
    paths = [sdeint(sde, h0, ts, dt=0.1, engine=engine, generator=7) for engine in ENGINES]
    tolerance = 200 * torch.finfo(dtype).eps  # rounding grows along a chaotic path, by less than 100 in five tau
    torch.testing.assert_close(*paths, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("source", [lambda seed: seed, lambda seed: torch.Generator().manual_seed(seed)])
def test_the_same_seed_or_generator_is_the_same_noise(source):
    arguments = (weights(5), torch.zeros(3, 5, dtype=D), 10, 0.1, 1.0, None, 0.5)
    one, two, other = (simulate_rate_network(*arguments, generator=source(seed)) for seed in (11, 11, 12))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("phi", ["tanh", "sigmoid", "softplus", "linear", torch.sin])
def test_gradcheck_every_input(engine, phi):
    """The discrete adjoint at 1e-6 in float64, for W, h0, input, σ and τ, through rates and voltages."""
    B, K, T, N = 2, 2, 5, 3
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape):
        return torch.rand(*shape, generator=generator, dtype=D).add_(0.2).requires_grad_()

    inputs = (leaf(B, 1, N, N), leaf(B, K, N), leaf(B, K, T, N), leaf(N), leaf(()))

    def run(W, h0, current, sigma, tau):
        return simulate_rate_network(
            W, h0, T, 0.1, tau, current, sigma, return_h=True, phi=phi, engine=engine, generator=3
        )

    assert torch.autograd.gradcheck(run, inputs, eps=1e-6, atol=1e-6, rtol=1e-6)
    if phi == "tanh":
        assert torch.autograd.gradgradcheck(run, inputs, eps=1e-6, atol=1e-6, rtol=1e-6)


def test_gradient_reaches_the_noise_itself():
    W, h0 = weights(3), torch.randn(3, dtype=D)
    increments = (torch.randn(4, 3, dtype=D) * 0.3).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda dB: simulate_rate_network(W, h0, 5, 0.1, 1.0, noise_std=0.5, bm=BrownianPath(dB, 0.1)), (increments,)
    )


@pytest.mark.parametrize("phi", sorted(ACTIVATIONS))
def test_discrete_adjoint_is_back_propagation(phi):
    W = weights(6).requires_grad_()
    h0, ts = torch.randn(4, 6, dtype=D), torch.arange(20, dtype=D) * 0.1
    gradients = []
    for adjoint in ("discrete", "autograd"):
        for engine in ENGINES:
            h = sdeint(RateSDE(W, noise_std=0.2, phi=phi), h0, ts, dt=0.1, adjoint=adjoint, engine=engine, generator=0)
            gradients += torch.autograd.grad(h.square().sum(), W)
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0], rtol=1e-11, atol=1e-11)


def test_backsolve_converges_to_the_discrete_gradient():
    """The continuous adjoint is wrong by O(dt): its error falls as dt does."""
    W, h0 = weights(4).requires_grad_(), torch.randn(3, 4, dtype=D)
    fine = BrownianPath.sample((3, 4), 160, 1 / 160, generator=0, dtype=D)
    errors = []
    for factor in (16, 4, 1):
        path = fine.coarsen(factor)
        ts = torch.arange(path.steps + 1, dtype=D) * path.dt
        exact, continuous = (
            torch.autograd.grad(
                sdeint(RateSDE(W, noise_std=0.3), h0, ts, dt=path.dt, bm=path, adjoint=adjoint)[-1].sum(), W
            )[0]
            for adjoint in ("discrete", "backsolve")
        )
        errors.append(float((continuous - exact).norm() / exact.norm()))
    assert errors[0] > 2 * errors[1] > 4 * errors[2]


def test_strong_order_one():
    """Additive noise: Euler–Maruyama converges strongly with order 1; the slope is fitted over five step sizes."""
    sde = RateSDE(weights(5, 1.5), noise_std=0.5)
    h0 = torch.randn(400, 5, dtype=D)
    finest = 2**10
    fine = BrownianPath.sample((400, 5), finest, 1 / finest, generator=0, dtype=D)
    reference = sdeint(sde, h0, [0.0, 1.0], dt=fine.dt, bm=fine)[-1]
    steps, errors = [], []
    for factor in (256, 128, 64, 32, 16):
        path = fine.coarsen(factor)
        end = sdeint(sde, h0, [0.0, 1.0], dt=path.dt, bm=path)[-1]
        steps.append(path.dt)
        errors.append(float((end - reference).square().sum(-1).mean().sqrt()))
    slope = np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert 0.9 < slope < 1.15


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("rk4", 4)])
def test_ode_orders(method, order):
    sde, h0 = RateSDE(weights(5, 1.5)), torch.randn(5, dtype=D)
    exact = odeint(sde, h0, [0.0, 1.0], method="dopri5", rtol=1e-12, atol=1e-13)[-1]
    steps = [1 / 8, 1 / 16, 1 / 32]
    errors = [float((odeint(sde, h0, [0.0, 1.0], method=method, dt=dt)[-1] - exact).norm()) for dt in steps]
    assert np.polyfit(np.log(steps), np.log(errors), 1)[0] == pytest.approx(order, abs=0.2)


@pytest.mark.parametrize("method", ["euler", "rk4", "dopri5"])
@pytest.mark.parametrize("adjoint", ["discrete", "autograd", "backsolve"])
def test_odeint_gradients_against_torchdiffeq(method, adjoint):
    W, h0 = weights(4).requires_grad_(), torch.randn(3, 4, dtype=D)
    ts = torch.linspace(0, 1, 201, dtype=D)
    ours = torch.autograd.grad(odeint(RateSDE(W), h0, ts, method=method, adjoint=adjoint)[-1].sum(), W)[0]
    theirs = torch.autograd.grad(
        torchdiffeq.odeint(RateSDE(W), h0, ts, method=method, rtol=1e-7, atol=1e-9)[-1].sum(), W
    )[0]
    tolerance = 0.005 if (method, adjoint) == ("euler", "backsolve") else 1e-6  # O(dt), dt = 0.005
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * float(theirs.abs().max()))


def test_stationary_covariance_solves_the_lyapunov_equation():
    """A linear network is an Ornstein–Uhlenbeck process; the discrete-time Lyapunov equation gives its covariance."""
    N, dt, sigma, K, burn, T = 4, 0.1, 0.5, 4000, 300, 340
    W = weights(N, 0.6)
    h = simulate_rate_network(W, torch.zeros(K, N, dtype=D), T, dt, 1.0, noise_std=sigma, phi="linear", generator=0)[
        :, burn:
    ].numpy()
    J = W.numpy() - np.eye(N)

    def of_the_scheme(dt):
        return scipy.linalg.solve_discrete_lyapunov(np.eye(N) + dt * J, dt * sigma**2 * np.eye(N))

    expected = of_the_scheme(dt)
    final = h[:, -1]
    # Independent trials: the sampling covariance of an entry of the Gaussian sample covariance (Isserlis).
    standard_error = np.sqrt((np.outer(np.diag(expected), np.diag(expected)) + expected**2) / K)
    assert np.abs((final.T @ final / K - expected) / standard_error).max() < 4.0
    # The scheme's covariance tends to the continuous equation's with order 1: its error halves as dt does.
    continuous = scipy.linalg.solve_continuous_lyapunov(J, -(sigma**2) * np.eye(N))
    coarse, fine = (np.linalg.norm(of_the_scheme(step) - continuous) for step in (0.02, 0.01))
    assert coarse / fine == pytest.approx(2, abs=0.1)


def test_onset_of_chaos():
    """Without noise, a network is silent below g = 1 and chaotic above (Sompolinsky et al., 1988)."""
    N, T = 200, 1001
    for gain, active in ((0.7, False), (2.5, True)):
        W = weights(N, gain, seed=1)
        h0 = torch.randn(N, dtype=D, generator=torch.Generator().manual_seed(2))
        x = simulate_rate_network(W, h0, T, 0.1, 1.0)
        nearby = simulate_rate_network(W, h0 + 1e-6, T, 0.1, 1.0)
        separation = float((nearby - x)[-1].norm() / (nearby - x)[0].norm())
        if active:
            assert x[-100:].std() > 0.2
            assert separation > 100
        else:
            assert x[-1].abs().max() < 1e-6
            assert separation < 1e-6


def test_brownian_refinement_passes_through_the_coarse_path():
    coarse = BrownianPath.sample((2000, 3), 4, 0.5, generator=0, dtype=D)
    fine = coarse.refine(8, generator=1)
    torch.testing.assert_close(fine.coarsen(8).increments, coarse.increments, rtol=0, atol=1e-12)
    # variance dt of 192 000 increments: standard error of the ratio sqrt(2/n)
    assert float(fine.increments.var() / fine.dt) == pytest.approx(1, abs=4 * (2 / fine.increments.numel()) ** 0.5)
    torch.testing.assert_close(fine(0.5, 1.0), coarse.increments[1])


def test_output_times_pick_points_of_the_grid():
    sde, h0 = RateSDE(weights(4), noise_std=0.2), torch.randn(2, 4, dtype=D)
    every = sdeint(sde, h0, torch.arange(11, dtype=D) * 0.1 + 5, dt=0.1, generator=0)
    some = sdeint(sde, h0, [5.0, 5.3, 6.0], dt=0.1, generator=0)
    assert torch.equal(some, every[[0, 3, 10]])


def test_time_varying_input_starts_at_time_zero():
    current = torch.randn(10, 3, dtype=D)
    sde = RateSDE(weights(3), input=current, input_dt=0.1)
    whole = sdeint(sde, torch.zeros(3, dtype=D), [0.0, 0.4, 0.9], dt=0.1)
    rest = sdeint(sde, whole[1], [0.4, 0.9], dt=0.1)
    torch.testing.assert_close(rest[-1], whole[-1], rtol=1e-12, atol=1e-13)
    theirs = torchdiffeq.odeint(sde, torch.zeros(3, dtype=D), torch.arange(10, dtype=D) * 0.1, method="euler")
    torch.testing.assert_close(whole[-1], theirs[-1], rtol=1e-12, atol=1e-13)


def test_constant_and_time_varying_input_are_told_apart():
    W, h0, T = weights(3), torch.zeros(4, 3, dtype=D), 4
    per_trial = torch.randn(4, 3, dtype=D)
    with pytest.raises(ValueError, match="reads both as"):
        simulate_rate_network(W, h0, T, 0.1, 1.0, per_trial)
    constant = simulate_rate_network(W, h0, T, 0.1, 1.0, per_trial.unsqueeze(1))
    varying = simulate_rate_network(W, h0, T, 0.1, 1.0, per_trial.expand(4, 4, 3))
    torch.testing.assert_close(constant[2, 1], torch.tanh(0.1 * per_trial[2]))
    torch.testing.assert_close(varying[2, 1], torch.tanh(0.1 * per_trial[0]))
    torch.testing.assert_close(simulate_rate_network(W, h0, 7, 0.1, 1.0, per_trial)[:, :4], constant)


def test_one_time_point_is_the_initial_state():
    x = simulate_rate_network(weights(3), torch.ones(3, dtype=D), 1, 0.1, 1.0, noise_std=1.0)
    torch.testing.assert_close(x, torch.ones(1, 3, dtype=D).tanh())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_follows_the_cpu_path():
    W, h0 = weights(20, 1.5, batch=(3, 1)), torch.randn(3, 4, 20, dtype=D)
    results = []
    for device in ("cpu", "cuda"):
        leaf = W.to(device).requires_grad_()
        x = simulate_rate_network(
            leaf, h0.to(device), 50, 0.1, 1.0, noise_std=0.2, generator=torch.Generator().manual_seed(0)
        )
        results.append((x.cpu(), torch.autograd.grad(x.square().sum(), leaf)[0].cpu()))
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"h0": torch.zeros(5)}, ValueError, r"h0 must be \(\.\.\., 3 neurons\)"),
        ({"h0": torch.zeros(3, dtype=D)}, TypeError, "dtype"),
        ({"W": torch.zeros(2, 3, 3), "h0": torch.zeros(5, 3)}, ValueError, "do not broadcast"),
        ({"h0": torch.tensor([0.0, 0.0, torch.inf])}, ValueError, "h0 must be finite; got 1"),
        ({"T": 0}, ValueError, "T must be at least 1; got 0"),
        ({"T": 2.5}, TypeError, "T must be an integer"),
        ({"dt": 0.0}, ValueError, "dt must be positive"),
        ({"dt": float("nan")}, ValueError, "dt must be positive"),
        ({"dt": "0.1"}, TypeError, "dt must be a number"),
        ({"noise_std": -1.0}, ValueError, "noise_std must be non-negative"),
        ({"I": torch.zeros(7, 3)}, ValueError, "I must broadcast to"),
        ({"adjoint": "reverse"}, ValueError, "adjoint must be one of"),
        ({"engine": "cuda"}, ValueError, "engine must be one of"),
        ({"engine": "torch", "adjoint": "backsolve"}, ValueError, "torchsde's"),
        ({"noise_std": 0.1, "generator": 1, "bm": BrownianPath(torch.zeros(4, 3), 0.1)}, TypeError, "got both"),
        ({"noise_std": 0.1, "generator": 1.5}, TypeError, "int seed"),
        ({"noise_std": 0.1, "bm": BrownianPath(torch.zeros(4, 2), 0.1)}, ValueError, "bm must give increments"),
        ({"noise_std": 0.1, "bm": BrownianPath(torch.zeros(2, 3), 0.1)}, ValueError, "not a grid point"),
    ],
)
def test_bad_input_is_named(options, error, match):
    arguments = {"W": torch.zeros(3, 3), "h0": torch.zeros(3), "T": 5, "dt": 0.1, "tau": 1.0} | options
    with pytest.raises(error, match=match):
        simulate_rate_network(**arguments)


def test_options_that_do_not_apply_are_refused():
    sde, h0 = RateSDE(torch.zeros(3, 3)), torch.zeros(3)
    with pytest.raises(ValueError, match="dt is the step of fixed-step methods"):
        odeint(sde, h0, [0.0, 0.1], method="dopri5", dt=0.1)
    with pytest.raises(ValueError, match="must run forwards"):
        BrownianPath(torch.zeros(4, 3), 0.1)(0.3, 0.1)
    with pytest.raises(ValueError, match="^dt must be positive"):
        simulate_rate_network(torch.zeros(3, 3), h0, 5, -0.1, 1.0, torch.zeros(5, 3))


def test_bad_times_are_named():
    sde, h0 = RateSDE(torch.zeros(3, 3)), torch.zeros(3)
    with pytest.raises(ValueError, match="grid"):
        sdeint(sde, h0, [0.0, 0.25], dt=0.1)
    with pytest.raises(ValueError, match="strictly increasing"):
        sdeint(sde, h0, [0.0, 0.2, 0.1], dt=0.1)
    with pytest.raises(TypeError, match="sde must be a neurosde.RateSDE"):
        sdeint(torch.nn.Linear(3, 3), h0, [0.0, 0.1], dt=0.1)
    with pytest.raises(ValueError, match="method must be 'euler'"):
        sdeint(sde, h0, [0.0, 0.1], dt=0.1, method="srk")


def test_a_step_longer_than_tau_warns():
    with pytest.warns(UserWarning, match="larger than tau"):
        simulate_rate_network(torch.zeros(3, 3), torch.zeros(3), 5, 1.5, 1.0)
