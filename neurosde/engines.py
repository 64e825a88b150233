"""What steps the recursion: the engines behind `sdeint`, `odeint` and `simulate_rate_network`.

An engine has two methods on a folded `Problem`: `forward` returns the path, `vjp` the gradient of a loss by the
discrete adjoint. All engines follow the same increments to rounding, so that one tests the other.

    torch      the reference: any device and dtype, differentiable twice
    torchsde   torchsde's own Euler–Maruyama solver; also gives the continuous ("backsolve") adjoint
    julia      vector kernels in a worker process (`neurosde.julia`): the fastest on a CPU
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Literal, Protocol, get_args

import torch
import torchsde
from torch import Tensor, nn

from neurosde.brownian import BrownianPath
from neurosde.problem import Problem

if TYPE_CHECKING:
    from neurosde.julia.engine import JuliaEngine

EngineName = Literal["auto", "torch", "torchsde", "julia"]


@dataclass(frozen=True)
class Gradients:
    """Gradients of a loss with respect to the tensors of a `Problem`, in their shapes; None where not asked for."""

    state: Tensor | None
    weights: Tensor | None
    decay: Tensor | None
    input: Tensor | None
    noise_std: Tensor | None
    increments: Tensor | None


@dataclass(frozen=True)
class Work:
    """What there is to do, as far as choosing an engine needs it.

    Attributes:
        networks: networks, each with weights of its own.
        trajectories: networks × trials.
        neurons: N.
        steps: number of steps.
        noisy: whether noise has to be drawn.
        gradient: whether a gradient will be asked for.
        recorded: whether autograd has to see the steps.
        phi: name of the nonlinearity.
        dtype: of the state.
        device: of the state.
    """

    networks: int
    trajectories: int
    neurons: int
    steps: int
    noisy: bool
    gradient: bool
    recorded: bool
    phi: str
    dtype: torch.dtype
    device: torch.device


class Engine(Protocol):
    """The narrow interface of an engine.

    Attributes:
        name: how it is called.
        draws_noise: whether it takes a problem whose noise is still to be drawn.
        differentiable: whether autograd sees what it does, so that its gradient can be differentiated again.
    """

    name: str
    draws_noise: bool
    differentiable: bool

    def forward(self, problem: Problem, *, activity: bool, voltage: bool) -> tuple[Tensor | None, Tensor | None]:
        """Return x = φ(h) and h, each (steps + 1, M, K, N), each None unless asked for."""
        ...

    def vjp(
        self,
        problem: Problem,
        x: Tensor | None,
        h: Tensor | None,
        grad_x: Tensor | None,
        grad_h: Tensor | None,
        needs: frozenset[str],
    ) -> Gradients:
        """Return the gradients named in `needs`, given the path and the loss's gradient with respect to it."""
        ...


class TorchEngine:
    """The reference engine: one fused multiply–add, one matrix product and one φ per step, on any device."""

    name = "torch"
    draws_noise = False
    differentiable = True

    def forward(self, problem: Problem, *, activity: bool, voltage: bool) -> tuple[Tensor | None, Tensor | None]:
        """See `Engine`. Under grad mode the steps are recorded by autograd; otherwise they write into one buffer."""
        p = problem
        points = p.steps + 1
        xs = _Record(activity, points, p.state)
        hs = _Record(voltage, points, p.state)
        transposed = p.weights.mT
        h = p.state
        for t in range(points):
            x = p.phi(h)
            xs.put(t, x)
            hs.put(t, h)
            if t < p.steps:
                force = p.force(t)
                rest = p.decay * h if force is None else torch.addcmul(force, p.decay, h)
                h = torch.baddbmm(rest, x, transposed)
        return xs.stacked(), hs.stacked()

    def vjp(
        self,
        problem: Problem,
        x: Tensor | None,
        h: Tensor | None,
        grad_x: Tensor | None,
        grad_h: Tensor | None,
        needs: frozenset[str],
    ) -> Gradients:
        """Discrete adjoint of the recursion, exact to rounding.

        λ[t] = a λ[t+1] + φ'(h[t]) ∘ (Ŵᵀ λ[t+1] + g_x[t]) + g_h[t], then ∂L/∂Ŵ = Σ λ[t+1] φ(h[t])ᵀ in one product and
        sums of λ for the rest.
        """
        p = problem
        if x is None:
            assert h is not None
            x = p.phi(h)
        points = p.steps + 1
        record = _Record(True, points, p.state, reverse=True)
        adjoint: Tensor | None = None
        for t in reversed(range(points)):
            outer = None if grad_x is None else grad_x[t]
            if adjoint is None:
                through = outer
                rest = None
            else:
                through = adjoint @ p.weights if outer is None else torch.baddbmm(outer, adjoint, p.weights)
                rest = p.decay * adjoint
            if grad_h is not None:
                rest = grad_h[t] if rest is None else rest + grad_h[t]
            if through is not None:
                slope = p.phi.slope(x[t], None if h is None else h[t])
                rest = slope * through if rest is None else torch.addcmul(rest, slope, through)
            assert rest is not None
            adjoint = rest
            record.put(t, adjoint)
        lambdas = record.stacked()
        assert lambdas is not None
        later = lambdas[1:]

        def reduced(terms: Tensor, like: Tensor) -> Tensor:
            return terms.sum_to_size(like.shape)

        return Gradients(
            state=lambdas[0] if "state" in needs else None,
            weights=_outer_products(later, x[:-1]) if "weights" in needs else None,
            decay=reduced((later * h[:-1]).sum(0), p.decay) if "decay" in needs and h is not None else None,
            input=reduced(later, p.input) if "input" in needs and p.input is not None else None,
            noise_std=(
                reduced((later * p.increments).sum(0), p.noise_std)
                if "noise_std" in needs and p.increments is not None
                else None
            ),
            increments=p.noise_std * later if "increments" in needs else None,
        )


