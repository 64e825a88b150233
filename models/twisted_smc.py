"""Sequential Monte Carlo with a twisted proposal: exact in the limit of many particles, for few weights, as a check.

Particles go from noise σ_max to weights. Given W_s = x the prior's denoiser tells mean D and, by Tweedie's formula,
covariance V = s² ∂D/∂x of W; both are known for all entries of W at once, so that the prior's step from s to t and the
likelihood as it looks from s, the twist, are Gaussian integrals over W ~ N(D, V). With α = 1 − t²/s²,

    p(x_t | x_s) = N(x_s + α(D − x_s), α t² I + α² V),
    p̃_s(x_s) = ∫ N(W; D, V) exp(tr(BWᵀ) − ½ tr(WΛWᵀ)) dW,
    q(x_t | x_s) = N(x_s + α(D* − x_s), α t² I + α² V*),    V* = (V⁻¹ + Λ)⁻¹,    D* = D + V*(B − DΛ),

where D* is the guided mean of moment matching (`neurosde.models.dps`), its linear system solved exactly. Particles
proposed by q have the weights

    w = p(x_t | x_s) p̃_t(x_t) / (p̃_s(x_s) q(x_t | x_s)),

which are 1 for a Gaussian prior, and for any prior in the last step, at t = 0. They are multiplied until their
effective number is below a share of the particles, which are then resampled. The mean weight is an unbiased estimate
of the evidence ∫ p(W) exp(tr(BWᵀ) − ½ tr(WΛWᵀ)) dW. All of this is of the prior that the steps make: what twisting
gets wrong is corrected, however wrong, what the steps get wrong is not. Their second moments are right; more steps
mend the third.

References:
    Practical and asymptotically exact conditional sampling in diffusion models (Wu, Trippe, Naesseth, Blei, Cunningham,
    2023), https://arxiv.org/abs/2306.17775
    Learning diffusion priors from observations by expectation maximization (Rozet, Andry, Lanusse, Louppe, 2024),
    moment matching, https://arxiv.org/abs/2405.13712
    An introduction to sequential Monte Carlo (Chopin, Papaspiliopoulos, 2020), chapter 9, systematic resampling,
    https://doi.org/10.1007/978-3-030-47845-2
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm import tqdm

from neurosde.brownian import as_generator
from neurosde.models.edm import Denoiser, Evidence, noise_levels
from neurosde.validation import check_count, check_positive

MOST_WEIGHTS = 100  # of a particle, whose covariance is a matrix of that size
STEPS = 96


@dataclass(frozen=True)
class TwistedDraws:
    """Weighted draws, of independent runs.

    Attributes:
        particles: W in the units of the denoiser, shape (run, particle, post, pre).
        log_weights: normalised, shape (run, particle), float64.
        log_evidence: log ∫ p(W) exp(tr(BWᵀ) − ½ tr(WΛWᵀ)) dW as each run estimates it, shape (run,).
        effective: effective number of particles at each noise level, over their number, shape (level, run).
        resampled: whether they were resampled there, shape (level, run).
        evaluations: of the denoiser, for each particle; products with its derivative are not counted.
    """

    particles: Float[Tensor, "run particle post pre"]
    log_weights: Float[Tensor, "run particle"]
    log_evidence: Float[Tensor, " run"]
    effective: Float[Tensor, "level run"]
    resampled: Bool[Tensor, "level run"]
    evaluations: int

    def draws(self, count: int, generator: int | torch.Generator | None = None) -> Float[Tensor, "draw post pre"]:
        """Draw from the particles by their weights, as many of each run; several draws may be of one particle.

        Raises:
            ValueError: the runs do not divide the count.
        """
        runs = len(self.log_weights)
        if check_count(count, "count") % runs:
            raise ValueError(f"count must be a multiple of the number of runs, {runs}; got {count}.")
        source = as_generator(generator, self.particles.device)
        chosen = systematic(self.log_weights, count // runs, source)
        return torch.cat([one[index] for one, index in zip(self.particles, chosen, strict=True)])


@dataclass(frozen=True)
class TwistedSMC:
    """Twisted diffusion sampler; see the module.

    Args:
        denoise: the prior's denoiser, differentiable, in units in which the mean square of a weight is about 1.
        particles: of a run.
        runs: independent runs.
        steps: noise levels.
        threshold: effective number of particles, over their number, below which they are resampled.

    Raises:
        ValueError: numbers out of range.
    """

    denoise: Denoiser
    particles: int = 256
    runs: int = 8
    steps: int = STEPS
    threshold: float = 0.5

    def __post_init__(self) -> None:
        check_count(self.particles, "particles", 2)
        check_count(self.runs, "runs")
        check_count(self.steps, "steps", 2)
        if check_positive(self.threshold, "threshold", zero_ok=True) > 1:
            raise ValueError(f"threshold must be at most 1; got {self.threshold}.")

    def sample(
        self, evidence: Evidence, generator: int | torch.Generator | None = None, progress: bool = False
    ) -> TwistedDraws:
        """Draw from the posterior.

        Args:
            evidence: of one recording, in the units of the denoiser: eigenvalues (direction,) and cross (post,
                direction), of all rows of W, or of some where the prior's are independent.
            generator: seed or generator, on the device of the evidence.
            progress: show a progress bar, on a terminal.

        Raises:
            ValueError: evidence of several recordings, or too many weights.
            FloatingPointError: the denoiser returned NaN or infinite values.
        """
        cross = evidence.cross
        if cross.ndim != 2 or cross.numel() > MOST_WEIGHTS:
            raise ValueError(
                f"evidence must be of one recording, and at most {MOST_WEIGHTS} weights; got cross of shape "
                f"{tuple(cross.shape)}. For more weights use SplitGibbs."
            )
        source = as_generator(generator, cross.device)
        likelihood = _Likelihood(evidence)
        levels = noise_levels(self.steps).tolist()
        shape = (self.runs * self.particles, cross.numel())

        def normal() -> Tensor:
            return torch.randn(shape, generator=source, dtype=torch.float64, device=cross.device)

        x, log_w = likelihood.start(levels[0], normal())
        now = self._looked_ahead(likelihood, x, levels[0])
        log_w = (log_w + now.log_twist).view(self.runs, -1)
        log_evidence = log_w.new_zeros(self.runs)
        effective, resampled = [], []
        pairs = list(zip(levels[:-1], levels[1:], strict=True))
        for s, t in tqdm(pairs, unit="level", disable=None if progress else True):
            share = log_w.log_softmax(-1)
            ess = 1 / (2 * share).exp().sum(-1) / self.particles
            again = ess < self.threshold
            effective.append(ess)
            resampled.append(again)
            if bool(again.any()):
                index = torch.arange(self.particles, device=x.device).expand(self.runs, -1).clone()
                index[again] = systematic(share[again], self.particles, source)
                flat = (index + self.particles * torch.arange(self.runs, device=x.device)[:, None]).flatten()
                x, now = x[flat], now.chosen(flat)
                mean_weight = log_w.logsumexp(-1) - math.log(self.particles)
                log_evidence = torch.where(again, log_evidence + mean_weight, log_evidence)
                log_w = torch.where(again[:, None], 0.0, log_w)
            if t == 0:  # p(W) p̃_0(W) = p̃_s(x) q(W): no weight changes
                x = now.posterior_draw(normal())
                break
            x, log_step = now.step(x, s, t, normal())
            following = self._looked_ahead(likelihood, x, t)
            log_w = log_w + (log_step + following.log_twist - now.log_twist).view_as(log_w)
            now = following
        log_evidence = log_evidence + log_w.logsumexp(-1) - math.log(self.particles)
        weights = likelihood.matrix(x).view(self.runs, self.particles, *cross.shape)
        return TwistedDraws(
            weights, log_w.log_softmax(-1), log_evidence, torch.stack(effective), torch.stack(resampled), self.steps
        )

    def _looked_ahead(self, likelihood: _Likelihood, x: Tensor, s: float) -> _LookAhead:
        """Moments of W given particles along the directions (particle, weight), and the likelihood from there."""
        with torch.enable_grad():
            point = x.detach().requires_grad_(True)
            sigma = torch.tensor(s, dtype=torch.float64, device=x.device)
            mean = likelihood.along(self.denoise(likelihood.matrix(point), sigma).double())
            rows = [
                torch.autograd.grad(mean[:, k].sum(), point, retain_graph=True)[0] for k in range(mean.shape[1])
            ]  # particles are independent
        mean, covariance = mean.detach(), s**2 * torch.stack(rows, 1)
        if not bool(mean.isfinite().all() and covariance.isfinite().all()):
            raise FloatingPointError(f"the denoiser returned NaN or infinite values at noise level {s:.3g}.")
        variances, axes = torch.linalg.eigh((covariance + covariance.mT) / 2)
        return _LookAhead.of(mean, variances.clamp(min=0), axes, likelihood)


class _Likelihood:
    """A Gaussian likelihood along its directions, all weights of a matrix in one vector."""

    def __init__(self, evidence: Evidence) -> None:
        self.shape, self.vectors = evidence.cross.shape, evidence.vectors
        self.cross = evidence.cross.double().flatten()
        self.precision = evidence.eigenvalues.double().expand(self.shape).flatten()

    def matrix(self, x: Tensor) -> Tensor:
        """Vectors (..., weight) as matrices (..., post, pre)."""
        found = x.reshape(*x.shape[:-1], *self.shape)
        return found if self.vectors is None else found @ self.vectors.mT

    def along(self, W: Tensor) -> Tensor:
        """Matrices as vectors."""
        return (W if self.vectors is None else W @ self.vectors).flatten(-2)

    def start(self, s: float, z: Tensor) -> tuple[Tensor, Tensor]:
        """Particles at σ_max, of the Gaussian posterior with noise, and log of the prior's over their density."""
        variance = 1 / (self.precision + 1)
        spread = (variance + s**2).sqrt()
        x = self.cross * variance + spread * z
        log_ratio = 0.5 * (z.square() - x.square() / (1 + s**2)) + (spread.log() - 0.5 * math.log(1 + s**2))
        return x, log_ratio.sum(-1)


