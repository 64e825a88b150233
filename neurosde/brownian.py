"""Brownian paths on a grid: one noise, every engine, every step size.

A path is its increments dB[k] = B(t0 + (k+1)dt) − B(t0 + k dt), independent N(0, dt). Keeping the increments rather
than a seed makes three things exact: engines that disagree on how they draw normals still follow the same path,
gradients with respect to σ see the noise that was used, and a path may be summed to a coarser grid (`coarsen`) or
interpolated by a Brownian bridge to a finer one (`refine`), which is what a strong convergence test needs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

GRID_TOLERANCE = 1e-3  # of a step: how far solvers' accumulated times may drift off the grid


def as_generator(seed: int | torch.Generator | None, device: torch.device | str = "cpu") -> torch.Generator | None:
    """Return a generator from a seed; a generator passes through, None means torch's global one.

    Raises:
        TypeError: `seed` is neither an int, a generator nor None.
    """
    if seed is None or isinstance(seed, torch.Generator):
        return seed
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"generator must be a torch.Generator or an int seed; got {type(seed).__name__}.")
    return torch.Generator(device=device).manual_seed(seed)


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

        The numbers come from the generator's own device, so that a CPU generator gives the same path on a GPU.
        """
        source = as_generator(generator, device)
        draw_on = device if source is None else source.device
        normals = torch.randn((steps, *shape), generator=source, dtype=dtype, device=draw_on)
        return cls((normals * dt**0.5).to(device), dt, t0)

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

        Raises:
            ValueError: `factor` is smaller than 1.
        """
        if factor < 1:
            raise ValueError(f"factor must be at least 1; got {factor}.")
        fine_dt = self.dt / factor
        like = self.increments
        fine = BrownianPath.sample(
            (factor, *self.shape), self.steps, fine_dt, generator=generator, dtype=like.dtype, device=like.device
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
