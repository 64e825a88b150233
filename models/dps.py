"""Posteriors out of a prior's denoiser and the likelihood, with no network that was conditioned on recordings.

Of a recording the likelihood is exp(tr(BWᵀ) − ½ tr(WΛWᵀ)), all in the units of the diffusion. What a sampler needs is
E[W | W_s = x, recording]. The prior's denoiser gives D = E[W | x] and, by Tweedie's formula, the covariance
V = s² ∂D/∂x. Each guidance adds V u to D, with another u:

    DiffusionPosteriorSampling   u = B − DΛ: the likelihood at D, as if nothing but D were possible
    PseudoinverseGuidance        u = (B − DΛ)(I + r²Λ)⁻¹: W ~ N(D, r²) given x, r² = s²v/(s² + v) as under N(0, v)
    MomentMatching               u + ΛVu = B − DΛ: W ~ N(D, V) given x, the linear system solved to a tolerance

The first is biased whatever the prior, the second exact for a Gaussian prior of variance v, the third for any Gaussian;
of other priors all are approximations. (`neurosde.models.function_guidance` is
the second for any likelihood.) `SplitGibbs` is exact for any: with z beside W, whose joint law

    p(W) N(z; W, ρ²) exp(tr(B̃zᵀ) − ½ tr(zΛ̃zᵀ)),    Λ̃ = Λ(I − ρ²Λ)⁻¹,    B̃ = B(I − ρ²Λ)⁻¹,

has the posterior as the law of W for every ρ² < 1/λ_max(Λ), it draws in turn

    z | W = W + ρ²(B − WΛ) + ρ ε (I − ρ²Λ)^½,    W | z: the prior's diffusion, given an observation of noise ρ.

A step moves W by ρ, which is small where a recording tells much about some direction. So ρ falls from sweep to sweep:
along directions in which ρ² λ > 0.8 sweeps use the likelihood of z itself, which leaves W a spread of ρ there until ρ
has fallen; the last sweeps are exact.

References:
    Diffusion posterior sampling for general noisy inverse problems (Chung, Kim, Mccann, Klasky, Ye, 2023),
    https://arxiv.org/abs/2209.14687
    Pseudoinverse-guided diffusion models for inverse problems (Song, Vahdat, Mardani, Kautz, 2023),
    https://openreview.net/forum?id=9_gsMA8MRKQ
    Learning diffusion priors from observations by expectation maximization (Rozet, Andry, Lanusse, Louppe, 2024),
    moment matching, https://arxiv.org/abs/2405.13712
    Split-and-augmented Gibbs sampler (Vono, Dobigeon, Chainais, 2019), https://arxiv.org/abs/1804.05809
    Principled probabilistic imaging using diffusion models as plug-and-play priors (Wu, Sun, Chen, Zhang, Yue, Bouman,
    2024), https://arxiv.org/abs/2405.18782
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from neurosde.brownian import as_generator
from neurosde.models.edm import Denoiser, Evidence, power_levels
from neurosde.models.samplers import sample
from neurosde.validation import check_count, check_positive

SWEEPS = 12
EXACT_SHARE = 0.25  # of the sweeps, at the end, whose law is exact
STEPS = 16  # noise levels of a sweep: of fewer, whether a sparse weight exists is decided wrongly
DECONVOLVED = 0.8  # largest ρ²λ of a likelihood that is deconvolved
LARGEST_STEP = 10.0  # of a guided mean, over |x| and |W|, beyond which no posterior lies
HIGHEST, LOWEST = 80.0, 2e-3  # noise levels of a sweep, in units of ρ

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
            FloatingPointError: the guidance diverges.
        """
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
        found = mean.detach() + self._back(moved)
        if bool((found.flatten(-2).norm(dim=-1) > LARGEST_STEP * (x.flatten(-2).norm(dim=-1) + x.shape[-1])).any()):
            raise FloatingPointError(
                f"{type(self).__name__} diverges at noise level {float(s2.max()) ** 0.5:.3g}: the recording tells more "
                "than its approximation bears. Use MomentMatching or SplitGibbs, or a smaller scale."
            )
        return found

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


