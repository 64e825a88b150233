"""The Julia engine's numbers: against torch's, against definitions, and against themselves on other thread counts."""

import os
import subprocess
from dataclasses import replace
from pathlib import Path

import mpmath
import numpy as np
import pytest
import scipy.stats
import torch

import neurosde.julia
from neurosde import BrownianPath, RateSDE, odeint, sdeint, simulate_rate_network
from neurosde.activation import ACTIVATIONS, Activation
from neurosde.brownian import BrownianSeeds
from neurosde.datasets.build_dataset import DatasetConfig, settled_engine
from neurosde.engines import Work, select_engine
from neurosde.julia import choice
from neurosde.julia.engine import ACTIVATIONS as NAMES
from neurosde.julia.worker import describe, get_worker
from neurosde.philox import normals

pytestmark = pytest.mark.usefixtures("julia")

D = torch.float64
DT = 0.1
TOLERANCES = {torch.float32: 1e-5, D: 1e-12}  # largest difference over largest value, as `neurosde doctor` has them
SHAPES = [((), ()), ((), (4,)), ((4,), (4,)), ((2, 1), (3,)), ((2, 3), (2, 3))]


def weights(N, batch=(), dtype=D, gain=1.2):
    return torch.randn(*batch, N, N, dtype=dtype) * gain / N**0.5


def close(found, expected, tolerance=None):
    """The largest difference is within the tolerance, relative to the largest value."""
    if isinstance(expected, tuple):
        assert isinstance(found, tuple) and len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            close(one, other, tolerance)
        return
    assert found.shape == expected.shape and found.dtype == expected.dtype
    tolerance = TOLERANCES[expected.dtype] if tolerance is None else tolerance
    if expected.numel():
        assert float((found - expected).abs().max()) <= tolerance * float(expected.abs().max())


def on_both(run, tolerance=None):
    """Run on both engines and compare; returns Julia's."""
    found, expected = run("julia"), run("torch")
    close(found, expected, tolerance)
    return found


