"""Posteriors out of a prior's denoiser and the likelihood, with no network that was conditioned on recordings.

Of a recording the likelihood is exp(tr(BWᵀ) − ½ tr(WΛWᵀ)), all in the units of the diffusion. What a sampler needs is
E[W | W_s = x, recording]. The prior's denoiser gives D = E[W | x] and, by Tweedie's formula, the covariance
V = s² ∂D/∂x. Each guidance adds V u to D, with another u:

    DiffusionPosteriorSampling   u = B − DΛ: the likelihood at D, as if nothing but D were possible
    PseudoinverseGuidance        u = (B − DΛ)(I + r²Λ)⁻¹: W ~ N(D, r²) given x, r² = s²v/(s² + v) as under N(0, v)
    MomentMatching               u + ΛVu = B − DΛ: W ~ N(D, V) given x, the linear system solved to a tolerance

The first is biased whatever the prior, the second exact for a Gaussian prior of variance v, the third for any Gaussian;
of other priors all are approximations. (`neurosde.models.function_guidance` is the second for any likelihood;
`neurosde.models.split_gibbs` is exact for any prior.)

References:
    Diffusion posterior sampling for general noisy inverse problems (Chung, Kim, Mccann, Klasky, Ye, 2023),
    https://arxiv.org/abs/2209.14687
    Pseudoinverse-guided diffusion models for inverse problems (Song, Vahdat, Mardani, Kautz, 2023),
    https://openreview.net/forum?id=9_gsMA8MRKQ
    Learning diffusion priors from observations by expectation maximization (Rozet, Andry, Lanusse, Louppe, 2024),
    moment matching, https://arxiv.org/abs/2405.13712
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from neurosde.models.edm import Denoiser, Evidence
from neurosde.validation import check_count, check_positive

LARGEST_STEP = 10.0  # of a guided mean, over |x| and |W|, beyond which no posterior lies

LinearMap = Callable[[Tensor], Tensor]


class LikelihoodGuidance(ABC):
    """A prior's denoiser, guided by the likelihood of a recording; in the interface of `Denoiser`.

    Args:
        denoise: the prior's denoiser, differentiable.
        evidence: what the recording says, in the units of the denoiser.
    """

    def __init__(self, denoise: Denoiser, evidence: Evidence) -> None:
        self.denoise, self.evidence = denoise, evidence
        self.precision = evidence.eigenvalues.unsqueeze(-2)

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Return the guided mean, shape (..., post, pre), see `Denoiser`.

        Raises:
            FloatingPointError: the guidance diverges for some matrix.
        """
        found, _, diverges = self.guided(x, sigma)
        if bool(diverges.any()):
            raise FloatingPointError(
                f"{type(self).__name__} diverges at noise level {float(torch.as_tensor(sigma).max()):.3g} for "
                f"{int(diverges.sum())} of {diverges.numel()} matrices: the recording tells more than its "
                "approximation bears. Use SplitGibbs, or GuidedDiffusion, which lets go of these alone."
            )
        return found

    def guided(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the guided mean, the prior's, both (..., post, pre), and where the guidance diverges, (...)."""
        s2 = torch.as_tensor(sigma, dtype=torch.float64, device=x.device)[..., None, None].square()
        with torch.enable_grad():
            x = x.double().detach().requires_grad_(True)
            mean = self.denoise(x, sigma).double()

            def covariance(u: Tensor) -> Tensor:
                """V u along the directions. ∂D/∂x is symmetric, so that its transpose, which is at hand, serves."""
                (found,) = torch.autograd.grad(mean, x, self._back(u), retain_graph=True)
                return self._along(s2 * found)

            slope = self.slope(mean.detach())
            moved = covariance(self.force(slope, s2, covariance))
        mean = mean.detach()
        found = mean + self._back(moved)
        largest = LARGEST_STEP * (x.detach().flatten(-2).norm(dim=-1) + x.shape[-1])
        bounded = found.flatten(-2).norm(dim=-1) <= largest  # which NaN is not
        return found, mean, mean.flatten(-2).isfinite().all(-1) & ~bounded

    def slope(self, mean: Tensor) -> Tensor:
        """Gradient of the log-likelihood at the denoised mean, along the directions: B − DΛ."""
        return self.evidence.cross - self._along(mean) * self.precision

    @abstractmethod
    def force(self, slope: Tensor, s2: Tensor, covariance: LinearMap) -> Tensor:
        """Return u along the directions.

        Args:
            slope: B − DΛ, shape (..., post, direction).
            s2: s², shape (..., 1, 1).
            covariance: the map u ↦ V u of matrices along the directions.
        """

    def _along(self, x: Tensor) -> Tensor:
        return x if self.evidence.vectors is None else x @ self.evidence.vectors

    def _back(self, x: Tensor) -> Tensor:
        return x if self.evidence.vectors is None else x @ self.evidence.vectors.mT


class DiffusionPosteriorSampling(LikelihoodGuidance):
    """DPS with the gradient of the log-likelihood itself: u = scale (B − DΛ). Biased; see the module.

    Args:
        denoise: the prior's denoiser.
        evidence: what the recording says.
        scale: weight of the gradient.

    Raises:
        ValueError: a scale that is not positive.
    """

    def __init__(self, denoise: Denoiser, evidence: Evidence, scale: float = 1.0) -> None:
        super().__init__(denoise, evidence)
        self.scale = check_positive(scale, "scale")

    def force(self, slope: Tensor, s2: Tensor, covariance: LinearMap) -> Tensor:
        """Return the slope, scaled."""
        return self.scale * slope


class PseudoinverseGuidance(LikelihoodGuidance):
    """ΠGDM: W given x has the variance r² = s²v/(s² + v) in all directions.

    Args:
        denoise: the prior's denoiser.
        evidence: what the recording says.
        prior_variance: v, mean square of an entry.

    Raises:
        ValueError: a variance that is not positive.
    """

    def __init__(self, denoise: Denoiser, evidence: Evidence, prior_variance: float = 1.0) -> None:
        super().__init__(denoise, evidence)
        self.prior_variance = check_positive(prior_variance, "prior_variance")

    def force(self, slope: Tensor, s2: Tensor, covariance: LinearMap) -> Tensor:
        """Return the slope over 1 + r²λ."""
        r2 = s2 * self.prior_variance / (s2 + self.prior_variance)
        return slope / (1 + r2 * self.precision)


class MomentMatching(LikelihoodGuidance):
    """MMPS: W given x has the covariance of the prior's denoiser; the linear system by conjugate gradients.

    With w = Λ^(−½)u it is (I + Λ^½ V Λ^½) w = Λ^(−½)(B − DΛ), symmetric and positive definite; directions that the
    recording says nothing of take no part.

    Args:
        denoise: the prior's denoiser.
        evidence: what the recording says.
        tolerance: of the residual, over the right-hand side.
        iterations: at most, each of them one product of the denoiser's derivative.

    Attributes:
        unsolved: largest relative residual that was left by any evaluation so far.

    Raises:
        ValueError: numbers out of range.
    """

    def __init__(self, denoise: Denoiser, evidence: Evidence, tolerance: float = 1e-3, iterations: int = 100) -> None:
        super().__init__(denoise, evidence)
        self.tolerance = check_positive(tolerance, "tolerance")
        self.iterations = check_count(iterations, "iterations")
        self.unsolved = 0.0

    def force(self, slope: Tensor, s2: Tensor, covariance: LinearMap) -> Tensor:
        """Solve for u."""
        root = self.precision.sqrt()
        right = torch.where(root > 0, slope / root, 0.0)

        def operator(w: Tensor) -> Tensor:
            return w + root * covariance(root * w)

        w, left = conjugate_gradients(operator, right, self.tolerance, self.iterations)
        self.unsolved = max(self.unsolved, float(left.max().sqrt()))
        return root * w


def conjugate_gradients(operator: LinearMap, right: Tensor, tolerance: float, iterations: int) -> tuple[Tensor, Tensor]:
    """Solve a symmetric positive definite system for each of a batch of matrices.

    A matrix is left where it is from the first direction on that is not of positive curvature.

    Returns:
        The solutions, and the squared relative residuals (..., 1, 1).
    """

    def inner(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum((-1, -2), keepdim=True)

    w = torch.zeros_like(right)
    residual, direction = right.clone(), right.clone()
    size = first = inner(right, right)
    going = size > 0
    for iteration in range(iterations):
        going = going & (size > tolerance**2 * first)
        if not bool(going.any()):
            break
        product = operator(direction)
        curvature = inner(direction, product)
        if iteration == 0:  # steepest ascent is what is left where nothing can be solved
            w = torch.where(going & (curvature <= 0), right, w)
        going = going & (curvature > 0)
        step = torch.where(going, size / torch.where(going, curvature, 1.0), 0.0)
        w, residual = w + step * direction, residual - step * product
        before, size = size, torch.where(going, inner(residual, residual), size)
        direction = torch.where(going, residual + size / torch.where(before > 0, before, 1.0) * direction, direction)
    return w, size / first.clamp(min=1e-300)
