"""The discrete adjoint of Euler–Maruyama as a torch.autograd.Function.

The gradient is that of the scheme itself, exact to rounding, not of the continuous equation it approximates. The tape
is the returned path, so differentiating costs no memory beyond it: with a nonlinearity whose slope follows from its
output (tanh, sigmoid, …) the activity alone suffices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from neurosde.activation import Activation
from neurosde.engines import ENGINES, Engine
from neurosde.problem import TENSORS, DrawnNoise, Problem

_OTHERS = 6  # arguments of `forward` before the tensors


class _EulerMaruyama(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        engine: Engine,
        phi: Activation,
        steps: int,
        noise: DrawnNoise | None,
        activity: bool,
        voltage: bool,
        *tensors: Tensor | None,
    ) -> tuple[Tensor | None, Tensor | None]:
        ctx.set_materialize_grads(False)
        problem = Problem(phi=phi, steps=steps, noise=noise, **_named(tensors))
        x, h = engine.forward(problem, activity=activity, voltage=voltage)
        ctx.engine, ctx.phi, ctx.steps, ctx.noise = engine, phi, steps, noise
        ctx.save_for_backward(*tensors, x, h)
        return x, h

    @staticmethod
    def backward(ctx: Any, grad_x: Tensor | None, grad_h: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, x, h = ctx.saved_tensors
        if grad_x is None and grad_h is None:
            return (None,) * (_OTHERS + len(tensors))
        needed = zip(TENSORS, ctx.needs_input_grad[_OTHERS:], strict=True)
        needs = frozenset(name for name, wanted in needed if wanted)
        problem = Problem(phi=ctx.phi, steps=ctx.steps, noise=ctx.noise, **_named(tensors))
        engine = ctx.engine
        if torch.is_grad_enabled() and not engine.differentiable:  # create_graph=True: to be differentiated once more
            engine, problem = ENGINES["torch"], problem.drawn()
        gradients = engine.vjp(problem, x, h, grad_x, grad_h, needs)
        return (None,) * _OTHERS + tuple(getattr(gradients, name) for name in TENSORS)


def _named(tensors: Sequence[Tensor | None]) -> dict[str, Any]:
    return dict(zip(TENSORS, tensors, strict=True))


def integrate(
    engine: Engine, problem: Problem, *, activity: bool, voltage: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Run a problem on an engine with the discrete adjoint as its gradient.

    Returns:
        x and h, each (steps + 1, M, K, N), None where not asked for (h is also returned where the adjoint needs it).
    """
    if not (torch.is_grad_enabled() and problem.requires_grad):
        with torch.no_grad():
            return engine.forward(problem, activity=activity, voltage=voltage)
    tensors = [getattr(problem, name) for name in TENSORS]
    # ∂L/∂a needs h itself, and so does a nonlinearity whose slope the activity does not tell.
    tape = voltage or problem.decay.requires_grad or problem.phi.slope_from_output is None
    x, h = _EulerMaruyama.apply(engine, problem.phi, problem.steps, problem.noise, activity, tape, *tensors)
    return x, h
