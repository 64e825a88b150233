"""Firing-rate nonlinearities φ, with what the adjoint and the likelihood need of them.

The discrete adjoint multiplies by φ'(h). For the usual nonlinearities φ' is a function of the output x = φ(h)
alone (tanh: 1 − x²), so that the activity itself is the whole tape and h need not be kept. The likelihood inverts
φ to get h back from the activity.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Activation:
    """An elementwise nonlinearity x = φ(h).

    Attributes:
        name: how the nonlinearity is called in configurations and cubes.
        function: φ itself, elementwise on a tensor.
        slope_from_output: φ'(h) as a function of x = φ(h), or None where x does not determine it.
        inverse: h as a function of x, or None where φ cannot be inverted.
        open_range: the open interval that x lies in, where φ is invertible.
    """

    name: str
    function: Callable[[Tensor], Tensor]
    slope_from_output: Callable[[Tensor], Tensor] | None = None
    inverse: Callable[[Tensor], Tensor] | None = None
    open_range: tuple[float, float] = (-float("inf"), float("inf"))

    def __call__(self, h: Tensor) -> Tensor:
        """Return φ(h)."""
        return self.function(h)

    def slope(self, x: Tensor, h: Tensor | None) -> Tensor:
        """Return φ'(h), from the output x where that is enough, else by forward-mode differentiation at h."""
        if self.slope_from_output is not None:
            return self.slope_from_output(x)
        if h is None:
            raise ValueError(f"the slope of {self.name!r} needs the voltage h; got the activity only.")
        slope: Tensor = torch.func.jvp(self.function, (h,), (torch.ones_like(h),))[1]
        return slope


def _softplus_inverse(x: Tensor) -> Tensor:
    return x + torch.log(-torch.expm1(-x))


ACTIVATIONS = {
    activation.name: activation
    for activation in (
        Activation("tanh", torch.tanh, lambda x: 1 - x * x, torch.atanh, (-1.0, 1.0)),
        Activation("sigmoid", torch.sigmoid, lambda x: x * (1 - x), torch.logit, (0.0, 1.0)),
        Activation(
            "softplus",
            torch.nn.functional.softplus,
            lambda x: -torch.expm1(-x),
            _softplus_inverse,
            (0.0, float("inf")),
        ),
        Activation("relu", torch.relu, lambda x: (x > 0).to(x.dtype)),
        Activation("linear", lambda h: h.clone(), torch.ones_like, lambda x: x),
    )
}


def get_activation(phi: str | Callable[[Tensor], Tensor] | Activation) -> Activation:
    """Return the nonlinearity called `phi`, or wrap a user's own elementwise function.

    Raises:
        ValueError: unknown name.
        TypeError: neither a name nor a callable.
    """
    if isinstance(phi, Activation):
        return phi
    if isinstance(phi, str):
        if phi not in ACTIVATIONS:
            raise ValueError(f"phi must be one of {sorted(ACTIVATIONS)} or a callable; got {phi!r}.")
        return ACTIVATIONS[phi]
    if callable(phi):
        return Activation(getattr(phi, "__name__", type(phi).__name__), phi)
    raise TypeError(f"phi must be a name or an elementwise callable on tensors; got {type(phi).__name__}.")