@dataclass(frozen=True)
class Refinement:
    """What a refiner made of draws.

    Attributes:
        draws: refined draws, shape (draw, post, pre), in the units of the denoiser.
        rho: noise ρ of each sweep, shape (sweep,).
        moved: root mean square change of an entry in each sweep, over its spread among draws, shape (sweep,).
        log_likelihood: mean over draws of tr(BWᵀ) − ½ tr(WΛWᵀ) after each sweep, shape (sweep,).
        r_hat: of log-likelihood and norm over the exact sweeps, if there are such, each draw a chain: near 1 where
            every chain went everywhere. Chains that stay where they are have a large one, which says that their law is
            not proved, not that it is wrong.
        evaluations: of the denoiser, for each draw; products with its derivative are not counted.
    """

    draws: Float[Tensor, "draw post pre"]
    rho: Float[Tensor, " sweep"]
    moved: Float[Tensor, " sweep"]
    log_likelihood: Float[Tensor, " sweep"]
    r_hat: dict[str, float]
    evaluations: int


@dataclass(frozen=True)
class SplitGibbs:
    """Split Gibbs sampling with the deconvolved likelihood.

    Args:
        denoise: the prior's denoiser.
        sweeps: in all; the last quarter, and at least 4, are exact. Draws that are nearly right need few; sparse
            weights from anywhere some hundred, where much is recorded.
        steps: noise levels of each sweep.
        rho: ρ of the first sweep, in the units of the denoiser, 1 being the spread of a weight: how far draws may go
            from where they begin.

    Raises:
        ValueError: numbers out of range.
    """

    denoise: Denoiser
    sweeps: int = SWEEPS
    steps: int = STEPS
    rho: float = 1.0

    def __post_init__(self) -> None:
        check_count(self.sweeps, "sweeps", 8)
        check_count(self.steps, "steps", 2)
        check_positive(self.rho, "rho")

    def refine(
        self,
        draws: Float[Tensor, "draw post pre"],
        evidence: Evidence,
        generator: int | torch.Generator | None = None,
        progress: bool = False,
    ) -> Refinement:
        """Move draws to the posterior.

        Args:
            draws: where to begin: draws of another posterior, or of the prior.
            evidence: what one recording says, to all draws or (draw, …) to each, in the units of the denoiser.
            generator: seed or generator, on the device of the draws.
            progress: show a progress bar, on a terminal.

        Raises:
            ValueError: draws that are not (draw, post, pre) of as many neurons as were recorded, or not finite.
            FloatingPointError: the denoiser returned NaN or infinite values.
        """
        check_draws(draws, evidence)
        source = as_generator(generator, draws.device)
        W, exact = draws.double(), max(4, round(EXACT_SHARE * self.sweeps))
        rhos = self.schedule(float(evidence.eigenvalues.max()), exact)
        moved, likelihoods, traces = [], [], []
        for sweep, rho in enumerate(tqdm(rhos, unit="sweep", disable=None if progress else True)):
            z = observed(W, evidence, rho, source)
            last, W = W, given_noisy(self.denoise, z, rho, self.steps, source)
            each = log_likelihood(W, evidence)
            spread = W.var(0).mean().sqrt().clamp(min=1e-300)
            moved.append((W - last).square().mean().sqrt() / spread)
            likelihoods.append(each.mean())
            if sweep >= len(rhos) - exact:
                traces.append(torch.stack([each, W.flatten(1).norm(dim=1)]))
        kept = torch.stack(traces, -1)  # (quantity, draw, sweep)
        return Refinement(
            W,
            torch.tensor(rhos, dtype=torch.float64),
            torch.stack(moved).cpu(),
            torch.stack(likelihoods).cpu(),
            {name: r_hat(one) for name, one in zip(("log_likelihood", "norm"), kept, strict=True)},
            self.sweeps * self.steps,
        )

    def schedule(self, largest: float, exact: int) -> list[float]:
        """ρ of each sweep: falling geometrically to where all of the likelihood is deconvolved, and staying there."""
        end = math.sqrt(DECONVOLVED / largest) if largest > 0 else self.rho
        end = min(end, self.rho)
        falling = torch.linspace(math.log(self.rho), math.log(end), self.sweeps - exact, dtype=torch.float64).exp()
        return [*falling.tolist(), *[end] * exact]


