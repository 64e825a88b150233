"""Three tasks of the benchmark of simulation-based inference, and exact draws of their posteriors.

Priors and simulators are those of sbibm. Observations are not its ten stored ones: θ is drawn from the prior and x from
the simulator with a seed of ours. References are drawn as follows.

Two moons (2 parameters, uniform in [−1, 1]²). With u = (−|θ₁ + θ₂|, −θ₁ + θ₂)/√2, x = u + p, where p is a crescent:
p = (r cos a + ¼, r sin a), a uniform in (−π/2, π/2), r ~ N(0.1, 0.01²). Hence the posterior is that of u = x − p for p
with the crescent's own density, and either sign of θ₁ + θ₂, where u₁ ≤ 0 and θ lies in the square: p is simulated, and
draws that are impossible are rejected. θ → (±u₁, u₂) is a rotation, so that no Jacobian is needed.

Gaussian linear (10 parameters): θ ~ N(0, 0.1 I), x | θ ~ N(θ, 0.1 I), hence θ | x ~ N(x/2, 0.05 I).

SLCP (5 parameters, uniform in [−3, 3]⁵): four points in the plane, each N(m, S) with m = (θ₁, θ₂) and
S = (s₁², ρ s₁ s₂; ρ s₁ s₂, s₂²), s₁ = θ₃², s₂ = θ₄², ρ = tanh θ₅. With the points' mean x̄ and scatter A, the likelihood
is |S|⁻² exp(−½ tr(S⁻¹A) − 2 (x̄ − m)ᵀS⁻¹(x̄ − m)). See `neurosde.evaluation.sbibm_slcp` for its posterior.

References:
    Benchmarking simulation-based inference (Lueckmann, Boelts, Greenberg, Gonçalves, Macke, 2021), appendix T,
    https://arxiv.org/abs/2101.04653
    Sequential neural likelihood (Papamakarios, Sterratt, Murray, 2019), the model of SLCP,
    https://arxiv.org/abs/1805.07226
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from neurosde.brownian import as_generator
from neurosde.evaluation.sbibm_slcp import POINTS, log_determinant, point_covariance, slcp_posterior
from neurosde.validation import as_float_tensor, check_count

Source = int | torch.Generator | None

ROOT_HALF = math.sqrt(0.5)
RADIUS, RADIUS_STD, OFFSET = 0.1, 0.01, 0.25  # of the crescent
VARIANCE = 0.1  # of the Gaussian task's prior, and of its noise


class Task(Protocol):
    """A task: prior, simulator, likelihood and exact posterior. All in float64."""

    @property
    def name(self) -> str:
        """Its name in sbibm."""
        ...

    @property
    def dim(self) -> int:
        """Entries of θ."""
        ...

    @property
    def features(self) -> int:
        """Entries of x."""
        ...

    def prior(self, draws: int, generator: Source = None) -> Tensor:
        """Draw θ, shape (draws, dim)."""
        ...

    def allowed(self, theta: Tensor) -> Tensor:
        """Say which θ, shape (draw, dim), the prior allows, shape (draw,)."""
        ...

    def simulate(self, theta: Tensor, generator: Source = None) -> Tensor:
        """Simulate x for each θ, shape (draw, features)."""
        ...

    def log_likelihood(self, theta: Tensor, x: Tensor) -> Tensor:
        """Return log p(x | θ) of one x, shape (features,), for each θ, shape (draw, dim); shape (draw,)."""
        ...

    def posterior(self, x: Tensor, draws: int, generator: Source = None) -> Tensor:
        """Draw from the posterior for one x, shape (features,); shape (draws, dim)."""
        ...


@dataclass(frozen=True)
class TwoMoons:
    """Two crescents, each thin, in the plane."""

    name: str = "two_moons"
    dim: int = 2
    features: int = 2

    def prior(self, draws: int, generator: Source = None) -> Tensor:
        """Uniform in [−1, 1]²."""
        return 2 * _uniform((draws, 2), generator) - 1

    def allowed(self, theta: Tensor) -> Tensor:
        """Say which lie in the square."""
        return (theta.abs() <= 1).all(-1)

    def simulate(self, theta: Tensor, generator: Source = None) -> Tensor:
        """Return u + p."""
        _check(theta, self.dim)
        return _moon_of(theta) + self._crescent(len(theta), generator)

    def log_likelihood(self, theta: Tensor, x: Tensor) -> Tensor:
        """Density of p = x − u in the plane: (uniform angle) × (normal radius) / |r|."""
        _check(theta, self.dim)
        p = _one(x, self.features) - _moon_of(theta)
        first, second = p[:, 0] - OFFSET, p[:, 1]
        radius = torch.hypot(first, second)

        def normal(r: Tensor) -> Tensor:
            return (-0.5 * ((r - RADIUS) / RADIUS_STD).square()).exp() / (RADIUS_STD * math.sqrt(2 * math.pi))

        # A negative radius, ten standard deviations off, puts the point on the other half of the plane.
        density = torch.where(first > 0, normal(radius), normal(-radius)) / (math.pi * radius)
        return density.log()

    def posterior(self, x: Tensor, draws: int, generator: Source = None) -> Tensor:
        """Take crescents from x, and either sign; reject what is not possible."""
        x, source = _one(x, self.features), as_generator(generator)
        kept: list[Tensor] = []
        for _ in range(1000):
            u = x - self._crescent(draws, source)
            sign = torch.where(_uniform((draws,), source) < 0.5, -1.0, 1.0)
            total, difference = sign * u[:, 0], u[:, 1]
            theta = ROOT_HALF * torch.stack([total - difference, total + difference], -1)
            kept.append(theta[(u[:, 0] <= 0) & self.allowed(theta)])
            if sum(map(len, kept)) >= draws:
                return torch.cat(kept)[:draws]
        raise ValueError(f"x must be one that two_moons can make; got {x.tolist()}, of which hardly a crescent can be.")

    def _crescent(self, draws: int, generator: Source) -> Tensor:
        source = as_generator(generator)
        angle = math.pi * (_uniform((draws,), source) - 0.5)
        radius = RADIUS + RADIUS_STD * _normal((draws,), source)
        return torch.stack([radius * angle.cos() + OFFSET, radius * angle.sin()], -1)


@dataclass(frozen=True)
class GaussianLinear:
    """A Gaussian mean, of ten entries."""

    name: str = "gaussian_linear"
    dim: int = 10
    features: int = 10

    def prior(self, draws: int, generator: Source = None) -> Tensor:
        """N(0, 0.1 I)."""
        return math.sqrt(VARIANCE) * _normal((draws, self.dim), generator)

    def allowed(self, theta: Tensor) -> Tensor:
        """All are."""
        return torch.ones(len(theta), dtype=torch.bool)

    def simulate(self, theta: Tensor, generator: Source = None) -> Tensor:
        """N(θ, 0.1 I)."""
        _check(theta, self.dim)
        return theta + math.sqrt(VARIANCE) * _normal(theta.shape, generator)

    def log_likelihood(self, theta: Tensor, x: Tensor) -> Tensor:
        """Return the normal density."""
        _check(theta, self.dim)
        off = (_one(x, self.features) - theta).square().sum(-1)
        return -0.5 * (off / VARIANCE + self.dim * math.log(2 * math.pi * VARIANCE))

    def posterior(self, x: Tensor, draws: int, generator: Source = None) -> Tensor:
        """N(x/2, 0.05 I)."""
        return _one(x, self.features) / 2 + math.sqrt(VARIANCE / 2) * _normal((draws, self.dim), generator)


@dataclass(frozen=True)
class SLCP:
    """A simple likelihood, four points of a normal law, with a complex posterior: of four modes."""

    name: str = "slcp"
    dim: int = 5
    features: int = 2 * POINTS

    def prior(self, draws: int, generator: Source = None) -> Tensor:
        """Uniform in [−3, 3]⁵."""
        return 6 * _uniform((draws, self.dim), generator) - 3

    def allowed(self, theta: Tensor) -> Tensor:
        """Say which lie in the cube."""
        return (theta.abs() <= 3).all(-1)

    def simulate(self, theta: Tensor, generator: Source = None) -> Tensor:
        """Four points, one after the other."""
        _check(theta, self.dim)
        factor = torch.linalg.cholesky(point_covariance(theta))
        noise = _normal((len(theta), POINTS, 2), generator)
        return (theta[:, None, :2] + noise @ factor.mT).flatten(1)

    def log_likelihood(self, theta: Tensor, x: Tensor) -> Tensor:
        """Sum of the four points' normal log densities."""
        _check(theta, self.dim)
        points = _one(x, self.features).view(POINTS, 2)
        covariance = point_covariance(theta)
        off = points - theta[:, None, :2]  # (draw, point, entry)
        quadratic = (torch.linalg.solve(covariance, off.mT).mT * off).sum((-1, -2))
        return -0.5 * quadratic - POINTS * (math.log(2 * math.pi) + 0.5 * log_determinant(covariance))

    def posterior(self, x: Tensor, draws: int, generator: Source = None) -> Tensor:
        """Draw from a grid and reject what is too many (`neurosde.evaluation.sbibm_slcp`).

        Raises:
            FloatingPointError: hardly a proposal is accepted.
        """
        return slcp_posterior(_one(x, self.features), self.allowed, draws, as_generator(generator))