class TorchsdeEngine(TorchEngine):
    """torchsde's own Euler–Maruyama solver; the discrete adjoint is the reference engine's."""

    name = "torchsde"

    def forward(self, problem: Problem, *, activity: bool, voltage: bool) -> tuple[Tensor | None, Tensor | None]:
        """See `Engine`."""
        h = self._solve(problem, torchsde.sdeint)
        return problem.phi(h) if activity else None, h if voltage else None

    def backsolve(self, problem: Problem) -> Tensor:
        """Return h (steps + 1, M, K, N) with torchsde's continuous adjoint as its gradient.

        The continuous adjoint solves the adjoint equation anew, backwards in time: its gradient has an error of order
        dt, and costs more than the discrete one. It is here for comparison.
        """
        p = problem
        tensors = [t for t in (p.weights, p.decay, p.input, p.noise_std) if t is not None and t.requires_grad]
        return self._solve(problem, torchsde.sdeint_adjoint, adjoint_params=tensors)

    @staticmethod
    def _solve(problem: Problem, solver: Callable[..., Tensor], **options: object) -> Tensor:
        p = problem
        M, K, N = p.state.shape
        increments = p.state.new_zeros(p.steps, M, K, N) if p.increments is None else p.increments
        path = BrownianPath(increments.detach().flatten(1, 2), dt=1.0)
        if p.steps == 0:
            return p.state.unsqueeze(0)
        grid = torch.arange(p.steps + 1, dtype=torch.float64, device=p.state.device)
        h = solver(_UnitStepSDE(p), p.state.flatten(0, 1), grid, bm=path, method="euler", dt=1.0, **options)
        return h.unflatten(1, (M, K))


class _UnitStepSDE(nn.Module):
    """A folded problem in torchsde's (batch, channel) form, time counted in steps."""

    noise_type = "diagonal"
    sde_type = "ito"

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.problem = problem

    def f(self, t: Tensor, y: Tensor) -> Tensor:
        p = self.problem
        h = y.unflatten(0, p.state.shape[:2])
        drift = (p.decay - 1) * h + p.phi(h) @ p.weights.mT
        current = p.input_step(min(int(float(t) + 0.5), p.steps - 1))
        return (drift if current is None else drift + current).flatten(0, 1)

    def g(self, t: Tensor, y: Tensor) -> Tensor:
        p = self.problem
        return p.noise_std.expand(p.state.shape).flatten(0, 1)


ENGINES: dict[str, Engine] = {"torch": TorchEngine(), "torchsde": TorchsdeEngine()}


def select_engine(name: str, work: Work, *, whole: bool = False) -> Engine:
    """Return the engine called `name`; "auto" takes the fastest one that can do the work.

    Args:
        name: one of `EngineName`.
        work: what there is to do.
        whole: it is all that there is to do. The choice then depends on it alone; otherwise it also depends on whether
            Julia is running, and on what this process did before.

    Raises:
        ValueError: unknown name, or the engine cannot do it.
        JuliaNotFoundError: engine="julia" without a Julia.
    """
    if name not in get_args(EngineName):
        raise ValueError(f"engine must be one of {get_args(EngineName)}; got {name!r}.")
    if name in ENGINES:
        return ENGINES[name]
    julia = julia_engine()
    refusal = julia.refusal(work)
    if name == "julia":
        if refusal is not None:
            raise ValueError(f'engine="julia" {refusal}; use engine="torch".')
        return julia
    return julia if refusal is None and julia.pays(work, whole=whole) else ENGINES["torch"]


@cache
def julia_engine() -> JuliaEngine:
    """Return the Julia engine; nothing is started before it computes."""
    from neurosde.julia.engine import JuliaEngine

    return JuliaEngine()


class _Record:
    """A path being written: into one buffer, or into a list where autograd has to see every step."""

    def __init__(self, wanted: bool, points: int, like: Tensor, *, reverse: bool = False) -> None:
        self.wanted = wanted
        self.reverse = reverse
        self.steps: list[Tensor] = []
        in_place = wanted and not torch.is_grad_enabled()
        self.buffer = like.new_empty((points, *like.shape)) if in_place else None

    def put(self, t: int, value: Tensor) -> None:
        if self.buffer is not None:
            self.buffer[t] = value
        elif self.wanted:
            self.steps.append(value)

    def stacked(self) -> Tensor | None:
        if not self.wanted or self.buffer is not None:
            return self.buffer
        return torch.stack(self.steps[::-1] if self.reverse else self.steps)


def _outer_products(later: Tensor, x: Tensor) -> Tensor:
    """Σ over steps and trials of λ φ(h)ᵀ, shape (M, N, N), as one batched matrix product."""
    M = later.shape[1]
    return later.transpose(0, 1).reshape(M, -1, later.shape[-1]).mT @ x.transpose(0, 1).reshape(M, -1, x.shape[-1])
