"""Solving the rate network: `sdeint`, `odeint` and `simulate_rate_network`.

`sdeint` and `odeint` look like their torchsde and torchdiffeq namesakes and return voltages, time first.
`simulate_rate_network` returns firing rates, ready for analysis.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, get_args, overload

import numpy as np
import torch
import torchdiffeq
from jaxtyping import Float
from numpy.typing import ArrayLike
from torch import Tensor

from neurosde.activation import ACTIVATIONS, Activation
from neurosde.adjoint import integrate
from neurosde.brownian import GRID_TOLERANCE, BrownianPath, BrownianSeeds
from neurosde.engines import EngineName, TorchsdeEngine, Work, select_engine
from neurosde.problem import Problem, batch_shape, build_problem
from neurosde.rate_sde import Drive, RateSDE
from neurosde.validation import as_float_tensor, check_count, check_square, check_time_step

Adjoint = Literal["discrete", "backsolve", "autograd"]
Noise = BrownianPath | BrownianSeeds | Callable[[float, float], Tensor]


def sdeint(
    sde: RateSDE,
    h0: Float[Tensor, "*batch neuron"],
    ts: Tensor | Sequence[float],
    *,
    dt: float,
    method: Literal["euler"] = "euler",
    adjoint: Adjoint = "discrete",
    engine: EngineName = "auto",
    generator: int | torch.Generator | None = None,
    bm: Noise | None = None,
) -> Float[Tensor, "time *out neuron"]:
    """Integrate a rate network by Euler–Maruyama; strong and weak order 1 (the noise is additive).

    Args:
        sde: the network, weights (..., neuron, neuron).
        h0: initial voltage, shape (..., neuron); its batch broadcasts against the weights': weights (B, 1, N, N) and
            h0 (B, K, N) are B networks × K trials.
        ts: increasing times at which h is returned, in the unit of tau, on the grid ts[0] + k·dt.
        dt: step.
        method: "euler", the only scheme.
        adjoint: "discrete" (the exact gradient of the scheme, the path itself as tape), "autograd" (back-propagation
            through the steps) or "backsolve" (torchsde's continuous adjoint; its error is of order dt).
        engine: "torch", "torchsde", "julia" (the fastest on a CPU; needs a Julia, see `neurosde doctor`), or "auto",
            which takes Julia where that is quicker, its start included. Engines agree to rounding, which chaos
            amplifies: name one where runs must repeat to the last bit.
        generator: seed or generator of the noise; the same one gives the same path on every engine.
        bm: the noise itself, instead: a `BrownianPath`, `BrownianSeeds`, or a callable (ta, tb) → increment such as
            torchsde's `BrownianInterval`.

    Returns:
        Voltage h at `ts`, shape (time, ..., neuron).

    Raises:
        ValueError: times off the grid or not increasing, shapes that do not fit, unknown options, NaN or inf.
        TypeError: `sde` is not a RateSDE, dtypes differ, both generator and bm given.
        JuliaNotFoundError: engine="julia" without a Julia.

    References:
        Scalable gradients for stochastic differential equations (Li, Wong, Chen, Duvenaud, 2020),
        https://arxiv.org/abs/2001.01328
    """
    _check_choices(sde, adjoint)
    if method != "euler":
        raise ValueError(f"method must be 'euler'; got {method!r}. For noise-free networks see odeint.")
    h0 = as_float_tensor(h0, "h0", like=sde.weights)
    dt = check_time_step(dt, float(sde.tau.detach().min()))
    start, indices = _grid(_times(ts), dt)
    steps = int(indices[-1])
    batch = batch_shape(sde.weights, h0)
    noise = None if sde.noise_free else _noise((*batch, sde.num_neurons), steps, dt, start, generator, bm, h0)
    _, h = _run(sde, h0, batch, dt, steps, noise, adjoint, engine, start=start, activity=False, voltage=True)
    assert h is not None
    return _at(h, indices)


def odeint(
    sde: RateSDE,
    h0: Float[Tensor, "*batch neuron"],
    ts: Tensor | Sequence[float],
    *,
    method: str = "euler",
    dt: float | None = None,
    adjoint: Adjoint = "discrete",
    engine: EngineName = "auto",
    rtol: float = 1e-7,
    atol: float = 1e-9,
) -> Float[Tensor, "time *out neuron"]:
    """Integrate the network without its noise: Euler on the grid, or any method of torchdiffeq.

    Args:
        sde: the network; its noise is ignored.
        h0: initial voltage, shape (..., neuron).
        ts: increasing times, in the unit of tau.
        method: "euler" (order 1), "rk4" (order 4), "dopri5" (adaptive, order 5) or another torchdiffeq method.
        dt: step of a fixed-step method; None takes the spacing of `ts`.
        adjoint: "discrete" (Euler: the exact adjoint of the scheme; other methods: back-propagation through the solver,
            which is exact too), "autograd", or "backsolve" (torchdiffeq's continuous adjoint).
        engine: who steps Euler: "torch", "torchsde", "julia" or "auto". Other methods are torchdiffeq's.
        rtol: relative tolerance of adaptive methods.
        atol: absolute tolerance of adaptive methods.

    Returns:
        Voltage h at `ts`, shape (time, ..., neuron).

    Raises:
        ValueError: shapes that do not fit, unknown options, times not increasing or off the grid.
        TypeError: `sde` is not a RateSDE, or dtypes differ.

    References:
        Neural ordinary differential equations (Chen, Rubanova, Bettencourt, Duvenaud, 2018),
        https://arxiv.org/abs/1806.07366
    """
    _check_choices(sde, adjoint)
    h0 = as_float_tensor(h0, "h0", like=sde.weights)
    times = _times(ts)
    if dt is not None:
        dt = check_time_step(dt, float(sde.tau.detach().min()))
    if method == "euler" and adjoint != "backsolve":
        step = dt if dt is not None else check_time_step(float(times[1] - times[0])) if len(times) > 1 else 1.0
        start, indices = _grid(times, step)
        steps = int(indices[-1])
        batch = batch_shape(sde.weights, h0)
        _, h = _run(sde, h0, batch, step, steps, None, adjoint, engine, start=start, activity=False, voltage=True)
        assert h is not None
        return _at(h, indices)
    if engine not in get_args(EngineName):
        raise ValueError(f"engine must be one of {get_args(EngineName)}; got {engine!r}.")
    fixed_step = ("euler", "midpoint", "rk4", "heun3")
    if dt is not None and method not in fixed_step:
        raise ValueError(f"dt is the step of fixed-step methods {fixed_step}; method {method!r} takes rtol and atol.")
    state = h0.expand(*batch_shape(sde.weights, h0), sde.num_neurons)
    options = None if dt is None else {"step_size": dt}
    points = torch.from_numpy(times).to(h0.device, h0.dtype)
    if adjoint == "backsolve":
        tensors = (sde.weights, sde.tau, sde.input)
        parameters = tuple(t for t in tensors if t is not None and t.requires_grad)
        h = torchdiffeq.odeint_adjoint(
            sde, state, points, rtol=rtol, atol=atol, method=method, options=options, adjoint_params=parameters
        )
    else:
        h = torchdiffeq.odeint(sde, state, points, rtol=rtol, atol=atol, method=method, options=options)
    return h


@overload
def simulate_rate_network(
    W: Tensor | ArrayLike,
    h0: Tensor | ArrayLike,
    T: int,
    dt: float,
    tau: float | Tensor,
    I: Tensor | ArrayLike | None = ...,  # noqa: E741
    noise_std: float | Tensor | ArrayLike = ...,
    return_h: Literal[False] = ...,
    *,
    phi: str | Callable[[Tensor], Tensor] | Activation = ...,
    drive: Drive = ...,
    adjoint: Adjoint = ...,
    engine: EngineName = ...,
    generator: int | torch.Generator | None = ...,
    bm: Noise | None = ...,
) -> Tensor: ...


@overload
def simulate_rate_network(
    W: Tensor | ArrayLike,
    h0: Tensor | ArrayLike,
    T: int,
    dt: float,
    tau: float | Tensor,
    I: Tensor | ArrayLike | None = ...,  # noqa: E741
    noise_std: float | Tensor | ArrayLike = ...,
    *,
    return_h: Literal[True],
    phi: str | Callable[[Tensor], Tensor] | Activation = ...,
    drive: Drive = ...,
    adjoint: Adjoint = ...,
    engine: EngineName = ...,
    generator: int | torch.Generator | None = ...,
    bm: Noise | None = ...,
) -> tuple[Tensor, Tensor]: ...


def simulate_rate_network(
    W: Tensor | ArrayLike,
    h0: Tensor | ArrayLike,
    T: int,
    dt: float,
    tau: float | Tensor,
    I: Tensor | ArrayLike | None = None,  # noqa: E741
    noise_std: float | Tensor | ArrayLike = 0.0,
    return_h: bool = False,
    *,
    phi: str | Callable[[Tensor], Tensor] | Activation = "tanh",
    drive: Drive = "scaled",
    adjoint: Adjoint = "discrete",
    engine: EngineName = "auto",
    generator: int | torch.Generator | None = None,
    bm: Noise | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Simulate the activity of a rate network at T times, x[0] = φ(h0), by Euler–Maruyama.

    h[t+1] = h[t] + dt/τ·(−h[t] + W φ(h[t]) + I[t]) + √dt·σ·ξ[t],   x[t] = φ(h[t])

    Args:
        W: weights (post, pre), shape (..., neuron, neuron).
        h0: initial voltage, shape (..., neuron), broadcasting against W over the batch.
        T: number of times, the initial one included.
        dt: step, in the unit of tau.
        tau: time constant.
        I: external input, None, constant (..., neuron) or time-varying (..., T, neuron), broadcasting to the batch.
        noise_std: σ per √time, a scalar or per neuron.
        return_h: also return the voltage.
        phi: the nonlinearity, see `RateSDE`.
        drive: "scaled" (above) or "unscaled", see `RateSDE`.
        adjoint: gradient, see `sdeint`.
        engine: see `sdeint`.
        generator: seed or generator of the noise.
        bm: the noise itself, see `sdeint`.

    Returns:
        activity: firing rate, shape (..., T, neuron); with `return_h`, also the voltage in the same shape.

    Raises:
        ValueError: shapes that do not fit, T < 1, dt or tau not positive, σ negative, NaN or inf, or an input whose
            shape reads both as constant and as time-varying.
        TypeError: wrong types or dtypes.
    """
    T = check_count(T, "T")
    dt = check_time_step(dt)
    weights = as_float_tensor(W, "weights")
    state = as_float_tensor(h0, "h0", like=weights)
    check_square(weights.shape)
    batch = batch_shape(weights, state)
    current = None if I is None else as_float_tensor(I, "I", like=weights)
    varies = current is not None and _varies_in_time(current, batch, T, weights.shape[-1])
    sde = RateSDE(weights, tau, current, noise_std, phi, drive=drive, input_dt=dt if varies else None)
    _check_choices(sde, adjoint)
    dt = check_time_step(dt, float(sde.tau.detach().min()))
    shape = (*batch, sde.num_neurons)
    noise = None if sde.noise_free else _noise(shape, T - 1, dt, 0.0, generator, bm, state)
    x, h = _run(sde, state, batch, dt, T - 1, noise, adjoint, engine, activity=True, voltage=return_h)
    assert x is not None
    if not return_h:
        return x.movedim(0, -2)
    assert h is not None
    return x.movedim(0, -2), h.movedim(0, -2)


def _run(
    sde: RateSDE,
    h0: Tensor,
    batch: torch.Size,
    dt: float,
    steps: int,
    noise: Tensor | BrownianSeeds | None,
    adjoint: Adjoint,
    engine: EngineName,
    *,
    start: float = 0.0,
    activity: bool,
    voltage: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Fold, integrate and unfold: x and h, each (steps + 1, *batch, neuron)."""
    problem = build_problem(sde, h0, batch, dt, steps, noise, start=start)
    x: Tensor | None
    h: Tensor | None
    if adjoint == "backsolve":
        x, h = _backsolve(problem.drawn(), engine, activity)
    else:
        chosen = select_engine(engine, _work(problem, recorded=adjoint == "autograd"))
        if not chosen.draws_noise:
            problem = problem.drawn()
        if adjoint == "discrete":
            x, h = integrate(chosen, problem, activity=activity, voltage=voltage)
        else:
            x, h = chosen.forward(problem, activity=activity, voltage=voltage)
    shape = (steps + 1, *batch, sde.num_neurons)
    return None if x is None else x.reshape(shape), None if h is None else h.reshape(shape)


def _work(problem: Problem, *, recorded: bool) -> Work:
    M, K, N = problem.state.shape
    gradient = torch.is_grad_enabled() and problem.requires_grad
    phi = problem.phi
    return Work(
        M, M * K, N, problem.steps, problem.noise is not None, gradient, gradient and recorded,
        phi.name if phi is ACTIVATIONS.get(phi.name) else f"your own {phi.name}", problem.state.dtype,
        problem.state.device,
    )  # fmt: skip


def _backsolve(problem: Problem, engine: EngineName, activity: bool) -> tuple[Tensor | None, Tensor]:
    if engine not in ("auto", "torchsde"):
        raise ValueError(f"adjoint='backsolve' is torchsde's; use engine='torchsde' or 'auto', got {engine!r}.")
    h = TorchsdeEngine().backsolve(problem)
    return problem.phi(h) if activity else None, h


def _check_choices(sde: RateSDE, adjoint: str) -> None:
    if not isinstance(sde, RateSDE):
        raise TypeError(f"sde must be a neurosde.RateSDE; got {type(sde).__name__}. For other equations use torchsde.")
    if adjoint not in get_args(Adjoint):
        raise ValueError(f"adjoint must be one of {get_args(Adjoint)}; got {adjoint!r}.")


def _times(ts: Tensor | Sequence[float]) -> np.ndarray:
    held = ts.detach().cpu().numpy() if isinstance(ts, Tensor) else ts
    times = np.asarray(held, dtype=np.float64)
    if times.ndim != 1 or len(times) == 0:
        raise ValueError(f"ts must be a non-empty vector of times; got shape {times.shape}.")
    if not (times[1:] > times[:-1]).all():
        raise ValueError("ts must be strictly increasing.")
    return times


def _grid(times: np.ndarray, dt: float) -> tuple[float, np.ndarray]:
    """Return the first time and the index of each time on the grid of step dt."""
    start = float(times[0])
    position = (times - start) / dt
    indices = np.rint(position)
    # float32 times are off the grid by their rounding, which grows with time.
    slack = GRID_TOLERANCE + 4e-7 * float(max(abs(start), abs(times[-1]))) / dt
    off = np.abs(position - indices) > slack
    if off.any() or not (indices[1:] > indices[:-1]).all():
        worst = float(times[off][0]) if off.any() else float(times[-1])
        raise ValueError(
            f"ts must lie on the grid ts[0] + k*dt with dt = {dt}; got t = {worst}. Choose a dt that divides it."
        )
    return start, indices.astype(np.int64)


def _at(h: Tensor, indices: np.ndarray) -> Tensor:
    """The path at the times that were asked for."""
    return h if len(indices) == len(h) else h[torch.from_numpy(indices).to(h.device)]


def _noise(
    shape: Sequence[int],
    steps: int,
    dt: float,
    start: float,
    generator: int | torch.Generator | None,
    bm: Noise | None,
    like: Tensor,
) -> Tensor | BrownianSeeds:
    """Brownian increments (steps, *shape) of the caller's path, or the seeds to draw them from."""
    if bm is None:
        return BrownianSeeds(generator)
    if generator is not None:
        raise TypeError("give the noise either as generator or as bm; got both.")
    if isinstance(bm, BrownianSeeds):
        bm.check(shape)
        return bm
    if isinstance(bm, BrownianPath) and (bm.t0, bm.dt, bm.steps) == (start, dt, steps):
        increments = bm.increments
    else:
        increments = torch.stack([bm(start + k * dt, start + (k + 1) * dt) for k in range(steps)])
    if tuple(increments.shape) != (steps, *shape):
        raise ValueError(f"bm must give increments of shape {tuple(shape)}; got {tuple(increments.shape[1:])}.")
    return increments.to(like.device, like.dtype)


def _varies_in_time(current: Tensor, batch: Sequence[int], T: int, N: int) -> bool:
    """Tell a constant input (..., N) from a time-varying one (..., T, N)."""

    def fits(shape: Sequence[int], full: Sequence[int]) -> bool:
        padded = (1,) * (len(full) - len(shape)) + tuple(shape)
        return len(padded) == len(full) and all(a in (1, b) for a, b in zip(padded, full, strict=True))

    shape = tuple(current.shape)
    constant = fits(shape, (*batch, N))
    varying = len(shape) >= 2 and shape[-2] in (1, T) and fits(shape[:-2], batch)
    if constant and varying and shape[-2] != 1:
        raise ValueError(
            f"I of shape {shape} reads both as (trial, neuron) and as (time, neuron) since there are {T} of each; "
            f"expand it to {(*batch, T, N)} if it varies in time, or to {(*batch, 1, N)} if it is constant."
        )
    if not constant and not varying:
        raise ValueError(
            f"I must broadcast to {(*batch, N)} (constant) or {(*batch, T, N)} (time-varying); got {shape}."
        )
    return varying and not constant
