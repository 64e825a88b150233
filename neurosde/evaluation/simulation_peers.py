"""What `neurosde benchmark simulate` compares: neurosde's engines, a plain torch loop, torchsde and torchdiffeq.

All take the Euler–Maruyama steps of one `Case` and return the whole path, h[0] included; with noise each draws its own
normals inside the timed call. The gradient is taken with respect to W and h0 from a given cotangent of the path, which
is laid out in memory as the method lays out its path, as the gradient of an elementwise loss would be.

References:
    torchsde: Scalable gradients for stochastic differential equations (Li et al., 2020), https://arxiv.org/abs/2001.01328
    torchdiffeq: Neural ordinary differential equations (Chen et al., 2018), https://arxiv.org/abs/1806.07366
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from neurosde.rate_sde import RateSDE
from neurosde.solve import sdeint

FORWARD, BACKWARD = PASSES = ("forward", "forward+backward")


@dataclass(frozen=True)
class Case:
    """What one task simulates: M networks × K trials × N neurons at T times, float32.

    Attributes:
        weights: W, shape (M, N, N), (post, pre).
        h0: initial voltage, shape (M, K, N).
        cotangent: gradient of a loss with respect to the path, shape (T, M, K, N).
        dt: step.
        tau: time constant.
        noise_std: σ per √time.
        seed: seed of the noise.
    """

    weights: Tensor
    h0: Tensor
    cotangent: Tensor
    dt: float
    tau: float
    noise_std: float
    seed: int = 0

    @classmethod
    def draw(
        cls, networks: int, trials: int, N: int, T: int, noise_std: float, *, dt: float, tau: float, g: float, seed: int
    ) -> Case:
        """Draw W ~ N(0, g²/N), h0 ~ N(0, 1) and the cotangent ~ N(0, 1)."""
        generator = torch.Generator().manual_seed(seed)
        W = g / math.sqrt(N) * torch.randn(networks, N, N, generator=generator)
        h0 = torch.randn(networks, trials, N, generator=generator)
        cotangent = torch.randn(T, networks, trials, N, generator=generator)
        return cls(W, h0, cotangent, dt, tau, noise_std, seed)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape of the path, (T, M, K, N)."""
        T, M, K, N = self.cotangent.shape
        return T, M, K, N

    @property
    def times(self) -> Tensor:
        """Times of the path, float64 so that solvers stay on the grid."""
        return self.dt * torch.arange(self.shape[0], dtype=torch.float64)


class Method(ABC):
    """A simulator set up for one case; what it needs only once is done when it is made.

    Raises:
        Exception: it does not work here; the message says why.
    """

    passes: tuple[str, ...] = PASSES
    noise: bool = True

    def __init__(self, case: Case) -> None:
        self.case = case

    @abstractmethod
    def forward(self) -> Any:
        """Return the path in the method's own layout."""

    def backward(self) -> Any:
        """Simulate and return the gradients with respect to W and h0; without one in `passes` there is none."""
        raise TypeError(f"{type(self).__name__} has no gradient.")

    def path(self, result: Any) -> Tensor:
        """Return the result of `forward` as (T, M, K, N)."""
        return result.reshape(self.case.shape)

    def weights_gradient(self, result: Any) -> Tensor:
        """Return dL/dW, shape (M, N, N), out of the result of `backward`."""
        return result[0]


class TorchMethod(Method):
    """A simulator whose gradient is torch.autograd's; a single network drops its axis, as a user would."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.W = case.weights.clone().requires_grad_()
        self.h0 = case.h0.clone().requires_grad_()
        self.generator = torch.Generator().manual_seed(case.seed)
        self.cotangent: Tensor | None = None

    @abstractmethod
    def solve(self) -> Tensor:
        """Return the path, recorded by autograd in grad mode."""

    def forward(self) -> Tensor:
        """See `Method`."""
        with torch.no_grad():
            return self.solve()

    def backward(self) -> tuple[Tensor, ...]:
        """See `Method`."""
        path = self.solve()
        if self.cotangent is None:  # the first call, which is not timed
            like = torch.empty_like(path, requires_grad=False)
            self.cotangent = like.copy_(self.case.cotangent.reshape(path.shape))
        return torch.autograd.grad(path, (self.W, self.h0), self.cotangent)


class Neurosde(TorchMethod):
    """neurosde's public `sdeint`; the RateSDE is built outside the timed part, as users of torchsde do."""

    engine = "auto"

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        W = self.W[0] if len(self.W) == 1 else self.W.unsqueeze(1)
        self.state = self.h0[0] if len(self.W) == 1 else self.h0
        self.sde = RateSDE(W, tau=case.tau, noise_std=case.noise_std)

    def solve(self) -> Tensor:
        """See `TorchMethod`."""
        options: dict[str, Any] = {"engine": self.engine, "generator": self.generator}
        return sdeint(self.sde, self.state, self.case.times, dt=self.case.dt, **options)