@pytest.fixture
def one_thread():
    """Small work is done sooner by one thread where others use the machine too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("phi", NAMES)
def test_every_nonlinearity_and_size(phi, dtype):
    for N in (1, 3, 8, 50, 67):
        for K, T in ((1, 1), (5, 2), (13, 12)):
            W, h0, tau = weights(N, dtype=dtype), torch.randn(K, N, dtype=dtype), torch.rand(N, dtype=dtype) + 0.7
            sigma = torch.rand(N, dtype=dtype)
            path = BrownianPath.sample((K, N), T - 1, DT, generator=1, dtype=dtype)
            for options in ({"drive": "scaled", "bm": path}, {"drive": "unscaled", "generator": 1}):
                on_both(
                    lambda e, W=W, h0=h0, T=T, tau=tau, sigma=sigma, options=options: simulate_rate_network(
                        W, h0, T, DT, tau, None, sigma, return_h=True, phi=phi, engine=e, **options
                    )
                )


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("W_batch", "h_batch"), SHAPES)
@pytest.mark.parametrize("T", [1, 2, 9])
def test_batches_inputs_and_noise(W_batch, h_batch, T, dtype):
    N = 5
    batch = tuple(torch.broadcast_shapes(W_batch, h_batch))
    W, h0 = weights(N, W_batch, dtype), torch.randn(*h_batch, N, dtype=dtype)
    own = torch.randn(*batch, 1, N, dtype=dtype)  # an axis of length 1 is repeated in time
    inputs = [None, torch.randn(N, dtype=dtype), torch.randn(*batch, T, N, dtype=dtype), own]
    if (T, N) not in (batch[-2:], batch[-1:]):
        inputs.append(torch.randn(*(1 for _ in batch), T, N, dtype=dtype))  # shared by the trials
    path = BrownianPath.sample((*batch, N), T - 1, DT, generator=2, dtype=dtype)
    for i, current in enumerate(inputs):
        for j, sigma in enumerate((0.0, 0.3, torch.rand(N, dtype=dtype), torch.rand(*batch, N, dtype=dtype))):
            noise = ({"bm": path}, {"generator": 0})[(i + j) % 2]
            on_both(
                lambda e, current=current, sigma=sigma, noise=noise: simulate_rate_network(
                    W, h0, T, DT, 1.3, current, sigma, engine=e, **noise
                )
            )
    on_both(lambda e: simulate_rate_network(W, h0, T, DT, 1.3, noise_std=0.3, return_h=True, engine=e, generator=5))


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_seeds_of_single_entries_and_generators(dtype):
    W, h0 = weights(5, (3, 1), dtype), torch.randn(3, 4, 5, dtype=dtype)
    seeds = BrownianSeeds([7, -2, 2**63 + 11])
    whole = on_both(lambda e: simulate_rate_network(W, h0, 9, DT, 1.0, noise_std=0.5, engine=e, bm=seeds))
    alone = simulate_rate_network(W[1, 0], h0[1], 9, DT, 1.0, noise_std=0.5, engine="julia", generator=-2)
    close(whole[1], alone)
    trials = BrownianSeeds([3, 4, 5])  # one for every trial of one network
    on_both(lambda e: simulate_rate_network(W[0, 0], h0[:, 0], 9, DT, 1.0, noise_std=0.5, engine=e, bm=trials))
    on_both(
        lambda e: simulate_rate_network(
            W, h0, 9, DT, 1.0, noise_std=0.5, engine=e, generator=torch.Generator().manual_seed(3)
        )
    )


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_solvers(dtype):
    current = torch.randn(30, 6, dtype=dtype)
    sde = RateSDE(weights(6, (2, 1), dtype), 1.3, current, 0.4, input_dt=DT)
    h0, every = torch.randn(2, 3, 6, dtype=dtype), torch.arange(21, dtype=D) * DT + 0.5
    h = on_both(lambda e: sdeint(sde, h0, every, dt=DT, engine=e, generator=4))
    some = on_both(lambda e: sdeint(sde, h0, every[[0, 3, 20]], dt=DT, engine=e, generator=4))
    assert torch.equal(some, h[[0, 3, 20]])
    on_both(lambda e: odeint(sde, h0, every, engine=e))
    on_both(lambda e: odeint(sde, h0, [0.5, 2.5], dt=DT, engine=e))
    on_both(lambda e: sdeint(sde, h0, [0.5], dt=DT, engine=e, generator=4))


def test_nothing_to_do():
    for K, T in ((0, 5), (0, 1)):
        W = weights(3).requires_grad_()
        x = on_both(
            lambda e, W=W, K=K, T=T: simulate_rate_network(
                W, torch.zeros(K, 3, dtype=D), T, DT, 1.0, noise_std=0.1, engine=e, generator=0
            )
        )
        assert x.shape == (0, T, 3)
        assert torch.equal(torch.autograd.grad(x.sum(), W)[0], torch.zeros(3, 3, dtype=D))


def leaf(*shape):
    return torch.rand(*shape, dtype=D).add_(0.2).requires_grad_()


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("phi", NAMES)
@pytest.mark.parametrize("varying", [False, True])
def test_gradcheck_every_input(phi, varying):
    """At 1e-6 in float64 on 3 neurons × 5 steps: W, h0, I, σ, τ and the increments, of rates, of voltages, of both."""
    B, K, T, N = 2, 2, 5, 3
    current = leaf(B, K, T, N) if varying else leaf(B, 1, N)
    inputs = (leaf(B, 1, N, N), leaf(B, K, N), current, leaf(N), leaf(N), leaf(T - 1, B, K, N))
    ts = torch.arange(T, dtype=D) * DT

    def simulated(W, h0, current, sigma, tau, increments, return_h=False):
        # (2, 1, 3) could be read as one time for every network: unsqueezed, it can only be constant
        given = current if varying else current.unsqueeze(-2)
        noise = BrownianPath(increments, DT)
        return simulate_rate_network(W, h0, T, DT, tau, given, sigma, return_h, phi=phi, engine="julia", bm=noise)

    def solved(W, h0, current, sigma, tau, increments):
        sde = RateSDE(W, tau, current, sigma, phi, input_dt=DT if varying else None)
        return sdeint(sde, h0, ts, dt=DT, engine="julia", bm=BrownianPath(increments, DT))

    for run in (simulated, solved, lambda *tensors: simulated(*tensors, return_h=True)):
        assert torch.autograd.gradcheck(run, inputs, eps=1e-6, atol=1e-6, rtol=1e-6)


def test_gradcheck_of_noise_that_is_drawn():
    inputs = (leaf(2, 1, 3, 3), leaf(2, 2, 3), leaf(2, 2, 3), leaf(()))
    assert torch.autograd.gradcheck(
        lambda W, h0, sigma, tau: simulate_rate_network(
            W, h0, 6, DT, tau, noise_std=sigma, return_h=True, engine="julia", generator=8
        ),
        inputs,
        eps=1e-6,
        atol=1e-6,
        rtol=1e-6,
    )


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(
    ("W_batch", "h_batch", "N"),
    [(*shape, 5) for shape in SHAPES] + [((), (40,), 50), ((9, 1), (5,), 8), ((2, 1), (130,), 67), ((), (), 1)],
)
def test_gradients_of_batches(W_batch, h_batch, N, dtype):
    batch = tuple(torch.broadcast_shapes(W_batch, h_batch))
    for T in (1, 2, 30):
        tensors = (
            weights(N, W_batch, dtype),
            torch.randn(*h_batch, N, dtype=dtype),
            torch.randn(*batch, T, N, dtype=dtype),
            torch.rand(*batch, N, dtype=dtype) + 0.1,
            torch.rand(N, dtype=dtype) + 0.7,
        )
        cotangents = [torch.randn(*batch, T, N, dtype=dtype) for _ in range(2)]

        def gradients(engine, T=T, tensors=tensors, cotangents=cotangents):
            leaves = [tensor.clone().requires_grad_() for tensor in tensors]
            W, h0, current, sigma, tau = leaves
            paths = simulate_rate_network(W, h0, T, DT, tau, current, sigma, return_h=True, engine=engine, generator=6)
            found = []
            for wanted in (slice(0, 1), slice(1, 2), slice(0, 2)):  # of the rates, of the voltages, of both
                found += torch.autograd.grad(
                    paths[wanted], leaves, cotangents[wanted], retain_graph=True, materialize_grads=True
                )
            return tuple(found)

        on_both(gradients, tolerance=5 * TOLERANCES[dtype])  # sums of up to 4000 terms, on a path that is off already


@pytest.mark.parametrize("K", [3, 60])  # paths copied out of shared memory, and paths on it
def test_cotangents_of_any_layout(K):
    """Sums expand one number over the path; transposed, sliced and indexed paths have gradients of any stride."""
    N, T, B = 7, 12, 2
    random = torch.randn(B, K, T, N, dtype=D)
    losses = {
        "sum": lambda x: x.sum(),
        "mean": lambda x: x.mean(),
        "over time": lambda x: (x.sum(2) * random[:, :, 0]).sum(),
        "over neurons": lambda x: (x.sum(3) * random[..., 0]).sum(),
        "over trials": lambda x: (x.sum(1) * random[:, 0]).sum(),
        "over networks": lambda x: (x.sum(0) * random[0]).sum(),
        "transposed": lambda x: (x.transpose(2, 3) * random.transpose(2, 3).contiguous()).sum(),
        "permuted": lambda x: (x.permute(3, 0, 2, 1) * random.permute(3, 0, 2, 1).contiguous()).sum(),
        "last": lambda x: (x[:, :, -1] * random[:, :, 1]).sum(),
        "every third": lambda x: (x[:, :, ::3] * random[:, :, :4]).sum(),
        "one neuron": lambda x: (x[..., 4] * random[..., 0]).sum(),
        "indexed": lambda x: (x[:, :, [5, 1, 5]] * random[:, :, :3]).sum(),
        "of shared memory": lambda x: (x * x.detach()).sum(),
    }
    for name, loss in losses.items():

        def gradients(engine, loss=loss):
            leaves = (
                weights(N, (B, 1)).mul_(0).add_(0.1).requires_grad_(),
                torch.ones(B, K, N, dtype=D).requires_grad_(),
            )
            x = simulate_rate_network(*leaves, T, DT, 1.0, noise_std=0.3, engine=engine, generator=1)
            return torch.autograd.grad(loss(x), leaves)

        try:
            on_both(gradients, 1e-11)
        except AssertionError as error:
            raise AssertionError(name) from error


def test_second_derivatives():
    leaves = (leaf(2, 1, 3, 3), leaf(2, 2, 3), leaf(2, 2, 5, 3), leaf(3), leaf(()))
    direction = [torch.randn_like(tensor) for tensor in leaves]

    def product(engine):  # with the Hessian
        W, h0, current, sigma, tau = leaves
        x, h = simulate_rate_network(W, h0, 5, DT, tau, current, sigma, return_h=True, engine=engine, generator=3)
        first = torch.autograd.grad(x.square().sum() + h.pow(3).sum(), leaves, create_graph=True)
        return torch.autograd.grad(first, leaves, direction)

    on_both(product)


def test_a_loss_that_leaves_the_path_alone():
    W = leaf(3, 3)
    x, h = simulate_rate_network(W, torch.zeros(3, dtype=D), 4, DT, 1.0, return_h=True, engine="julia")
    assert torch.autograd.grad(W.sum() + 0 * x.detach().sum(), W)[0].eq(1).all()
    assert torch.autograd.grad(h.sum(), W)[0].isfinite().all()
    with torch.no_grad():
        assert not simulate_rate_network(W, torch.zeros(3, dtype=D), 4, DT, 1.0, engine="julia").requires_grad


@pytest.mark.parametrize("K", [1, 9000])
def test_a_path_changed_in_place_is_noticed(K):
    x = simulate_rate_network(leaf(3, 3), torch.zeros(K, 3, dtype=D), 4, DT, 1.0, engine="julia")
    x.detach().mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace|been modified inplace"):
        x.sum().backward()


def test_threads_do_not_matter():
    threads = torch.get_num_threads()
    if get_worker().running and get_worker().threads < 2:
        get_worker().stop()
    try:
        for W_batch, K, N in (((), 37, 50), ((), 2, 8), ((3, 1), 5, 67), ((9, 1), 4, 20)):
            W = weights(N, W_batch, torch.float32).requires_grad_()
            h0 = torch.randn(*W_batch[:1], K, N).requires_grad_()
            tau, sigma = (torch.rand(N).add_(0.7).requires_grad_() for _ in range(2))
            results = []
            for count in (2, 1):
                torch.set_num_threads(count)
                x = simulate_rate_network(W, h0, 40, DT, tau, None, sigma, engine="julia", generator=2)
                results.append((x.detach(), *torch.autograd.grad(x.square().sum(), (W, h0, tau, sigma))))
            assert get_worker().threads >= 2
            assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def ten_million(julia):
    """The increments of 10 networks × 20 trials × 50 neurons × 1000 steps: W = 0 and a = 0 leave nothing else of h."""
    zeros = torch.zeros(10, 1, 50, 50)
    h = simulate_rate_network(
        zeros, torch.zeros(10, 20, 50), 1001, 1.0, 1.0, noise_std=1.0, phi="linear", engine="julia", generator=5
    )
    return h[:, :, 1:].permute(2, 0, 1, 3).double()


def test_noise_is_the_normals_of_its_seed(ten_million):
    for start in (0, 900):
        expected = normals(torch.tensor([5]), 100, 10_000, start=start).view(100, 10, 20, 50).double()
        assert float((ten_million[start : start + 100] - expected).abs().max()) < 1e-5


def test_normal_law(ten_million):
    z = ten_million.flatten()
    assert scipy.stats.kstest(z.numpy(), "norm").pvalue > 1e-3
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170)):
        assert float((z**power).mean()) == pytest.approx(moment, abs=4 * (variance / len(z)) ** 0.5), power
    for sigmas in (4, 5):
        low, high = scipy.stats.poisson.ppf([1e-4, 1 - 1e-4], len(z) * scipy.stats.norm.sf(sigmas))
        assert all(low <= int((side * z > sigmas).sum()) <= high for side in (-1, 1))


def test_networks_trials_steps_and_neurons_are_independent(ten_million):
    z = ten_million
    pairs = {
        "steps": (z[1:], z[:-1]),
        "networks": (z[:, 1:], z[:, :-1]),
        "trials": (z[:, :, 1:], z[:, :, :-1]),
        "neurons": (z[..., 1:], z[..., :-1]),
        "sixteenth neurons": (z[..., 16:], z[..., :-16]),
    }
    for name, (a, b) in pairs.items():
        bound = 4 / a.numel() ** 0.5
        assert abs(float((a * b).mean())) < bound, name
        assert abs(float(((a**2 - 1) * (b**2 - 1)).mean())) / 2 < bound, name


def rates(h, phi):
    """φ(h) as the engine computes it: a path of one point."""
    return simulate_rate_network(torch.zeros(1, 1, dtype=h.dtype), h[:, None], 1, DT, 1.0, phi=phi, engine="julia")[
        :, 0, 0
    ]


EXACT = {
    "tanh": mpmath.tanh,
    "sigmoid": lambda h: 1 / (1 + mpmath.exp(-h)),
    "softplus": lambda h: mpmath.log1p(mpmath.exp(h)),
    "relu": lambda h: max(h, mpmath.mpf(0)),
    "linear": lambda h: h,
}


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 3e-7), (D, 1e-14)])
@pytest.mark.parametrize("phi", NAMES)
def test_error_of_the_nonlinearity(phi, dtype, bound):
    """Over the whole range: absolute below 1, relative above."""
    small = torch.logspace(-30, 0, 150, dtype=D)
    h = torch.cat([torch.linspace(-30, 30, 1000, dtype=D), small, -small, 100 * small, -100 * small]).to(dtype)
    with mpmath.workdps(40):
        exact = [EXACT[phi](mpmath.mpf(float(v))) for v in h]
        errors = [abs(x - float(y)) / max(1, abs(x)) for x, y in zip(exact, rates(h, phi), strict=True)]
    assert max(errors) <= bound


def test_error_of_tanh_in_float32_at_a_million_points():
    h = torch.cat([torch.linspace(-12, 12, 10**6), torch.linspace(-0.7, 0.7, 10**5)])
    x = rates(h, "tanh")
    assert float((x.double() - h.double().tanh()).abs().max()) <= 3e-7
    assert x.abs().max() <= 1
    assert torch.equal(rates(-h, "tanh"), -x)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("phi", NAMES)
def test_extreme_values(phi, dtype):
    largest = torch.finfo(dtype).max
    h = torch.tensor([largest, -largest, 1e30, -1e30, 1000, -1000, 90, -90, 0.0, -0.0, 1e-40], dtype=dtype)
    torch.testing.assert_close(rates(h, phi), ACTIVATIONS[phi](h), rtol=1e-6, atol=1e-30)


def test_what_diverges_diverges_as_in_torch():
    """Overflow gives inf and NaN where torch has them; nothing hangs or raises."""
    W = torch.full((3, 3), 1e30)
    x = simulate_rate_network(W, torch.ones(3), 6, DT, 1.0, phi="linear", engine="julia")
    expected = simulate_rate_network(W, torch.ones(3), 6, DT, 1.0, phi="linear", engine="torch")
    torch.testing.assert_close(x, expected, equal_nan=True)
    assert not x.isfinite().all()


def test_arguments_on_shared_memory_are_taken_as_they_are():
    """Paths as initial states, inputs and weights: whole, sliced, transposed, and of the wrong alignment."""
    N = 60
    W, h0 = weights(N), torch.randn(40, N, dtype=D)
    x = simulate_rate_network(W, h0, 64, DT, 1.0, noise_std=0.2, engine="julia", generator=0)
    assert get_worker().arena.offset_of(x) is not None
    before = x.clone()
    for state in (x[:, 3], x[5], x[7, 1:, :], x[:, -1].flip(0), x[:, :, 0].unsqueeze(-1).expand(-1, -1, N)[:, 2]):
        on_both(lambda e, state=state: simulate_rate_network(W, state, 10, DT, 1.0, engine=e))
    on_both(lambda e: simulate_rate_network(x[0, :N] / 8, h0, 10, DT, 1.0, engine=e))
    on_both(lambda e: simulate_rate_network(x[0, 1 : N + 1].mT / 8, h0, 10, DT, 1.0, engine=e))
    on_both(lambda e: simulate_rate_network(W, h0, 64, DT, 1.0, x, engine=e))
    on_both(lambda e: simulate_rate_network(W, h0[0], 64, DT, 1.0, x[3], x[1, 1].abs(), engine=e, generator=0))
    assert torch.equal(x, before)


@pytest.mark.parametrize("adjoint", ["autograd", "backsolve"])
def test_other_adjoints_are_refused(adjoint):
    W = weights(3).requires_grad_()
    with pytest.raises(ValueError, match=adjoint):
        sdeint(RateSDE(W), torch.zeros(3, dtype=D), [0.0, 0.5], dt=DT, engine="julia", adjoint=adjoint)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(ValueError, match=f"float32 and float64; got {dtype}"):
        simulate_rate_network(torch.zeros(3, 3, dtype=dtype), torch.zeros(3, dtype=dtype), 5, DT, 1.0, engine="julia")


def tanh(h):
    return 2 * torch.tanh(h)


@pytest.mark.parametrize("phi", [torch.sin, tanh, Activation("tanh", tanh)])
def test_own_nonlinearities_are_refused_whatever_their_name(phi):
    arguments = (weights(3), torch.ones(3, dtype=D), 5, DT, 1.0)
    with pytest.raises(ValueError, match="phi"):
        simulate_rate_network(*arguments, phi=phi, engine="julia")


def test_other_devices_are_refused():
    work = Work(
        networks=1,
        trajectories=1,
        neurons=3,
        steps=5,
        noisy=False,
        gradient=False,
        recorded=False,
        phi="tanh",
        dtype=D,
        device=torch.device("cuda", 0),
    )
    with pytest.raises(ValueError, match="works on the CPU; got tensors on cuda:0"):
        select_engine("julia", work)
    assert select_engine("auto", work).name == "torch"


def test_backsolve_draws_its_noise_where_auto_would_take_julia(monkeypatch):
    monkeypatch.setattr(choice, "julia_pays", lambda *_, **__: True)
    sde, h0, ts = RateSDE(weights(4).requires_grad_(), noise_std=0.3), torch.zeros(4, dtype=D), torch.arange(6) * DT
    discrete, backsolve = (sdeint(sde, h0, ts, dt=DT, adjoint=way, generator=3) for way in ("discrete", "backsolve"))
    assert float(backsolve.detach()[1:].abs().min()) > 0
    close(backsolve.detach(), discrete.detach())


def test_a_dataset_has_one_engine_whatever_the_process_did_before(monkeypatch, tmp_path):
    config = DatasetConfig(out_dir=tmp_path, num_networks=3, N=5, T=10)
    describe()  # a worker is running
    monkeypatch.setattr(choice, "_saved", 1e9)
    assert settled_engine(config) == "torch"
    assert settled_engine(replace(config, num_networks=10**7)) == "julia"


@pytest.mark.slow
def test_the_packages_own_tests(julia, tmp_path):
    package = Path(neurosde.julia.__file__).parent / "NeuroSDE.jl"
    environment = {name: value for name, value in julia.environment().items() if not name.startswith("JULIA_")}
    command = [julia.executable, f"--project={package}", "-C", "native", "-O3", "--startup-file=no"]
    ran = subprocess.run(
        [*command, package / "test" / "runtests.jl"],
        env=environment | {"JULIA_DEPOT_PATH": f"{tmp_path}{os.pathsep}", "JULIA_NUM_THREADS": "2"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "Test Summary" in ran.stdout
    assert np.all(["Fail" not in line and "Error" not in line for line in ran.stdout.splitlines()])