@dataclass(frozen=True)
class _LookAhead:
    """W given particles, (particle, weight): Gaussian without the likelihood and with it.

    Attributes:
        mean: D.
        variances: eigenvalues of V.
        axes: eigenvectors of V as columns.
        guided: D*.
        root: R with V* = R Rᵀ.
        log_twist: log p̃, shape (particle,).
    """

    mean: Tensor
    variances: Tensor
    axes: Tensor
    guided: Tensor
    root: Tensor
    log_twist: Tensor

    @classmethod
    def of(cls, mean: Tensor, variances: Tensor, axes: Tensor, likelihood: _Likelihood) -> _LookAhead:
        """With S = V^½ and M = I + S Λ S it is V* = S M⁻¹ S, and all is defined where V is singular, too."""
        half = axes * variances.sqrt().unsqueeze(-2)  # half halfᵀ = V
        M = half.mT @ (likelihood.precision.unsqueeze(-1) * half)
        lower = torch.linalg.cholesky(M + torch.eye(M.shape[-1], dtype=M.dtype, device=M.device))
        root = torch.linalg.solve_triangular(lower, half.mT, upper=False).mT
        slope = likelihood.cross - likelihood.precision * mean
        pulled = torch.einsum("pij,pi->pj", root, slope)
        guided = mean + torch.einsum("pij,pj->pi", root, pulled)
        log_twist = (mean * (likelihood.cross - 0.5 * likelihood.precision * mean)).sum(-1)
        log_twist = log_twist + 0.5 * pulled.square().sum(-1) - lower.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return cls(mean, variances, axes, guided, root, log_twist)

    def chosen(self, index: Tensor) -> _LookAhead:
        """The same of some particles."""
        return _LookAhead(*(getattr(self, name)[index] for name in self.__dataclass_fields__))

    def posterior_draw(self, z: Tensor) -> Tensor:
        """W with the likelihood."""
        return self.guided + torch.einsum("pij,pj->pi", self.root, z)

    def step(self, x: Tensor, s: float, t: float, z: Tensor) -> tuple[Tensor, Tensor]:
        """Propose particles at t, and return the log of the prior's density of the step over the proposal's."""
        alpha = 1 - t**2 / s**2
        noise = alpha * t**2
        eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
        lower = torch.linalg.cholesky(noise * eye + alpha**2 * self.root @ self.root.mT)
        moved = x + alpha * (self.guided - x) + torch.einsum("pij,pj->pi", lower, z)
        variances = noise + alpha**2 * self.variances
        off = torch.einsum("pij,pi->pj", self.axes, moved - x - alpha * (self.mean - x))
        of_prior = -0.5 * (off.square() / variances + variances.log()).sum(-1)
        proposed = -0.5 * z.square().sum(-1) - lower.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return moved, of_prior - proposed


def systematic(log_weights: Tensor, count: int, source: torch.Generator | None) -> Tensor:
    """Indices of particles, each about count × its weight times: systematic resampling.

    Args:
        log_weights: normalised, shape (run, particle).
        count: indices of each run.
        source: generator.

    Returns:
        Indices, rising, shape (run, count).
    """
    edges = log_weights.exp().cumsum(-1)
    offset = torch.rand(len(edges), 1, generator=source, dtype=torch.float64, device=edges.device)
    places = (offset + torch.arange(count, device=edges.device)) / count
    return torch.searchsorted(edges / edges[:, -1:], places).clamp(max=edges.shape[-1] - 1)
