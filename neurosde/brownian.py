"""Brownian paths on a grid: one noise, every engine, every step size.

A path is its increments dB[k] = B(t0 + (k+1)dt) − B(t0 + k dt), independent N(0, dt). Drawn from a seed they are
√dt z[k, e], where z is a function of seed, step k and element e (`neurosde.philox`): the same on every engine and
device, in every dtype but for rounding, however many steps are drawn. Keeping the increments rather than the seed makes
two more things exact: gradients with respect to σ see the noise that was used, and a path may be summed to a coarser
grid (`coarsen`) or interpolated by a Brownian bridge to a finer one (`refine`), which a strong convergence test needs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from neurosde.philox import WORD, normals, philox4x32

GRID_TOLERANCE = 1e-3  # of a step: how far solvers' accumulated times may drift off the grid


def as_generator(seed: int | torch.Generator | None, device: torch.device | str = "cpu") -> torch.Generator | None:
    """Return a generator from a seed; a generator passes through, None means torch's global one.

    Raises:
        TypeError: `seed` is neither an int, a generator nor None.
    """
    if seed is None or isinstance(seed, torch.Generator):
        return seed
    return torch.Generator(device=device).manual_seed(_checked(seed))


def as_seed(generator: int | torch.Generator | None) -> int:
    """Return a 64-bit key, as a signed integer, of the noise of `neurosde.philox`.

    An int is its own key modulo 2⁶⁴. A generator gives 63 bits, and others the next time; None asks torch's global one.

    Raises:
        TypeError: `generator` is neither an int, a generator nor None.
    """
    if generator is None or isinstance(generator, torch.Generator):
        device = "cpu" if generator is None else generator.device
        return int(torch.randint(2**63 - 1, (), generator=generator, dtype=torch.int64, device=device))
    return (_checked(generator) + 2**63) % 2**64 - 2**63


def _checked(seed: int) -> int:
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"generator must be a torch.Generator or an int seed; got {type(seed).__name__}.")
    return seed


class BrownianPath:
    """A Brownian path on a regular time grid, usable as `bm` by `neurosde.sdeint` and by `torchsde.sdeint`.

    Args:
        increments: Brownian increments of variance dt, shape (steps, ..., neuron), in units of √time.
        dt: grid spacing, in the unit of time that tau has.
        t0: time of the first grid point.

    Raises:
        ValueError: dt is not positive, or the increments have fewer than two dimensions.
    """

    levy_area_approximation = "none"  # torchsde asks every Brownian motion for it

    def __init__(self, increments: Tensor, dt: float, t0: float = 0.0) -> None:
        if not dt > 0:
            raise ValueError(f"dt must be positive; got {dt}.")
        if increments.ndim < 2:
            raise ValueError(f"increments must be (steps, ..., neuron); got shape {tuple(increments.shape)}.")
        self.increments = increments
        self.dt = float(dt)
        self.t0 = float(t0)

    @classmethod
    def sample(
        cls,
        shape: Sequence[int],
        steps: int,
        dt: float,
        *,
        t0: float = 0.0,
        generator: int | torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> BrownianPath:
        """Draw a path; `shape` is the shape of one state, (..., neuron).

        The same seed gives the same path on every device and, but for rounding, in every dtype; the first steps of a
        longer path are the shorter one. A generator gives a new seed every time (`as_seed`).
        """
        key = torch.tensor([as_seed(generator)])
        z = normals(key, steps, math.prod(shape), dtype=dtype, device=device)
        path = cls(z.view(steps, *shape), dt, t0)
        path.increments.mul_(dt**0.5)
        return path

    @property
    def shape(self) -> torch.Size:
        """Shape of one increment, (..., neuron)."""
        return self.increments.shape[1:]

    @property
    def steps(self) -> int:
        """Number of increments."""
        return self.increments.shape[0]

    def coarsen(self, factor: int) -> BrownianPath:
        """Return the same path seen every `factor` steps.

        Raises:
            ValueError: the number of steps is not a multiple of `factor`.
        """
        if factor < 1 or self.steps % factor:
            raise ValueError(f"factor must divide the {self.steps} steps of the path; got {factor}.")
        summed = self.increments.unflatten(0, (self.steps // factor, factor)).sum(1)
        return BrownianPath(summed, self.dt * factor, self.t0)

    def refine(self, factor: int, generator: int | torch.Generator | None = None) -> BrownianPath:
        """Return a path on a grid `factor` times finer that passes through this one (Brownian bridge).

        Its noise is independent of what `sample`, or a refinement from or by another number, draws from the same seed.

        Raises:
            ValueError: `factor` is smaller than 1.
        """
        if factor < 1:
            raise ValueError(f"factor must be at least 1; got {factor}.")
        fine_dt = self.dt / factor
        like = self.increments
        seed = _bridge_seed(as_seed(generator), factor, self.steps)
        fine = BrownianPath.sample(
            (factor, *self.shape), self.steps, fine_dt, generator=seed, dtype=like.dtype, device=like.device
        ).increments
        bridge = fine - fine.mean(1, keepdim=True) + like.unsqueeze(1) / factor
        return BrownianPath(bridge.flatten(0, 1), fine_dt, self.t0)

    def __call__(
        self, ta: Tensor | float, tb: Tensor | float, return_U: bool = False, return_A: bool = False
    ) -> Tensor:
        """Return B(tb) − B(ta), shape (..., neuron), as torchsde's solvers ask for it.

        Raises:
            ValueError: a time off the grid, ta > tb, or Lévy areas (return_U, return_A), which no increment holds.
        """
        if return_U or return_A:
            raise ValueError("a BrownianPath has no Lévy area; use method='euler', or torchsde.BrownianInterval.")
        start, stop = self._index(ta), self._index(tb)
        if stop < start:
            raise ValueError(f"the interval must run forwards, ta <= tb; got {float(ta)} and {float(tb)}.")
        if stop == start + 1:
            return self.increments[start]
        return self.increments[start:stop].sum(0)

    def _index(self, t: Tensor | float) -> int:
        position = (float(t) - self.t0) / self.dt
        index = round(position)
        if abs(position - index) > GRID_TOLERANCE or not 0 <= index <= self.steps:
            raise ValueError(
                f"t = {float(t)} is not a grid point of this Brownian path (t0 = {self.t0}, dt = {self.dt}, "
                f"{self.steps} steps); sample a longer path or refine() it to the solver's dt."
            )
        return index


def _bridge_seed(seed: int, factor: int, steps: int) -> int:
    """A seed that differs from `seed` and with the arguments: Philox of a counter whose word c3 no normal has."""
    c0, c1, c2, c3 = torch.tensor([factor, steps, 0, 1])
    low, high, _, _ = philox4x32((c0, c1, c2, c3), (seed & WORD, seed >> 32 & WORD))
    return int(low) + (int(high) << 32)


class BrownianSeeds:
    """A Brownian path that is still to be drawn: engines that can draw it where they step.

    Args:
        seeds: one seed for the whole batch, or one for each entry of the batch's first axis, so that an entry's noise
            does not depend on its neighbours.

    Raises:
        TypeError: a seed is neither an int, a generator nor None.
    """

    def __init__(self, seeds: int | torch.Generator | None | Sequence[int]) -> None:
        self.shared = not isinstance(seeds, Sequence)
        self.seeds = [as_seed(seed) for seed in seeds] if isinstance(seeds, Sequence) else [as_seed(seeds)]

    def increments(
        self, shape: Sequence[int], steps: int, dt: float, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """Draw the increments (steps, *shape); `shape` is the shape of one state, (..., neuron).

        Raises:
            ValueError: there are several seeds, but not one for each entry of the first axis.
        """
        self.check(shape)
        count = math.prod(shape) // len(self.seeds)
        z = normals(torch.tensor(self.seeds), steps, count, dtype=dtype, device=device)
        return z.view(steps, *shape).mul_(dt**0.5)

    def check(self, shape: Sequence[int]) -> None:
        """Raise ValueError unless there is one seed, or one for each entry of the first axis of `shape`."""
        if not self.shared and (len(shape) < 2 or shape[0] != len(self.seeds)):
            raise ValueError(
                f"bm has {len(self.seeds)} seeds, one for each entry of the first axis; got states {tuple(shape)}."
            )
