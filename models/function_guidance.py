"""Guidance by a likelihood of one's own: any function of W that can be differentiated, through a simulator, say.

References:
    Diffusion posterior sampling for general noisy inverse problems (Chung, Kim, Mccann, Klasky, Ye, 2023),
    https://arxiv.org/abs/2209.14687
    Pseudoinverse-guided diffusion models for inverse problems (Song, Vahdat, Mardani, Kautz, 2023), of which this is
    the extension to likelihoods that are not Gaussian, https://openreview.net/forum?id=9_gsMA8MRKQ
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from neurosde.models.dps import LikelihoodGuidance, LinearMap, conjugate_gradients
from neurosde.models.edm import Denoiser, Evidence
from neurosde.validation import check_count, check_positive

HALVINGS = 12  # of a step of Newton's method


class FunctionGuidance(LikelihoodGuidance):
    """ΠGDM for a likelihood of one's own: any function of W that is differentiable twice, by a simulator, say.

    Given x, W ~ N(D, r²) as there, and D + r²u is the most probable W given the data, too: u = ∇ log p(D + r²u), by
    Newton's method with halved steps, whose linear systems I + r²H, with H the negative second derivative, are solved
    by conjugate gradients. For a likelihood that is Gaussian in W this is `PseudoinverseGuidance`.

    Args:
        denoise: the prior's denoiser, in units of `scale`.
        log_prob: log p(data | W) of weights (draw, post, pre), float64, one number each, shape (draw,); that of a draw
            must not depend on the others.
        N: neurons.
        scale: s₀, what the unit of the denoiser stands for.
        prior_variance: v, mean square of an entry, in units of the denoiser.
        newton: steps of Newton's method at most.
        tolerance: of each linear system's residual, over the right-hand side.
        iterations: of each linear system at most, each of them one product with H.

    Raises:
        ValueError: numbers out of range; or, when called, what log_prob returns is not one finite number for each.
    """

    def __init__(
        self,
        denoise: Denoiser,
        log_prob: Callable[[Tensor], Tensor],
        N: int,
        scale: float = 1.0,
        *,
        prior_variance: float = 1.0,
        newton: int = 8,
        tolerance: float = 1e-3,
        iterations: int = 20,
    ) -> None:
        super().__init__(denoise, Evidence.none(check_count(N, "N")))
        self.log_prob, self.scale = log_prob, check_positive(scale, "scale")
        self.prior_variance = check_positive(prior_variance, "prior_variance")
        self.newton = check_count(newton, "newton")
        self.tolerance = check_positive(tolerance, "tolerance")
        self.iterations = check_count(iterations, "iterations")
        self._mean = torch.zeros(N, N)
        self._expansion: tuple[Tensor, Tensor, LinearMap] | None = None  # at the mean

    def slope(self, mean: Tensor) -> Tensor:
        """∇ log p at the denoised mean."""
        self._mean, self._expansion = mean, self._expanded(mean)
        return self._expansion[1]

    def force(self, slope: Tensor, s2: Tensor, covariance: LinearMap) -> Tensor:
        """Find u."""
        r2 = s2 * self.prior_variance / (s2 + self.prior_variance)
        assert self._expansion is not None
        reached, slope, curvature = self._expansion
        u, self._expansion = torch.zeros_like(slope), None
        for iteration in range(self.newton):
            if iteration:
                _, slope, curvature = self._expanded(self._mean + r2 * u)
            missing = slope - u
            left = missing.square().sum((-1, -2)) / slope.square().sum((-1, -2)).clamp(min=1e-300)
            if bool((left < self.tolerance**2).all()):
                break

            def operator(w: Tensor, curvature: LinearMap = curvature) -> Tensor:
                return w + r2 * curvature(w)

            step = conjugate_gradients(operator, missing, self.tolerance, self.iterations)[0]
            better = torch.zeros_like(reached, dtype=torch.bool)
            for _ in range(HALVINGS):
                value = self._value(self._mean + r2 * (u + step))
                value = value - 0.5 * (r2 * (u + step).square()).sum((-1, -2))
                better = value >= reached
                if bool(better.all()):
                    break
                step = torch.where(better[..., None, None], step, step / 2)
            u = torch.where(better[..., None, None], u + step, u)
            reached = torch.where(better, value, reached)
        return u

    def _value(self, J: Tensor) -> Tensor:
        """Log p of each matrix, shape (...); −∞ where it is not finite."""
        N = J.shape[-1]
        with torch.no_grad():
            found = self.log_prob(self.scale * J.reshape(-1, N, N))
        return torch.where(found.isfinite(), found, -math.inf).reshape(J.shape[:-2])

    def _expanded(self, J: Tensor) -> tuple[Tensor, Tensor, LinearMap]:
        """Log p, its gradient, and products with its negative second derivative."""
        N = J.shape[-1]
        point = J.detach().reshape(-1, N, N).requires_grad_(True)
        with torch.enable_grad():
            value = self.log_prob(self.scale * point)
            _check_log_prob(value, len(point))
            (slope,) = torch.autograd.grad(value.sum(), point, create_graph=True)

        def curvature(u: Tensor) -> Tensor:
            if not slope.requires_grad:  # log p is linear
                return torch.zeros_like(u)
            (found,) = torch.autograd.grad(slope, point, u.reshape(point.shape), retain_graph=True, allow_unused=True)
            return torch.zeros_like(u) if found is None else -found.reshape(u.shape)

        return value.detach().reshape(J.shape[:-2]), slope.detach().reshape(J.shape), curvature


class FunctionGradient(FunctionGuidance):
    """DPS for a likelihood of one's own, differentiable once: u is its gradient at the denoised mean.

    As if no other W were possible: biased, and quick to diverge where the data tell much (`FunctionGuidance` is better
    and takes many evaluations more).

    Args:
        denoise: the prior's denoiser, in units of `scale`.
        log_prob: see `FunctionGuidance`.
        N: neurons.
        scale: s₀, what the unit of the denoiser stands for.
    """

    def __init__(self, denoise: Denoiser, log_prob: Callable[[Tensor], Tensor], N: int, scale: float = 1.0) -> None:
        super().__init__(denoise, log_prob, N, scale)

    def slope(self, mean: Tensor) -> Tensor:
        """∇ log p at the denoised mean."""
        N = mean.shape[-1]
        point = mean.detach().reshape(-1, N, N).requires_grad_(True)
        with torch.enable_grad():
            value = self.log_prob(self.scale * point)
            _check_log_prob(value, len(point))
            (slope,) = torch.autograd.grad(value.sum(), point)
        return slope.reshape(mean.shape)

    def force(self, slope: Tensor, s2: Tensor, covariance: LinearMap) -> Tensor:
        """Return the slope."""
        return slope


def _check_log_prob(value: Tensor, count: int) -> None:
    if value.shape != (count,) or not bool(value.isfinite().all()):
        raise ValueError(
            f"log_prob must return a finite number for each of the {count} matrices it is given, shape ({count},); got "
            f"shape {tuple(value.shape)}, of which {int((~value.isfinite()).sum())} are not finite."
        )