TASKS: dict[str, Task] = {task.name: task for task in (TwoMoons(), GaussianLinear(), SLCP())}


def observation(task: Task, number: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Draw θ and x from seeds of ours.

    Args:
        task: the task.
        number: of the observation, from 0 on.
        seed: root seed.

    Returns:
        θ, shape (dim,), and x, shape (features,).
    """
    check_count(number, "number", 0)
    check_count(seed, "seed", 0)
    source = torch.Generator().manual_seed(1_000_003 * seed + number)
    theta = task.prior(1, source)
    return theta[0], task.simulate(theta, source)[0]


def _moon_of(theta: Tensor) -> Tensor:
    first, second = theta.unbind(-1)
    return ROOT_HALF * torch.stack([-(first + second).abs(), second - first], -1)


def _uniform(shape: tuple[int, ...], generator: Source) -> Tensor:
    return torch.rand(shape, generator=as_generator(generator), dtype=torch.float64)


def _normal(shape: tuple[int, ...], generator: Source) -> Tensor:
    return torch.randn(shape, generator=as_generator(generator), dtype=torch.float64)


def _check(theta: Tensor, dim: int) -> None:
    if theta.ndim != 2 or theta.shape[1] != dim:
        raise ValueError(f"theta must have shape (draw, {dim}); got {tuple(theta.shape)}.")


def _one(x: Tensor, features: int) -> Tensor:
    x = as_float_tensor(x, "x").double()
    if x.shape != (features,):
        raise ValueError(f"x must be one observation of shape ({features},); got {tuple(x.shape)}.")
    return x
