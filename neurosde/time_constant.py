"""Statistics of a recording whose time constant is not known.

With the step coefficients a, b of τ (`RateSDE.euler_coefficients`), y = (h[t+1] − a h[t])/b − I is linear in θ = τ, or
with the unscaled drive in θ = 1/τ, and x does not depend on it. Sums over transitions at three time constants therefore
give those at any: Σyφᵀ and Σy are linear in θ, Σy² is quadratic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from neurosde.likelihood import TransitionStatistics, transition_statistics
from neurosde.validation import check_positive, check_time_step


@dataclass(frozen=True)
class TimeConstantStatistics:
    """Sums over the transitions of a recording, for any time constant.

    Attributes:
        low: smallest time constant.
        high: largest; the logarithm is uniform between them before the recording.
        nodes: three time constants whose θ are equally spaced, with the sums for each.
        scaled: whether θ is τ; else it is 1/τ.
    """

    low: float
    high: float
    nodes: tuple[tuple[float, TransitionStatistics], ...]
    scaled: bool

    @property
    def num_neurons(self) -> int:
        """Number of neurons N."""
        return self.nodes[0][1].num_neurons

    def at(self, tau: float) -> TransitionStatistics:
        """Sums for a time constant τ, as `transition_statistics` gives them to rounding."""
        (_, first), (_, second), (_, third) = self.nodes
        start, step = (self._theta(node) for node in (self.nodes[0][0], self.nodes[1][0]))
        u = (self._theta(tau) - start) / (step - start)
        # Newton's interpolation, exact for what is linear or quadratic.
        linear = {name: getattr(first, name) + u * (getattr(second, name) - getattr(first, name)) for name in _LINEAR}
        quadratic = {
            name: linear[name]
            + u * (u - 1) / 2 * (getattr(third, name) - 2 * getattr(second, name) + getattr(first, name))
            for name in ("yy", "error")
        }
        sums = linear | {"yy": quadratic["yy"].clamp(min=0), "error": max(quadratic["error"], 0.0)}
        return replace(first, **sums, gain=first.dt / tau if self.scaled else first.dt)

    def _theta(self, tau: float) -> float:
        return tau if self.scaled else 1 / tau

    def without_input(self) -> TimeConstantStatistics:
        """Project out a constant input of each neuron; see `TransitionStatistics.without_input`."""
        return replace(self, nodes=tuple((tau, one.without_input()) for tau, one in self.nodes))


_LINEAR = ("yx", "y", "yy", "error")


def time_constant_statistics(
    activity: Any = None, dt: float = 0.1, tau: tuple[float, float] = (0.5, 2.0), **settings: Any
) -> TimeConstantStatistics:
    """Collect what the transitions of a recording say about W and τ.

    Args:
        activity: firing rate, see `transition_statistics`.
        dt: spacing of the samples, in the unit of τ.
        tau: smallest and largest time constant.
        **settings: other arguments of `transition_statistics`.

    Raises:
        ValueError: a range that is none; otherwise as `transition_statistics`.
    """
    low, high = check_range(tau, dt)
    scaled = settings.get("drive", "scaled") == "scaled"
    # θ = low, (low + high)/2, high; of 1/τ the other way round.
    ends = (low, high) if scaled else (1 / high, 1 / low)
    thetas = (ends[0], (ends[0] + ends[1]) / 2, ends[1])
    taus = [theta if scaled else 1 / theta for theta in thetas]
    return TimeConstantStatistics(
        low, high, tuple((one, transition_statistics(activity, dt, one, **settings)) for one in taus), scaled
    )


def check_range(tau: Sequence[float], dt: float | None = None, name: str = "tau") -> tuple[float, float]:
    """Return a range of time constants, if it is one; warns where dt is above its lower end.

    Raises:
        TypeError: it is one number.
        ValueError: it is no range.
    """
    if not isinstance(tau, Sequence):
        raise TypeError(f"{name} must be a range, two time constants; got {tau!r}.")
    if len(tau) != 2 or not check_positive(tau[0], name) < check_positive(tau[1], name):
        raise ValueError(f"{name} must be two time constants, the lower one first; got {tuple(tau)}.")
    if dt is not None:
        check_time_step(dt, tau[0])
    return float(tau[0]), float(tau[1])