class NeurosdeTorch(Neurosde):
    """neurosde on its torch engine."""

    engine = "torch"


class NeurosdeJulia(Neurosde):
    """neurosde on its Julia engine."""

    engine = "julia"


class TorchLoop(TorchMethod):
    """The loop that one would write by hand, in its best form.

    One tanh and one fused matrix product (a matrix–vector product for a single trial) per step, written into the path
    where no gradient is asked for, else stacked. (M, K, N) is the quickest layout: (M, N, K) takes twice as long.
    """

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.decay, self.gain = 1 - case.dt / case.tau, case.dt / case.tau
        self.scale = math.sqrt(case.dt) * case.noise_std
        _, M, K, N = case.shape
        self.single = M * K == 1
        self.state = (N,) if self.single else (M, K, N)

    def forward(self) -> Tensor:
        """See `Method`."""
        path = torch.empty(self.case.shape[0], *self.state)
        h0, W = self.h0.detach().reshape(self.state), self.W.detach()
        W = W[0] if self.single else W.mT.contiguous()
        x = torch.empty(self.state)
        steps = path.unbind()
        steps[0].copy_(h0)
        for h, following in zip(steps[:-1], steps[1:], strict=True):
            torch.tanh(h, out=x)
            rest, decay = h, self.decay
            if self.scale:
                rest, decay = following.normal_(0, self.scale, generator=self.generator).add_(h, alpha=decay), 1.0
            if self.single:
                torch.addmv(rest, W, x, beta=decay, alpha=self.gain, out=following)
            else:
                torch.baddbmm(rest, x, W, beta=decay, alpha=self.gain, out=following)
        return path

    def solve(self) -> Tensor:
        """See `TorchMethod`."""
        h, W = self.h0.reshape(self.state), self.W[0] if self.single else self.W.mT
        path = [h]
        for _ in range(self.case.shape[0] - 1):
            h = self.step(h, W, torch.randn(self.state, generator=self.generator) if self.scale else None)
            path.append(h)
        return torch.stack(path)

    def step(self, h: Tensor, W: Tensor, noise: Tensor | None) -> Tensor:
        """One step of Euler–Maruyama."""
        rest, decay = h, self.decay
        if noise is not None:
            rest, decay = torch.add(decay * h, noise, alpha=self.scale), 1.0
        if self.single:
            return torch.addmv(rest, W, h.tanh(), beta=decay, alpha=self.gain)
        return torch.baddbmm(rest, h.tanh(), W, beta=decay, alpha=self.gain)


class _Drift(nn.Module):
    """The network as users of torchsde and torchdiffeq write it, with a fused matrix product; y is (…, N)."""

    noise_type = "diagonal"
    sde_type = "ito"

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.W = nn.Parameter(case.weights.clone())
        self.rate, self.noise_std, self.shape = 1 / case.tau, case.noise_std, case.shape[1:]

    def f(self, t: Any, y: Tensor) -> Tensor:
        h = y.view(self.shape)
        return torch.baddbmm(h, h.tanh(), self.W.mT, beta=-self.rate, alpha=self.rate).view(y.shape)

    def g(self, t: Any, y: Tensor) -> Tensor:
        return torch.full_like(y, self.noise_std)

    def forward(self, t: Any, y: Tensor) -> Tensor:
        return self.f(t, y)


class Torchsde(TorchMethod):
    """torchsde.sdeint, Euler, with its default Brownian motion; states (M K, N)."""

    solver = "sdeint"

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        import torchsde

        self.sde = _Drift(case)
        self.W = self.sde.W
        self.integrate = getattr(torchsde, self.solver)

    def solve(self) -> Tensor:
        """See `TorchMethod`."""
        return self.integrate(self.sde, self.h0.flatten(0, 1), self.case.times, method="euler", dt=self.case.dt)


class TorchsdeAdjoint(Torchsde):
    """torchsde.sdeint_adjoint; without gradient it is `sdeint`."""

    solver = "sdeint_adjoint"
    passes = (BACKWARD,)


class Torchdiffeq(TorchMethod):
    """torchdiffeq.odeint, Euler; states (M, K, N)."""

    solver = "odeint"
    noise = False

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        import torchdiffeq

        self.ode = _Drift(case)
        self.W = self.ode.W
        self.integrate = getattr(torchdiffeq, self.solver)

    def solve(self) -> Tensor:
        """See `TorchMethod`."""
        return self.integrate(self.ode, self.h0, self.case.times, method="euler")


class TorchdiffeqAdjoint(Torchdiffeq):
    """torchdiffeq.odeint_adjoint; without gradient it is `odeint`."""

    solver = "odeint_adjoint"
    passes = (BACKWARD,)
