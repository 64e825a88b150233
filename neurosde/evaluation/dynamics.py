"""What a network with these weights does without noise: its largest Lyapunov exponents and its fixed points.

Lyapunov exponents are mean rates at which small distances grow, along the network's own path: a basis of k tangent
vectors is carried by the linearised dynamics, M(h) = ∂(step)/∂h, and made orthonormal again from time to time,
QR = M…MQ; the means of log|R_ii| are the k largest exponents. Above 0 the network is chaotic.

- level "map": of the Euler step that the simulator makes, M = a I + b W φ'(h).
- level "ode": of the differential equation, path and tangent vectors integrated together by the classical Runge–Kutta
  method.

Fixed points are zeros of F(h) = −h + W φ(h) + I, found by Newton's method from many starts.

References:
    Lyapunov characteristic exponents for smooth dynamical systems and for Hamiltonian systems; a method for computing
    all of them (Benettin, Galgani, Giorgilli, Strelcyn, 1980), https://doi.org/10.1007/BF02128236
    Lyapunov spectra of chaotic recurrent neural networks (Engelken, Wolf, Abbott, 2023),
    https://doi.org/10.1103/PhysRevResearch.5.043044
    Opening the black box: low-dimensional dynamics in high-dimensional recurrent neural networks (Sussillo, Barak,
    2013), https://doi.org/10.1162/NECO_a_00409
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from neurosde.brownian import as_generator
from neurosde.rate_sde import RateSDE
from neurosde.validation import check_count, check_positive, check_time_step

Level = Literal["ode", "map"]
BETWEEN = 10  # steps between orthonormalisations
NEWTON_STEPS = 100
HALVINGS = 12  # of a Newton step that does not come nearer
RELAXATION = 20.0  # time constants: longest run of the network before Newton's method


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
    sde = _constant(sde)
    dt = check_time_step(dt)
    N, leading = sde.num_neurons, sde.weights.shape[:-2]
    if check_count(count, "count") > N:
        raise ValueError(f"count must be at most the number of neurons, {N}; got {count}.")
    rounds = max(1, round(check_positive(time, "time") / dt / BETWEEN))
    before = round(check_positive(transient, "transient", zero_ok=True) / dt / BETWEEN)
    source = as_generator(generator)
    h = torch.randn(*leading, N, generator=source, dtype=torch.float64)
    Q = torch.linalg.qr(torch.randn(*leading, N, count, generator=source, dtype=torch.float64)).Q
    step = _euler_step if level == "map" else _runge_kutta_step
    total = torch.zeros(*leading, count, dtype=torch.float64)
    with torch.no_grad():
        for k in range(-before, rounds):
            for _ in range(BETWEEN):
                h, Q = step(sde, h, Q, dt)
            Q, R = torch.linalg.qr(Q)
            if k >= 0:
                total += R.diagonal(dim1=-2, dim2=-1).abs().log()
    finite = torch.isfinite(h).all(-1, keepdim=True)
    return torch.where(finite, total / (rounds * BETWEEN * dt), torch.nan)


def _euler_step(sde: RateSDE, h: Tensor, Q: Tensor, dt: float) -> tuple[Tensor, Tensor]:
    slope, tangent = _field(sde, h, Q)
    return h + dt * slope, Q + dt * tangent


def _runge_kutta_step(sde: RateSDE, h: Tensor, Q: Tensor, dt: float) -> tuple[Tensor, Tensor]:
    first = _field(sde, h, Q)
    second = _field(sde, h + dt / 2 * first[0], Q + dt / 2 * first[1])
    third = _field(sde, h + dt / 2 * second[0], Q + dt / 2 * second[1])
    fourth = _field(sde, h + dt * third[0], Q + dt * third[1])
    parts = zip(first, second, third, fourth, strict=True)
    slope, tangent = ((one + 2 * two + 2 * three + four) / 6 for one, two, three, four in parts)
    return h + dt * slope, Q + dt * tangent


def _field(sde: RateSDE, h: Tensor, Q: Tensor) -> tuple[Tensor, Tensor]:
    """Drift at h, and what the linearised drift makes of tangent vectors Q (..., neuron, vector)."""
    slope = sde.phi.slope(sde.phi(h), h)
    recurrent = sde.weights @ (slope.unsqueeze(-1) * Q)
    rate = 1 / sde.tau.expand_as(h).unsqueeze(-1)
    tangent = rate * (recurrent - Q) if sde.drive == "scaled" else recurrent - rate * Q
    return sde.f(0.0, h), tangent


@dataclass(frozen=True)
class FixedPoints:
    """Fixed points that were found; there may be others.

    Attributes:
        voltage: h of each, shape (point, neuron), the slowest-growing first.
        growth_rate: largest real part of the eigenvalues of the linearised drift, in 1/time, shape (point,).
        unstable: number of directions in which distances grow, shape (point,); 0 is a stable point.
        found: number of starts that ended in each, shape (point,).
        failed: number of starts that ended in none.
    """

    voltage: Tensor
    growth_rate: Tensor
    unstable: Tensor
    found: Tensor
    failed: int

    @property
    def stable(self) -> Tensor:
        """Whether small distances from the point shrink in all directions, shape (point,)."""
        return self.growth_rate < 0


def fixed_points(
    sde: RateSDE,
    starts: int | Tensor = 128,
    *,
    tolerance: float = 1e-8,
    generator: int | torch.Generator | None = 0,
) -> FixedPoints:
    """Find fixed points of the noise-free drift by Newton's method from many starts.

    A Newton step is halved until it comes nearer to a zero of F; at a minimum of |F| that is none, the whole step is
    taken. One half of the starts are images W x + I of uniform rates x, the other half states that the network reaches
    from such in up to twenty time constants, where the points are that shape its paths. The number of points of a
    chaotic network grows exponentially with its size: only some are found, and most starts fail (87 of 128 for a
    Gaussian one of N = 100 and g = 2.5).

    Args:
        sde: one network, weights (neuron, neuron), without a time-varying input.
        starts: their number, or voltages (start, neuron).
        tolerance: largest |F| of any neuron at a fixed point; points nearer than its root to one another are one.
        generator: seed or generator of starts.

    Raises:
        ValueError: several networks, an input that varies in time, or starts of a wrong shape.
    """
    sde = _constant(sde)
    N = sde.num_neurons
    if sde.weights.ndim != 2:
        raise ValueError(f"fixed points are found of one network at a time; got weights {tuple(sde.weights.shape)}.")
    check_positive(tolerance, "tolerance")
    # In units of the leak, F(h) = τ · drift: with the unscaled drive too the leak is −h/τ.
    tau = sde.tau.expand(N)

    def zero_of(h: Tensor) -> Tensor:
        return tau * sde.f(0.0, h)

    def jacobian(h: Tensor) -> Tensor:
        eye = torch.eye(N, dtype=torch.float64).expand(*h.shape, N)
        return _field(sde, h, eye)[1]

    with torch.no_grad():
        if isinstance(starts, Tensor):
            if starts.ndim != 2 or starts.shape[1] != N:
                raise ValueError(f"starts must be (start, {N}); got {tuple(starts.shape)}.")
            h = starts.to(torch.float64)
        else:
            h = _starts(sde, check_count(starts, "starts"), generator)
        value = zero_of(h)
        for _ in range(NEWTON_STEPS):
            active = torch.nonzero(value.abs().amax(-1) > 1e-3 * tolerance).flatten()  # NaN, of singular slopes, is not
            if not len(active):
                break
            slopes = tau.unsqueeze(-1) * jacobian(h[active])
            change = -torch.linalg.solve_ex(slopes, value[active]).result
            h[active], value[active] = _stepped(zero_of, h[active], value[active], change)
        ended = value.abs().amax(-1) <= tolerance
        points, counts = _distinct(h[ended], tolerance**0.5)
        eigenvalues = torch.linalg.eigvals(jacobian(points)).real if len(points) else torch.zeros(0, N).double()
    growth = eigenvalues.amax(-1)
    order = growth.argsort()
    return FixedPoints(
        points[order], growth[order], (eigenvalues > 0).sum(-1)[order], counts[order], int((~ended).sum())
    )


def _stepped(zero_of: Callable[[Tensor], Tensor], h: Tensor, value: Tensor, change: Tensor) -> tuple[Tensor, Tensor]:
    """Take of each Newton step the largest 2⁻ᵏ of it that lowers |F|; where none does all of it, √N long at most."""
    longest = h.shape[-1] ** 0.5
    kept = h + change * (longest / change.norm(dim=-1, keepdim=True)).clamp(max=1)
    of_kept = zero_of(kept)
    waiting = torch.arange(len(h))
    for halving in range(HALVINGS):
        trial = h[waiting] + 0.5**halving * change[waiting]
        of_trial = zero_of(trial)
        better = of_trial.norm(dim=-1) < value[waiting].norm(dim=-1)
        kept[waiting[better]], of_kept[waiting[better]] = trial[better], of_trial[better]
        waiting = waiting[~better]
        if not len(waiting):
            break
    return kept, of_kept


def _starts(sde: RateSDE, count: int, generator: int | torch.Generator | None) -> Tensor:
    source = as_generator(generator)
    x = 2 * torch.rand(count, sde.num_neurons, generator=source, dtype=torch.float64) - 1
    tau = sde.tau.expand(sde.num_neurons)
    # Where the leak balances the rest: of either drive τ f is −h beside what the weights and the input make of x.
    nothing = torch.zeros_like(x)
    h = tau * (sde.f(0.0, nothing) + x @ sde.weights.mT / (tau if sde.drive == "scaled" else 1.0))
    step = 0.1 * float(tau.min())
    steps = (torch.rand(count, generator=source, dtype=torch.float64) * RELAXATION * float(tau.max()) / step).long()
    steps[: (count + 1) // 2] = 0
    for k in range(int(steps.max())):
        h = torch.where((k < steps).unsqueeze(-1), h + step * sde.f(0.0, h), h)
    return h


def _distinct(points: Tensor, distance: float) -> tuple[Tensor, Tensor]:
    """Points of which no two are nearer than `distance` in any neuron, and how many there were of each."""
    kept: list[Tensor] = []
    counts: list[int] = []
    for point in points:
        near = [k for k, other in enumerate(kept) if float((point - other).abs().max()) < distance]
        if near:
            counts[near[0]] += 1
        else:
            kept.append(point)
            counts.append(1)
    return torch.stack(kept) if kept else points, torch.tensor(counts, dtype=torch.int64)


def _constant(sde: RateSDE) -> RateSDE:
    """Return the network in float64, of which the input must be constant."""
    if sde.input_dt is not None:
        raise ValueError("the input must be constant in time: with one that varies there are no fixed points.")
    current = None if sde.input is None else sde.input.detach().double().cpu()
    W, tau = sde.weights.detach().double().cpu(), sde.tau.detach().double().cpu()
    return RateSDE(W, tau, current, phi=sde.phi, drive=sde.drive)
