"""Fixed points of a network without noise, and how far those of an estimate are from the true ones.

Fixed points are zeros of F(h) = −h + W φ(h) + I, found by Newton's method from many starts.

References:
    Opening the black box: low-dimensional dynamics in high-dimensional recurrent neural networks (Sussillo, Barak,
    2013), https://doi.org/10.1162/NECO_a_00409
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from neurosde.brownian import as_generator
from neurosde.lyapunov import linearised, noise_free
from neurosde.rate_sde import RateSDE
from neurosde.validation import check_count, check_positive

NEWTON_STEPS = 100
HALVINGS = 12  # of a Newton step that does not come nearer
RELAXATION = 20.0  # time constants: longest run of the network before Newton's method


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
    sde = noise_free(sde)
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
        return linearised(sde, h, eye)[1]

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


def fixed_point_distance(found: FixedPoints, true: FixedPoints) -> float:
    """How far two sets of fixed points are apart: the modified Hausdorff distance of their firing rates.

    Of each point the distance to the nearest one of the other set is taken, as a root mean square over neurons of
    differences of tanh h; the distance is the mean over the points of one set or of the other, whichever is larger, so
    that missing points count as supernumerary ones do. It is 0 if the sets are one, and at most 2. Without an input the
    origin is in both.

    Args:
        found: fixed points of an estimate.
        true: those of the true network, of as many neurons.

    Returns:
        The distance; NaN if one of them has no point.

    References:
        A modified Hausdorff distance for object matching (Dubuisson, Jain, 1994),
        https://doi.org/10.1109/ICPR.1994.576361
    """
    first, second = found.voltage.tanh(), true.voltage.tanh()
    if not len(first) or not len(second):
        return math.nan
    apart = torch.cdist(first, second) / first.shape[-1] ** 0.5
    return max(float(apart.min(1).values.mean()), float(apart.min(0).values.mean()))


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