def check_draws(draws: Tensor, evidence: Evidence) -> None:
    """Raise ValueError unless draws are (draw, post, pre) of as many neurons as were recorded, two or more, finite."""
    N = evidence.eigenvalues.shape[-1]
    if draws.ndim != 3 or draws.shape[1:] != (N, N) or evidence.eigenvalues.shape[:-1] not in ((), draws.shape[:1]):
        raise ValueError(
            f"draws must be (draw, {N}, {N}), as one recording of {N} neurons says; got {tuple(draws.shape)}."
        )
    if len(draws) < 2 or not bool(draws.isfinite().all()):
        raise ValueError("draws must be at least two, and finite; leave out those that are not.")


def log_likelihood(W: Tensor, evidence: Evidence) -> Tensor:
    """tr(BWᵀ) − ½ tr(WΛWᵀ) of weights in the units of the evidence, shape (...)."""
    along = W if evidence.vectors is None else W @ evidence.vectors
    return (along * (evidence.cross - 0.5 * along * evidence.eigenvalues.unsqueeze(-2))).sum((-1, -2))


def observed(W: Tensor, evidence: Evidence, rho: float, source: torch.Generator | None) -> Tensor:
    """Draw z given W and the recording; see the module."""
    along = W if evidence.vectors is None else W @ evidence.vectors
    share = rho**2 * evidence.eigenvalues.unsqueeze(-2)
    # Where it is not deconvolved the likelihood is of z: precision 1/ρ² + λ.
    soft = share > DECONVOLVED * (1 + 1e-9)
    variance = rho**2 * torch.where(soft, 1 / (1 + share), 1 - share)
    mean = torch.where(soft, 1 / (1 + share), 1 - share) * along
    mean = mean + torch.where(soft, 1 / (1 + share), 1.0) * rho**2 * evidence.cross
    z = mean + variance.sqrt() * torch.randn(W.shape, generator=source, dtype=W.dtype, device=W.device)
    return z if evidence.vectors is None else z @ evidence.vectors.mT


def given_noisy(
    denoise: Denoiser, z: Tensor, rho: float, steps: int = STEPS, source: torch.Generator | None = None
) -> Tensor:
    """Draw from the prior's law of W given z = W + ρ ε.

    Noise s added to W and noise ρ of the observation are one noise t, 1/t² = 1/s² + 1/ρ²: the diffusion begins at
    t = ρ itself.

    Args:
        denoise: the prior's denoiser.
        z: what is observed, shape (..., post, pre).
        rho: ρ.
        steps: noise levels.
        source: generator of the draws.

    Returns:
        W, of the same shape.
    """

    def given(x: Tensor, sigma: Tensor) -> Tensor:
        t2 = 1 / (sigma**-2 + rho**-2)
        return denoise(t2 * (x / sigma**2 + z / rho**2), t2.sqrt())

    N = z.shape[-1]
    precision = torch.full((N,), rho**-2, dtype=z.dtype, device=z.device)
    levels = power_levels(steps, HIGHEST * rho, LOWEST * rho)
    return sample(
        given, z.shape, sigmas=levels, evidence=Evidence(precision, None, z / rho**2), generator=source, device=z.device
    )


def r_hat(chains: Float[Tensor, "chain sweep"]) -> float:
    """Split R̂ of a quantity: √(all variance / variance within half chains).

    References:
        Rank-normalization, folding, and localization: an improved R̂ (Vehtari, Gelman, Simpson, Carpenter, Bürkner,
        2021), equations 1 to 4, https://doi.org/10.1214/20-BA1221
    """
    half = chains.shape[-1] // 2
    parts = torch.cat([chains[:, :half], chains[:, -half:]])
    within = parts.var(-1).mean()
    between = parts.mean(-1).var()
    return float(((half - 1) / half + between / within.clamp(min=1e-300)).sqrt())
