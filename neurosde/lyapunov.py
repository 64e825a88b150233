"""The largest Lyapunov exponents of a network: mean rates at which small distances grow.

A basis of k tangent vectors is carried by the linearised dynamics, P_{t+1} = M_t P_t, and made orthonormal again from
time to time, QR = M…MQ; the means of log|R_ii| are the k largest exponents. Above 0 the network is chaotic.

`mean_growth` does this for any M_t. `lyapunov_exponents` follows the network's own path without noise,

- level "map": of the Euler step that the simulator makes, M = a I + b W φ'(h),
- level "ode": of the differential equation, path and tangent vectors integrated together by the classical Runge–Kutta
  method,

and `neurosde.models.lyapunov` follows paths that were recorded.

References:
    Lyapunov characteristic exponents for smooth dynamical systems and for Hamiltonian systems; a method for computing
    all of them (Benettin, Galgani, Giorgilli, Strelcyn, 1980), https://doi.org/10.1007/BF02128236
    Lyapunov spectra of chaotic recurrent neural networks (Engelken, Wolf, Abbott, 2023),
    https://doi.org/10.1103/PhysRevResearch.5.043044
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from neurosde.brownian import as_generator
from neurosde.rate_sde import RateSDE
from neurosde.validation import check_count, check_positive, check_time_step

Level = Literal["ode", "map"]
BETWEEN = 10  # steps between orthonormalisations


def mean_growth(advance: Callable[[int, Tensor], Tensor], tangents: Tensor, steps: int, burn_in: int = 0) -> Tensor:
    """Mean logarithmic growth of tangent vectors in a step: Lyapunov exponents times the step.

    Args:
        advance: maps t and vectors P_t (..., neuron, vector) to P_{t+1}; called for t = 0 … steps − 1 in this order.
        tangents: vectors to start with, linearly independent, shape (..., neuron, vector).
        steps: their number.
        burn_in: steps at first, in which the vectors turn to where they grow most and growth is not counted.

    Returns:
        Growth of each, the largest first up to fluctuations, shape (..., vector).
    """
    Q = torch.linalg.qr(tangents).Q
    total = torch.zeros_like(Q[..., 0, :])
    for t in range(steps):
        Q = advance(t, Q)
        if (t + 1 - burn_in) % BETWEEN == 0 or t + 1 == steps:
            Q, R = torch.linalg.qr(Q)
            if t >= burn_in:
                total = total + R.diagonal(dim1=-2, dim2=-1).abs().log()
    return total / (steps - burn_in)


def lyapunov_exponents(
    sde: RateSDE,
    *,
    dt: float = 0.1,
    time: float = 500.0,
    transient: float = 50.0,
    count: int = 1,
    level: Level = "ode",
    generator: int | torch.Generator | None = 0,
) -> Tensor:
    """Largest Lyapunov exponents of noise-free networks, from a standard normal initial voltage.

    The error of an exponent of a chaotic network falls like the root of the time; see it by comparing seeds.

    Args:
        sde: the networks, weights (..., neuron, neuron), without a time-varying input; its noise is left out.
        dt: step, in the unit of tau.
        time: over which growth is measured, in the unit of tau.
        transient: time before that.
        count: how many exponents, the largest first.
        level: "ode" or "map", see above.
        generator: seed or generator of the initial voltages.

    Returns:
        Exponents in units of 1/time, shape (..., exponent), float64; NaN where the activity diverges.

    Raises:
        ValueError: an input that varies in time, more exponents than neurons, or other values out of range.
    """
    if level not in get_args(Level):
        raise ValueError(f"level must be one of {get_args(Level)}; got {level!r}.")
    sde = noise_free(sde)
    dt = check_time_step(dt)
    N, leading = sde.num_neurons, sde.weights.shape[:-2]
    if check_count(count, "count") > N:
        raise ValueError(f"count must be at most the number of neurons, {N}; got {count}.")
    steps = BETWEEN * max(1, round(check_positive(time, "time") / dt / BETWEEN))
    before = BETWEEN * round(check_positive(transient, "transient", zero_ok=True) / dt / BETWEEN)
    source = as_generator(generator)
    h = torch.randn(*leading, N, generator=source, dtype=torch.float64)
    tangents = torch.randn(*leading, N, count, generator=source, dtype=torch.float64)
    step = _euler_step if level == "map" else _runge_kutta_step

    def advance(_: int, Q: Tensor) -> Tensor:
        nonlocal h
        h, Q = step(sde, h, Q, dt)
        return Q

    with torch.no_grad():
        growth = mean_growth(advance, tangents, before + steps, before)
    finite = torch.isfinite(h).all(-1, keepdim=True)
    return torch.where(finite, growth / dt, torch.nan)


def _euler_step(sde: RateSDE, h: Tensor, Q: Tensor, dt: float) -> tuple[Tensor, Tensor]:
    slope, tangent = linearised(sde, h, Q)
    return h + dt * slope, Q + dt * tangent


def _runge_kutta_step(sde: RateSDE, h: Tensor, Q: Tensor, dt: float) -> tuple[Tensor, Tensor]:
    first = linearised(sde, h, Q)
    second = linearised(sde, h + dt / 2 * first[0], Q + dt / 2 * first[1])
    third = linearised(sde, h + dt / 2 * second[0], Q + dt / 2 * second[1])
    fourth = linearised(sde, h + dt * third[0], Q + dt * third[1])
    parts = zip(first, second, third, fourth, strict=True)
    slope, tangent = ((one + 2 * two + 2 * three + four) / 6 for one, two, three, four in parts)
    return h + dt * slope, Q + dt * tangent


def linearised(sde: RateSDE, h: Tensor, Q: Tensor) -> tuple[Tensor, Tensor]:
    """Return the drift at h, and what the linearised drift makes of tangent vectors Q (..., neuron, vector)."""
    slope = sde.phi.slope(sde.phi(h), h)
    recurrent = sde.weights @ (slope.unsqueeze(-1) * Q)
    rate = 1 / sde.tau.expand_as(h).unsqueeze(-1)
    tangent = rate * (recurrent - Q) if sde.drive == "scaled" else recurrent - rate * Q
    return sde.f(0.0, h), tangent


def noise_free(sde: RateSDE) -> RateSDE:
    """Return the network without noise in float64.

    Raises:
        ValueError: an input that varies in time.
    """
    if sde.input_dt is not None:
        raise ValueError(
            "the input must be constant in time: with one that varies there are no fixed points, and a path of its own "
            "is to be followed (neurosde.models.lyapunov_time)."
        )
    current = None if sde.input is None else sde.input.detach().double().cpu()
    W, tau = sde.weights.detach().double().cpu(), sde.tau.detach().double().cpu()
    return RateSDE(W, tau, current, phi=sde.phi, drive=sde.drive)
