"""What a recording says about its weights: the likelihood of transitions.

With the voltage known, Euler–Maruyama with step coefficients a, b (see `RateSDE.euler_coefficients`) makes

    y[t] = (h[t+1] − a h[t])/b − I = W φ(h[t]) + s ξ,     s = σ √dt / b,

linear and Gaussian in W. All that a recording says about W, σ and the prior is then in a few sums over transitions,
which add over time and trials: `TransitionStatistics`. The precision statistics Λ = Σφφᵀ/s² and B = Σyφᵀ/s² give the
log-likelihood tr(BWᵀ) − ½ tr(WΛWᵀ) up to a constant.

From firing rates alone h = φ⁻¹(x), and rounding of x is amplified by 1/φ'(h): near saturation, h is known badly.
Transitions in which any neuron's voltage is uncertain by more than `max_voltage_error` are dropped and counted, never
clipped; the remaining uncertainty sets a floor for σ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import ArrayLike
from torch import Tensor

from neurosde.activation import Activation, get_activation
from neurosde.rate_sde import Drive, RateSDE
from neurosde.validation import check_positive, check_time_step

_EPSILON = torch.finfo(torch.float64).eps
CHUNK = 2**20  # numbers of a trial converted to float64 at a time


@dataclass(frozen=True)
class TransitionStatistics:
    """Sums over the transitions of one or more trials of one network, in float64.

    Attributes:
        xx: Σ φφᵀ, shape (neuron, neuron).
        yx: Σ yφᵀ, shape (neuron, neuron), (post, pre).
        yy: Σ y² of each neuron, shape (neuron,).
        x: Σ φ, shape (neuron,).
        y: Σ y, shape (neuron,).
        count: number of transitions.
        dropped: number of transitions left out for saturation.
        error: Σ over transitions of the mean squared error of y that rounding of the recording causes.
        gain: b of the Euler step.
        dt: step.
        free_input: whether a constant input per neuron was projected out; the sums are then about their means.
    """

    xx: Tensor
    yx: Tensor
    yy: Tensor
    x: Tensor
    y: Tensor
    count: int
    dropped: int
    error: float
    gain: float
    dt: float
    free_input: bool = False

    @property
    def num_neurons(self) -> int:
        """Number of neurons N."""
        return len(self.yy)

    @property
    def degrees(self) -> int:
        """Transitions that still carry information on W and σ: one is spent on a free input."""
        return self.count - int(self.free_input)

    def noise_scale(self, noise_std: float) -> float:
        """Standard deviation s of y about Wφ, for a noise σ."""
        return noise_std * math.sqrt(self.dt) / self.gain

    def noise_std(self, scale: float) -> float:
        """Noise σ that gives y the standard deviation s."""
        return scale * self.gain / math.sqrt(self.dt)

    @property
    def noise_floor(self) -> float:
        """σ that rounding alone would look like; a smaller one cannot be told from it.

        Rounding of the recording is `error`. Rounding of the sums is of order ε|y||φ| (ε of float64), which stands for
        noise of s = ε|y|·√(λ_max/λ) along an eigendirection λ; `spectrum` keeps λ above Nελ_max, hence s² = ε|y|²/N.
        """
        of_sums = _EPSILON * float(self.yy.mean()) / self.num_neurons
        return self.noise_std(math.sqrt(max(self.error / max(self.count, 1), of_sums)))

    def spectrum(self) -> tuple[Tensor, Tensor, Tensor]:
        """Eigenvalues λ (direction,) and eigenvectors U (pre, direction) of Σφφᵀ, and (Σyφᵀ)U (post, direction).

        Directions that the activity never visited have eigenvalues of the size of rounding, Nελ_max, not exact zeros;
        both λ and the projection are set to zero there, so that nothing is claimed to be known of them.
        """
        eigenvalues, vectors = torch.linalg.eigh(self.xx)
        visited = eigenvalues > self.num_neurons * _EPSILON * eigenvalues[-1]
        return eigenvalues * visited, vectors, self.yx @ vectors * visited

    @property
    def log_volume(self) -> float:
        """What a neuron's log density of y exceeds that of h by.

        dh[t+1] = b dy, and the integral over a free input leaves a factor 1/√count.
        """
        integral = 0.5 * math.log(self.count) if self.free_input else 0.0
        return self.count * math.log(self.gain) + integral

    def __add__(self, other: TransitionStatistics) -> TransitionStatistics:
        """Add another recording of the same network, taken with the same dt and tau.

        Raises:
            ValueError: another number of neurons, dt or tau.
        """
        if (self.num_neurons, self.gain, self.dt) != (other.num_neurons, other.gain, other.dt):
            raise ValueError("only recordings of the same neurons with the same dt and tau can be added.")
        if self.free_input or other.free_input:
            raise ValueError("add recordings first, then project the input out.")
        names = ("xx", "yx", "yy", "x", "y", "count", "dropped", "error")
        return replace(self, **{name: getattr(self, name) + getattr(other, name) for name in names})

    def without_input(self) -> TransitionStatistics:
        """Project out a constant input of each neuron (a flat prior over it, integrated exactly).

        Raises:
            ValueError: fewer than two transitions.
        """
        if self.count < 2:
            raise ValueError(f"an unknown input needs at least two transitions; got {self.count}.")
        return replace(
            self,
            xx=self.xx - torch.outer(self.x, self.x) / self.count,
            yx=self.yx - torch.outer(self.y, self.x) / self.count,
            yy=self.yy - self.y.square() / self.count,
            free_input=True,
        )

    def precision(self, noise_std: float) -> tuple[Tensor, Tensor]:
        """Λ (pre, pre) and B (post, pre) for a noise σ.

        Raises:
            ValueError: σ is not positive.
        """
        check_positive(noise_std, "noise_std")
        variance = self.noise_scale(noise_std) ** 2
        return self.xx / variance, self.yx / variance

    def log_likelihood(
        self, weights: Float[Tensor, "*batch post pre"], noise_std: float | Tensor
    ) -> Float[Tensor, "*batch"]:
        """Log p(h[1:] | h[0], W, σ), differentiable in W and σ; with a free input, integrated over it.

        Args:
            weights: W (post, pre), shape (..., neuron, neuron).
            noise_std: σ per √time.

        Returns:
            The log density of the voltages, shape (...).
        """
        W = weights.to(self.xx.dtype)
        sigma = torch.as_tensor(noise_std, dtype=self.xx.dtype)
        scale = sigma * math.sqrt(self.dt) / self.gain
        fitted = (W @ self.xx * W).sum((-1, -2)) - 2 * (W * self.yx).sum((-1, -2))
        squares = self.yy.sum() + fitted
        log_density = -0.5 * squares / scale**2 - self.degrees * self.num_neurons * (
            torch.log(scale) + 0.5 * math.log(2 * math.pi)
        )
        return log_density - self.num_neurons * self.log_volume


def transition_statistics(
    activity: ArrayLike | Tensor | None = None,
    dt: float = 0.1,
    tau: float = 1.0,
    *,
    voltage: ArrayLike | Tensor | None = None,
    input: ArrayLike | Tensor | None = None,
    phi: str | Callable[[Tensor], Tensor] | Activation = "tanh",
    drive: Drive = "scaled",
    max_voltage_error: float = 1e-3,
    resolution: float | None = None,
) -> TransitionStatistics:
    """Collect what the transitions of a recording say about W, streaming over trials and time.

    Args:
        activity: firing rate x, shape (time, neuron) or (trial, time, neuron); not needed where voltage is given.
        dt: spacing of the samples.
        tau: time constant.
        voltage: h in the same shape, where it was recorded; nothing is dropped then.
        input: known external input, shape (neuron,), (time, neuron) or (trial, time, neuron); None is zero.
        phi: the nonlinearity; must be invertible if the voltage is not given.
        drive: see `RateSDE`.
        max_voltage_error: largest rounding error of h that a transition may have.
        resolution: relative rounding error of the recorded numbers; None takes that of their dtype.

    Returns:
        The statistics, on the CPU in float64.

    Raises:
        ValueError: wrong shapes, fewer than two samples, NaN, rates outside the range of φ, or every transition
            saturated.
    """
    pieces = transitions(
        activity, dt, tau, voltage=voltage, input=input, phi=phi, drive=drive, max_voltage_error=max_voltage_error,
        resolution=resolution,
    )  # fmt: skip
    total: TransitionStatistics | None = None
    for one in pieces:
        x, y = one.x[one.good], one.y[one.good]
        sums = TransitionStatistics(
            xx=x.mT @ x,
            yx=y.mT @ x,
            yy=y.square().sum(0),
            x=x.sum(0),
            y=y.sum(0),
            count=len(y),
            dropped=int((~one.good).sum()),
            error=float(one.error[one.good].sum()),
            gain=one.gain,
            dt=float(dt),
        )
        total = sums if total is None else total + sums
    assert total is not None
    if total.count == 0:
        raise ValueError(
            f"all {total.dropped} transitions are saturated: rounding leaves the voltage uncertain by more than "
            f"{max_voltage_error}. Record the voltage, store float64, or raise max_voltage_error."
        )
    return total


@dataclass(frozen=True)
class Transitions:
    """Successive transitions of one trial, in float64.

    Attributes:
        trial: index of the trial.
        h: voltage before each, shape (time, neuron).
        x: firing rate before each, shape (time, neuron).
        y: what the weights and noise made of it, (h[t+1] − a h[t])/b − I, shape (time, neuron).
        error: mean squared error of y that rounding of the recording causes, shape (time,).
        good: whether rounding leaves the voltage known well enough, shape (time,).
        gain: b.
    """

    trial: int
    h: Tensor
    x: Tensor
    y: Tensor
    error: Tensor
    good: Tensor
    gain: float


def transitions(
    activity: ArrayLike | Tensor | None = None,
    dt: float = 0.1,
    tau: float = 1.0,
    *,
    voltage: ArrayLike | Tensor | None = None,
    input: ArrayLike | Tensor | None = None,
    phi: str | Callable[[Tensor], Tensor] | Activation = "tanh",
    drive: Drive = "scaled",
    max_voltage_error: float = 1e-3,
    resolution: float | None = None,
) -> Iterator[Transitions]:
    """Stream the transitions of a recording, a piece of a trial at a time.

    Arguments and errors are those of `transition_statistics`.
    """
    nonlinearity = get_activation(phi)
    dt = check_time_step(dt, check_positive(tau, "tau"))
    recorded, name = (activity, "activity") if voltage is None else (voltage, "voltage")
    if recorded is None:
        raise ValueError("transition_statistics needs activity or voltage; got neither.")
    data = as_trials(recorded, name)
    trials, samples, N = data.shape
    resolution = resolution if resolution is not None else torch.finfo(data.dtype).eps
    current = _as_input(input, trials, samples, N)
    if voltage is None:
        _check_rates(data, nonlinearity)
    coefficients = RateSDE(np.zeros((1, 1)), tau, drive=drive).euler_coefficients(dt)
    decay, gain = (float(value) for value in coefficients)
    length = max(2, CHUNK // N)
    for trial in range(trials):
        for start in range(0, samples - 1, length):
            piece = data[trial, start : start + length + 1].double()
            h, error = _voltage(piece, nonlinearity, resolution, given=voltage is not None)
            x = nonlinearity(h) if voltage is not None else piece
            y = (h[1:] - decay * h[:-1]) / gain - current[trial, start : start + len(piece) - 1]
            good = (error.amax(-1)[1:] <= max_voltage_error) & (error.amax(-1)[:-1] <= max_voltage_error)
            y_error = (error[1:].square() + (decay * error[:-1]).square()).mean(-1) / gain**2
            yield Transitions(trial, h[:-1], x[:-1], y, y_error, good, gain)


def as_trials(recorded: ArrayLike | Tensor, name: str) -> Tensor:
    """Return a recording (time, neuron) or (trial, time, neuron) as the latter, on the CPU.

    Raises:
        ValueError: wrong shapes, numbers that are not floating-point, or NaN.
    """
    data = torch.as_tensor(np.asarray(recorded) if not isinstance(recorded, Tensor) else recorded.detach().cpu())
    if not data.is_floating_point():
        raise ValueError(f"{name} must be floating-point numbers; got {data.dtype}.")
    if data.ndim == 2:
        data = data.unsqueeze(0)
    if data.ndim != 3 or data.shape[1] < 2 or 0 in data.shape:
        raise ValueError(
            f"{name} must be (time, neuron) or (trial, time, neuron) with at least two times; got {tuple(data.shape)}."
        )
    if not bool(torch.isfinite(data).all()):
        raise ValueError(f"{name} must be finite; got {int((~torch.isfinite(data)).sum())} NaN or infinite values.")
    return data


def _as_input(value: ArrayLike | Tensor | None, trials: int, samples: int, N: int) -> Tensor:
    if value is None:
        return torch.zeros(()).expand(trials, samples, N)
    current = torch.as_tensor(np.asarray(value) if not isinstance(value, Tensor) else value.detach().cpu()).double()
    if (
        current.ndim == 0
        or current.shape[-1] != N
        or current.ndim > 3
        or (current.ndim > 1 and current.shape[-2] != samples)
    ):
        raise ValueError(
            f"input must be ({N},), ({samples}, {N}) or ({trials}, {samples}, {N}); got {tuple(current.shape)}."
        )
    if not bool(torch.isfinite(current).all()):
        raise ValueError("input must be finite; got NaN or infinite values.")
    return current.expand(trials, samples, N)


def _check_rates(data: Tensor, phi: Activation) -> None:
    if phi.inverse is None or phi.slope_from_output is None:
        raise ValueError(f"phi={phi.name!r} cannot be inverted; give the voltage.")
    low, high = phi.open_range
    outside = (data <= low) | (data >= high)
    if bool(outside.any()):
        worst = float(data[outside].abs().max())
        raise ValueError(
            f"activity must lie strictly between {low} and {high} for phi={phi.name!r}; got {int(outside.sum())} "
            f"values outside (|x| up to {worst:.6g}). Rescale the rates, drop saturated stretches or noise "
            "that was added, or give the voltage, as an array called voltage (of a npz, netCDF or mat file; of a cube "
            "by build-dataset --voltage)."
        )


def _voltage(piece: Tensor, phi: Activation, resolution: float, *, given: bool) -> tuple[Tensor, Tensor]:
    """Voltage and its rounding error, both (time, neuron)."""
    if given:
        return piece, 0.5 * resolution * piece.abs()
    assert phi.inverse is not None and phi.slope_from_output is not None
    return phi.inverse(piece), 0.5 * resolution * piece.abs() / phi.slope_from_output(piece)
