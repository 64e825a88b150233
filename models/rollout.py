"""The likelihood of a recording through the roll-out: multiple shooting, in windows whose gradients stay bounded.

With the coefficients a, b of an Euler step (`RateSDE.euler_coefficients`) a window starts at a recorded state,
ĥ_0 = h_0, and the simulator rolls it out without noise, ĥ_{k+1} = F(ĥ_k) = a ĥ_k + b (W φ(ĥ_k) + I_k). To first order
in the noise what was recorded departs from that as

    δ_{k+1} = J_k δ_k + σ√dt ξ_k,    δ_k = h_k − ĥ_k,    J_k = a + b W diag φ'(ĥ_k),    δ_0 = 0,

which is the linear noise approximation. After k steps noise has accumulated to the covariance σ² dt Σ_j P Pᵀ, with
P = J_{k−1} … J_{j+1}: k σ² dt where J is near 1. Deviations at different times of a window share noise, too. All of
them together are Gaussian with a precision that is block tridiagonal, so that no covariance has to be formed:

    −2 log p = Σ_k |δ_{k+1} − J_k δ_k|²/(σ² dt) + N K log(2π σ² dt).

This is a normalised density of the window's states whatever W is. For windows of one step it is the transition
likelihood (`neurosde.likelihood`), and for a linear φ of any length; else it differs by what the linearisation leaves
out, of second order in δ. Where every step is recorded the transition likelihood is therefore to be preferred: it is
exact, and quicker. Here the gradient goes through the simulator itself, on any of its engines.

That gradient holds products of J, which grow e-fold in the time t* of `neurosde.models.lyapunov`, no longer than the
Lyapunov time. Windows are no longer than that: beyond, gradients explode in chaos, and δ outgrows the linearisation.

References:
    Recent advances in parameter identification techniques for O.D.E. (Bock, 1983), multiple shooting,
    https://doi.org/10.1007/978-1-4684-7324-7_7
    Parameter estimation in nonlinear stochastic differential equations (Timmer, 2000), multiple shooting in chaos,
    https://doi.org/10.1016/S0960-0779(00)00015-1
    Stochastic processes in physics and chemistry (van Kampen, 2007), chapter X, the linear noise approximation
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from neurosde.activation import Activation, get_activation
from neurosde.datasets.recordings import Recording
from neurosde.engines import EngineName
from neurosde.models.recorded import recorded_voltage
from neurosde.rate_sde import RateSDE
from neurosde.solve import simulate_rate_network
from neurosde.validation import check_positive

LONGEST = 0.5  # time constants: of windows of no given length, for which the linearisation costs little


@dataclass(frozen=True)
class _Windows:
    """Windows of as many steps: recorded voltage and input, shapes (window, step + 1, neuron)."""

    voltage: Tensor
    input: Tensor | None


class RolloutLikelihood:
    """Log p(recording | W) by roll-outs of windows; see the module.

    Called with weights (..., post, pre) it returns a number for each, shape (...), differentiable in W, twice if need
    be: what `FunctionGuidance` takes.

    Args:
        recording: a recording whose dt, tau and drive are settled. Where rounding hides the voltage near saturation,
            a window ends.
        noise_std: σ per √time.
        window: length of the windows, in the unit of dt; None takes the horizon, but at most half a time constant.
        horizon: longest window, see `folding_time`.
        phi: the nonlinearity.
        engine: who rolls out and back, see `neurosde.sdeint`.
        dtype: of the roll-outs.

    Attributes:
        steps: steps of a window.
        windows: number of windows.
        transitions: steps in all of them.

    Warns where the window that is asked for is longer than the horizon: it is cut to that.

    Raises:
        ValueError: a window shorter than a step, numbers out of range, or a recording that cannot be used.
    """

    def __init__(
        self,
        recording: Recording,
        noise_std: float,
        *,
        window: float | None = None,
        horizon: float,
        phi: str | Callable[[Tensor], Tensor] | Activation = "tanh",
        engine: EngineName = "auto",
        dtype: torch.dtype = torch.float64,
    ) -> None:
        voltage, good, current = recorded_voltage(recording, phi)
        assert recording.dt is not None and recording.tau is not None and recording.drive is not None
        self.dt, self.tau, self.drive = recording.dt, recording.tau, recording.drive
        self.noise_std = check_positive(noise_std, "noise_std")
        self.phi, self.engine, self.dtype = get_activation(phi), engine, dtype
        self.steps = _window_steps(window, horizon, self.dt, self.tau)
        coefficients = RateSDE(np.zeros((1, 1)), self.tau, drive=self.drive).euler_coefficients(self.dt)
        self._decay, self._gain = (float(value) for value in coefficients)
        of_length: dict[int, list[tuple[int, int]]] = {}
        for trial, start, steps in _cut(good, self.steps):
            of_length.setdefault(steps, []).append((trial, start))
        self._groups = []
        for steps, starts in of_length.items():
            trials = torch.tensor([one for one, _ in starts])[:, None]
            times = torch.tensor([first for _, first in starts])[:, None] + torch.arange(steps + 1)
            driven = None if current is None else current[trials, times].to(dtype)
            self._groups.append(_Windows(voltage[trials, times].to(dtype), driven))
        self.windows = sum(len(group.voltage) for group in self._groups)
        self.transitions = int(good.sum())
        if not self.windows:
            raise ValueError("all transitions are saturated; record the voltage, or store float64.")

    @property
    def window(self) -> float:
        """Length of a window, in the unit of dt."""
        return self.steps * self.dt

    def __call__(self, weights: Float[Tensor, "*batch post pre"]) -> Float[Tensor, "*batch"]:
        """Return log p(recording | W), shape (...), in the dtype of the weights.

        Raises:
            ValueError: weights of another number of neurons.
        """
        N = self._groups[0].voltage.shape[-1]
        if weights.ndim < 2 or tuple(weights.shape[-2:]) != (N, N):
            raise ValueError(f"weights must be (..., {N}, {N}), as the recording is; got {tuple(weights.shape)}.")
        W = weights.to(self.dtype).reshape(-1, 1, N, N)
        squares = torch.stack([self._squares(W, group) for group in self._groups]).sum(0)
        variance = self.noise_std**2 * self.dt
        found = -0.5 * (squares / variance + N * self.transitions * math.log(2 * math.pi * variance))
        return found.to(weights.dtype).reshape(weights.shape[:-2])

    def _squares(self, W: Tensor, group: _Windows) -> Tensor:
        """Σ |δ_{k+1} − J_k δ_k|² over some windows, shape (draw,)."""
        recorded = group.voltage.to(W.device)
        driven = None if group.input is None else group.input.to(W.device).unsqueeze(0)
        x, h = simulate_rate_network(
            W, recorded[:, 0], recorded.shape[1], self.dt, self.tau, driven, return_h=True, phi=self.phi,
            drive=self.drive, engine=self.engine,
        )  # fmt: skip
        deviation = recorded - h  # (draw, window, time, neuron)
        slope = self.phi.slope(x[..., :-1, :], h[..., :-1, :])
        felt = (slope * deviation[..., :-1, :]).flatten(1, 2) @ W.squeeze(1).mT
        ahead = self._decay * deviation[..., :-1, :] + self._gain * felt.view_as(slope)
        return (deviation[..., 1:, :] - ahead).square().sum((-1, -2, -3))


def _window_steps(window: float | None, horizon: float, dt: float, tau: float) -> int:
    """Steps of a window, at least one, and no more than the horizon has."""
    if not horizon > 0:
        raise ValueError(f"horizon must be a positive time, or infinite; got {horizon}.")
    if window is None:
        return max(1, int(min(horizon, LONGEST * tau) / dt + 1e-9))
    if check_positive(window, "window") < dt * (1 - 1e-9):
        raise ValueError(f"window must be at least a step, dt = {dt:g}; got {window:g}.")
    steps = int(window / dt + 1e-9)
    if steps * dt > horizon and steps > 1:
        steps = max(1, int(horizon / dt))
        warnings.warn(
            f"window = {window:g} is longer than {horizon:.3g}, in which gradients through the roll-out grow e-fold; "
            f"it was cut to {steps} step{'s' * (steps > 1)}, {steps * dt:.3g}.",
            stacklevel=3,
        )
    return steps


def _cut(good: Tensor, longest: int) -> Iterator[tuple[int, int, int]]:
    """Trial, first time and steps of each window: runs of good transitions, cut where they are longer than that."""
    for trial, row in enumerate(good.tolist()):
        start = 0
        for t in range(len(row) + 1):
            if t == len(row) or not row[t]:
                if t > start:
                    yield trial, start, t - start
                start = t + 1
            elif t - start == longest:
                yield trial, start, longest
                start = t
