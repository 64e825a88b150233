"""The discrete adjoint of Euler–Maruyama as a torch.autograd.Function.

The gradient is that of the scheme itself, exact to rounding, not of the continuous equation it approximates. The tape
is the returned path, so differentiating costs no memory beyond it: with a nonlinearity whose slope follows from its
output (tanh, sigmoid, …) the activity alone suffices.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from neurosde.activation import Activation
from neurosde.engines import Engine
from neurosde.problem import Problem

_TENSORS = ("state", "weights", "decay", "input", "noise_std", "increments")


class _EulerMaruyama(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, engine: Engine, phi: Activation, steps: int, activity: bool, voltage: bool, *tensors: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        ctx.set_materialize_grads(False)
        problem = Problem(phi, steps, *tensors)  # type: ignore[arg-type]
        x, h = engine.forward(problem, activity=activity, voltage=voltage)
        ctx.engine, ctx.phi, ctx.steps = engine, phi, steps
        ctx.save_for_backward(*tensors, x, h)
        return x, h

    @staticmethod
    def backward(ctx: Any, grad_x: Tensor | None, grad_h: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, x, h = ctx.saved_tensors
        if grad_x is None and grad_h is None:
            return (None,) * (5 + len(tensors))
        needed = zip(_TENSORS, ctx.needs_input_grad[5:], strict=True)
        needs = frozenset(name for name, wanted in needed if wanted)
        gradients = ctx.engine.vjp(Problem(ctx.phi, ctx.steps, *tensors), x, h, grad_x, grad_h, needs)
        return (None,) * 5 + tuple(getattr(gradients, name) for name in _TENSORS)


class _EulerMaruyamaOnce(_EulerMaruyama):
    """For engines whose vjp is not itself made of differentiable torch operations."""

    backward = staticmethod(once_differentiable(_EulerMaruyama.backward))  # type: ignore[assignment]


def integrate(
    engine: Engine, problem: Problem, *, activity: bool, voltage: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Run a problem on an engine with the discrete adjoint as its gradient.

    Returns:
        x and h, each (steps + 1, M, K, N), None where not asked for (h is also returned where the adjoint needs it).
    """
    tensors = [getattr(problem, name) for name in _TENSORS]
    # ∂L/∂a needs h itself, and so does a nonlinearity whose slope the activity does not tell.
    tape = voltage or problem.decay.requires_grad or problem.phi.slope_from_output is None
    function = _EulerMaruyama if engine.differentiates_twice else _EulerMaruyamaOnce
    x, h = function.apply(engine, problem.phi, problem.steps, activity, tape, *tensors)
    return x, h


assert [f.name for f in fields(Problem)][2:] == list(_TENSORS)
