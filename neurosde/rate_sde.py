"""The rate network as a stochastic differential equation.

    τ dh = (−h + W φ(h) + I) dt + τ σ dB,        x = φ(h)

h is the voltage (dimensionless), x the firing rate, W[i, j] the weight from presynaptic neuron j to postsynaptic
neuron i, I an external input and B a Brownian motion per neuron. For iid weights of variance g²/N and φ = tanh the
network without noise is silent below g = 1 and chaotic above it.

References:
    Chaos in random neural networks (Sompolinsky, Crisanti, Sommers, 1988),
    https://doi.org/10.1103/PhysRevLett.61.259
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from jaxtyping import Float
from numpy.typing import ArrayLike
from torch import Tensor, nn

from neurosde.activation import Activation, get_activation
from neurosde.validation import as_float_tensor, check_positive, check_square

Drive = Literal["scaled", "unscaled"]


class RateSDE(nn.Module):
    """A rate network in torchsde's form: an Itô SDE with diagonal, additive noise.

    With `drive="scaled"` (the default) the drift is (−h + Wφ(h) + I)/τ; with `drive="unscaled"` it is
    −h/τ + Wφ(h) + I. They agree at τ = 1; elsewhere the second one has an effective gain gτ.

    The module also is a torchdiffeq right-hand side: called as `sde(t, h)` it returns the drift.

    Args:
        weights: recurrent weights (post, pre), shape (..., neuron, neuron), dimensionless. An `nn.Parameter` becomes a
            parameter of the module, a plain tensor a buffer (gradients flow to it all the same).
        tau: time constant, a positive scalar or shape broadcasting to (..., neuron).
        input: external input I, None, or shape (..., neuron); with `input_dt`, shape (..., time, neuron).
        noise_std: noise σ per √time, a non-negative scalar or shape broadcasting to (..., neuron).
        phi: name of the nonlinearity (tanh, sigmoid, softplus, relu, linear) or an elementwise callable.
        drive: "scaled" or "unscaled".
        input_dt: spacing of the samples of a time-varying input; each is held until the next, the last for ever. The
            first is at t = 0.

    Raises:
        ValueError: weights not square, a shape that does not fit, tau not positive, noise_std negative, NaN or inf.
        TypeError: values that are not numbers, or tensors of different dtypes.
    """

    noise_type = "diagonal"
    sde_type = "ito"

    weights: Tensor
    tau: Tensor
    input: Tensor | None
    noise_std: Tensor

    def __init__(
        self,
        weights: Tensor | ArrayLike,
        tau: float | Tensor = 1.0,
        input: Tensor | ArrayLike | None = None,
        noise_std: float | Tensor | ArrayLike = 0.0,
        phi: str | Callable[[Tensor], Tensor] | Activation = "tanh",
        *,
        drive: Drive = "scaled",
        input_dt: float | None = None,
    ) -> None:
        super().__init__()
        if drive not in get_args(Drive):
            raise ValueError(f"drive must be one of {get_args(Drive)}; got {drive!r}.")
        W = as_float_tensor(weights, "weights")
        check_square(W.shape)
        self._own("weights", W)
        self._own("tau", self._per_neuron(tau, "tau", positive=True))
        self._own("noise_std", self._per_neuron(noise_std, "noise_std", positive=False))
        current = None if input is None else as_float_tensor(input, "input", like=W)
        self.input_dt = None if input_dt is None else check_positive(input_dt, "input_dt")
        if current is not None:
            least = 1 if input_dt is None else 2
            if current.ndim < least or current.shape[-1] not in (1, self.num_neurons):
                wanted = "(..., neuron)" if input_dt is None else "(..., time, neuron)"
                raise ValueError(
                    f"input must have shape {wanted} with {self.num_neurons} neurons; got {tuple(current.shape)}."
                )
        elif input_dt is not None:
            raise ValueError("input_dt needs a time-varying input (..., time, neuron); got input=None.")
        self._own("input", current)
        self.phi = get_activation(phi)
        self.drive = drive

    @property
    def num_neurons(self) -> int:
        """Number of neurons N."""
        return self.weights.shape[-1]

    @property
    def noise_free(self) -> bool:
        """Whether σ is exactly zero everywhere and no gradient is asked of it."""
        return not self.noise_std.requires_grad and not bool(self.noise_std.any())

    def f(self, t: Tensor | float, h: Float[Tensor, "*batch neuron"]) -> Float[Tensor, "*out neuron"]:
        """Drift dh/dt at time t and voltage h, shape (..., neuron)."""
        recurrent = _multiply(self.weights, self.phi(h))
        current = self.input_at(t)
        if current is not None:
            recurrent = recurrent + current
        return (recurrent - h) / self.tau if self.drive == "scaled" else recurrent - h / self.tau

    def g(self, t: Tensor | float, h: Float[Tensor, "*batch neuron"]) -> Float[Tensor, "*batch neuron"]:
        """Diffusion σ, the standard deviation of the noise per √time, shape (..., neuron)."""
        return self.noise_std.expand_as(h)

    def forward(self, t: Tensor | float, h: Tensor) -> Tensor:
        """Return the drift: the noise-free right-hand side, as torchdiffeq calls it."""
        return self.f(t, h)

    def input_at(self, t: Tensor | float) -> Tensor | None:
        """External input at time t, shape (..., neuron), or None without one."""
        if self.input is None or self.input_dt is None:
            return self.input
        return self.input[..., self.input_index(t), :]

    def input_index(self, t: Tensor | float) -> int:
        """Index of the sample of a time-varying input that holds at time t."""
        if self.input is None or self.input_dt is None:
            raise ValueError("input_index needs a time-varying input; this network's is constant.")
        index = int(float(t) / self.input_dt + 1e-3)  # solvers' accumulated times may fall just short of the grid
        return min(max(index, 0), self.input.shape[-2] - 1)

    def euler_coefficients(self, dt: float) -> tuple[Tensor, Tensor]:
        """Coefficients a, b of the Euler–Maruyama step h' = a h + b (W φ(h) + I) + σ dB."""
        ratio = dt / self.tau
        return 1 - ratio, ratio if self.drive == "scaled" else torch.full_like(ratio, dt)

    def extra_repr(self) -> str:
        """Shapes and conventions, for print(sde)."""
        current = None if self.input is None else tuple(self.input.shape)
        return f"weights={tuple(self.weights.shape)}, input={current}, phi={self.phi.name!r}, drive={self.drive!r}"

    def _own(self, name: str, value: Tensor | None) -> None:
        if isinstance(value, nn.Parameter):
            self.register_parameter(name, value)
        else:
            self.register_buffer(name, value)

    def _per_neuron(self, value: float | Tensor | ArrayLike, name: str, *, positive: bool) -> Tensor:
        tensor = as_float_tensor(value, name, like=self.weights)
        if tensor.ndim and tensor.shape[-1] not in (1, self.num_neurons):
            raise ValueError(
                f"{name} must be a scalar or broadcast to (..., {self.num_neurons} neurons); got {tuple(tensor.shape)}."
            )
        wrong = tensor.detach() <= 0 if positive else tensor.detach() < 0
        if bool(wrong.any()):
            expected = "positive" if positive else "non-negative"
            raise ValueError(f"{name} must be {expected}; got {float(tensor.detach().min())}.")
        return tensor


def _multiply(weights: Tensor, x: Tensor) -> Tensor:
    """Return W x over the last axis; weights shared by the trials of a network become one matrix product."""
    if weights.ndim == 2:
        return x @ weights.mT
    if weights.shape[-3] == 1 and x.ndim >= 2:
        return x @ weights.squeeze(-3).mT
    return (weights @ x.unsqueeze(-1)).squeeze(-1)
