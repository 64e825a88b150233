"""Split Gibbs sampling out of a prior's denoiser and the likelihood, exact in the limit for any prior.

Of a recording the likelihood is exp(tr(BWᵀ) − ½ tr(WΛWᵀ)), all in the units of the diffusion. With z beside W, whose
joint law

    p(W) N(z; W, ρ²) exp(tr(B̃zᵀ) − ½ tr(zΛ̃zᵀ)),    Λ̃ = Λ(I − ρ²Λ)⁻¹,    B̃ = B(I − ρ²Λ)⁻¹,

has the posterior as the law of W for every ρ² < 1/λ_max(Λ), `SplitGibbs` draws in turn

    z | W = W + ρ²(B − WΛ) + ρ ε (I − ρ²Λ)^½,    W | z: the prior's diffusion, given an observation of noise ρ.

A step moves W by ρ, which is small where a recording tells much about some direction. So ρ falls from sweep to sweep,
from a large one on, at which not all of the likelihood can be deconvolved, but only where ρ² λ ≤ 0.8:

- with a prior's denoiser alone, noise is added to what was recorded until it can be: of precision Λ₁ = min(Λ, 0.8/ρ²)
  along each direction, with B₁ = Λ₁Λ⁻¹B + (Λ₁ − Λ₁²Λ⁻¹)^½ ε, it is a recording of the same network with more noise. Of
  such a recording every sweep is exact. Each draw has one ε for all sweeps; what it adds vanishes as ρ falls. (A
  likelihood that is less precise about the recording itself takes signal for noise, and so finds gains too small, which
  later sweeps are too short to make up for: with the exact denoiser of weights of an unknown gain, 8 neurons and 64
  sweeps, draws come out 4 to 5 % too small so, in place of 0.4 % or less.)
- with a denoiser that is conditioned on recordings, every sweep is exact. The recording is divided into two independent
  ones of the same network, with more noise each, whose precisions add up: Λ₁ = aΛ with a = min(1, 0.8/(ρ² λ_max)) and
  B₁ = aB + (a(1 − a)Λ)^½ ε, with a fresh ε for each sweep, and what remains, (Λ − Λ₁, B − B₁). The first is
  deconvolved, and W is drawn given z and the second. At ρ = 1 nearly all is left to the denoiser; at the last ρ nothing
  is, and what it has learnt of recordings plays no part. (A division without ε is exact too, but asks the denoiser of
  pairs (Λ, B) that no recording has: B too near to ΛW. To take Λ₁ = min(Λ, 0.8/ρ²) here too leaves much along few
  directions and nothing along most, which no recording has either. With `base`, one sweep at ρ = 0.25 made weights of
  20 neurons under Dale's law that were right 0.19 ± 0.04 % smaller without ε, 0.16 ± 0.05 % with ε and that Λ₁, and
  0.04 ± 0.05 % as it is.)

References:
    Split-and-augmented Gibbs sampler (Vono, Dobigeon, Chainais, 2019), https://arxiv.org/abs/1804.05809
    Principled probabilistic imaging using diffusion models as plug-and-play priors (Wu, Sun, Chen, Zhang, Yue, Bouman,
    2024), https://arxiv.org/abs/2405.18782
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from neurosde.brownian import as_generator
from neurosde.models.edm import DECISIVE, Denoiser, Evidence, noise_levels
from neurosde.models.guidance import ChosenDenoiser
from neurosde.models.refinement import Refinement, check_draws, log_likelihood
from neurosde.models.samplers import sample
from neurosde.validation import check_count, check_positive

SWEEPS = 12
EXACT_SHARE = 0.25  # of the sweeps, at the end
# With a prior of weights alone, from draws that know nothing of it: what all weights share, signs of columns and the
# gain, is open at ρ = 3 √N, and found while ρ falls. By fewer sweeps it is found less well: of 50 neurons under
# Dale's law draws of 48 networks are 3.8 % too small after 192 (of 8 networks, by other levels and ρ, 4 % after 128,
# 5 after 64).
PRIOR_SWEEPS, PRIOR_STEPS, PRIOR_RHO, PRIOR_EXACT_SHARE = 192, 24, 3.0, 1 / 12
# Of draws that are nearly right, such as those of a posterior that are refined with its own prior. They stay the nearer
# to right the less the posterior's network is asked, which errs a little: right draws of 60 networks of 50 neurons
# under Dale's law lose 1.7 ± 0.4 % of their norm in 12 sweeps from ρ = 1, 0.4 ± 0.1 % in 12 from 0.3, and 0.3 ± 0.1 %
# in 8 from there, which move them by 0.38 |W| (independent ones differ by 0.63).
NEAR_SWEEPS, NEAR_RHO = 8, 0.3
STEPS = 16  # noise levels of a sweep: of fewer, whether a sparse weight exists is decided wrongly
DECONVOLVED = 0.8  # largest ρ²λ of a likelihood that is deconvolved
HIGHEST, LOWEST = 80.0, 2e-3  # noise levels of a sweep, in units of ρ


@dataclass(frozen=True)
class SplitGibbs:
    """Split Gibbs sampling with the deconvolved likelihood.

    Args:
        denoise: the prior's denoiser.
        sweeps: in all. Draws that are nearly right need few; sparse weights from anywhere some hundred, where much is
            recorded.
        steps: noise levels of each sweep.
        rho: ρ of the first sweep, in the units of the denoiser, 1 being the spread of a weight: how far draws may go
            from where they begin.
        exact_share: of the sweeps, those at the last ρ, where all of the likelihood is deconvolved; at least 4 are.
        conditional: the denoiser given what any recording says, if there is one.

    Raises:
        ValueError: numbers out of range.
    """

    denoise: Denoiser
    sweeps: int = SWEEPS
    steps: int = STEPS
    rho: float = 1.0
    exact_share: float = EXACT_SHARE
    conditional: Callable[[Evidence], Denoiser] | None = None

    def __post_init__(self) -> None:
        check_count(self.sweeps, "sweeps", 8)
        check_count(self.steps, "steps", 2)
        check_positive(self.rho, "rho")
        if not 0 <= self.exact_share <= 0.5:
            raise ValueError(f"exact_share must lie between 0 and 0.5; got {self.exact_share}.")

    def refine(
        self,
        draws: Float[Tensor, "draw *recording post pre"],
        evidence: Evidence,
        generator: int | torch.Generator | None = None,
        progress: bool = False,
    ) -> Refinement:
        """Move draws to the posterior.

        Args:
            draws: where to begin: draws of another posterior, or of the prior, shape (draw, post, pre); of several
                recordings (draw, recording, post, pre).
            evidence: what the recording says, to all draws or (draw, …) to each, in the units of the denoiser; of
                several (recording, …) or (draw, recording, …).
            generator: seed or generator, on the device of the draws.
            progress: show a progress bar, on a terminal.

        Raises:
            ValueError: draws that are not of these shapes, of as many neurons as were recorded, or not finite.
            FloatingPointError: the denoiser returned NaN or infinite values.
        """
        check_draws(draws, evidence, recordings=True)
        source = as_generator(generator, draws.device)
        W, exact = draws.double(), max(4, round(self.exact_share * self.sweeps))
        more = None  # noise of recordings
        if self.conditional is None:
            more = torch.randn(W.shape, generator=source, dtype=W.dtype, device=W.device)
        most = evidence.eigenvalues.amax(-1)
        rhos = self.schedule(most.amax(0) if most.ndim == draws.ndim - 2 else most, exact)
        moved, likelihoods, traces = [], [], []
        for sweep, rho in enumerate(tqdm(rhos, unit="sweep", disable=None if progress else True)):
            last, W = W, self._sweep(W, evidence, rho, source, more)
            each = log_likelihood(W, evidence)
            spread = W.var(0).mean((-1, -2)).sqrt().clamp(min=1e-300)
            moved.append((W - last).square().mean((0, -1, -2)).sqrt() / spread)
            likelihoods.append(each.mean(0))
            if sweep >= len(rhos) - exact:
                traces.append(torch.stack([each, W.flatten(-2).norm(dim=-1)]))
        kept = torch.stack(traces, -1)  # (quantity, draw, ..., sweep)
        return Refinement(
            W,
            rhos.cpu(),
            torch.stack(moved).cpu(),
            torch.stack(likelihoods).cpu(),
            {name: float(r_hat(one).max()) for name, one in zip(("log_likelihood", "norm"), kept, strict=True)},
            self.sweeps * self.steps,
            torch.zeros(W.shape[:-2], dtype=torch.bool, device=W.device),
        )

    def _sweep(
        self, W: Tensor, evidence: Evidence, rho: Tensor, source: torch.Generator | None, more: Tensor | None
    ) -> Tensor:
        def noise() -> Tensor:
            return torch.randn(W.shape, generator=source, dtype=W.dtype, device=W.device)

        precision = evidence.eigenvalues
        most = DECONVOLVED / rho.square().unsqueeze(-1) * (1 + 1e-9)
        if self.conditional is None:
            first = precision.minimum(most)
        else:
            first = precision * (most / precision.amax(-1, keepdim=True)).clamp(max=1)
        if not bool((first < precision).any()):
            return given_noisy(self.denoise, observed(W, evidence, rho, source), rho, self.steps, source)
        part = noisier(evidence, first, noise() if more is None else more)
        z = observed(W, part, rho, source)
        if self.conditional is None:
            return given_noisy(self.denoise, z, rho, self.steps, source)
        rest = Evidence(precision - first, evidence.vectors, evidence.cross - part.cross)
        left = (rest.eigenvalues > 0).any(-1)  # of some recordings nothing may be left: that is the prior
        denoise = ChosenDenoiser(self.conditional(rest), self.denoise, lambda _: left)
        return given_noisy(denoise, z, rho, self.steps, source, rest)

    def schedule(self, largest: Float[Tensor, "*recording"], exact: int) -> Float[Tensor, " sweep *recording"]:
        """ρ of each sweep: falling to where all of the likelihood is deconvolved, and staying there.

        It falls evenly in log ρ below 1, the spread of a weight, and the faster the higher it is above: from there on
        draws have forgotten where they were after a sweep or few.

        Args:
            largest: eigenvalue of Λ, not negative.
            exact: number of sweeps that stay there.
        """
        end = (DECONVOLVED / largest).sqrt().clamp(max=self.rho).log()
        share = torch.linspace(0, 1, self.sweeps - exact, dtype=torch.float64, device=largest.device)
        share = torch.cat([share, share.new_ones(exact)]).view(-1, *(1,) * largest.ndim)

        def even(log_rho: Tensor) -> Tensor:
            return torch.where(log_rho > 0, log_rho.asinh(), log_rho)

        first = even(end.new_tensor(self.rho).log())
        at = first + (even(end) - first) * share
        return torch.where(at > 0, at.sinh(), at).exp()


def noisier(evidence: Evidence, precision: Tensor, noise: Tensor) -> Evidence:
    """What the recording would say had it had so much more noise that it is of another precision.

    Args:
        evidence: what it says.
        precision: Λ₁ along each direction, at most that of the recording.
        noise: standard normal, along the directions, of the shape of draws.
    """
    share = torch.where(evidence.eigenvalues > 0, precision / evidence.eigenvalues, 1.0)
    spread = (precision * (1 - share)).clamp(min=0).sqrt()
    return Evidence(precision, evidence.vectors, evidence.cross * share.unsqueeze(-2) + spread.unsqueeze(-2) * noise)


def observed(W: Tensor, evidence: Evidence, rho: Tensor, source: torch.Generator | None) -> Tensor:
    """Draw z given W and a recording that can be deconvolved, ρ²λ < 1 along every direction; see the module."""
    along = W if evidence.vectors is None else W @ evidence.vectors
    square = rho.square()[..., None, None]
    share = square * evidence.eigenvalues.unsqueeze(-2)
    mean = along + square * (evidence.cross - along * evidence.eigenvalues.unsqueeze(-2))
    z = mean + (square * (1 - share)).sqrt() * torch.randn(W.shape, generator=source, dtype=W.dtype, device=W.device)
    return z if evidence.vectors is None else z @ evidence.vectors.mT


def given_noisy(
    denoise: Denoiser,
    z: Tensor,
    rho: Tensor,
    steps: int = STEPS,
    source: torch.Generator | None = None,
    evidence: Evidence | None = None,
) -> Tensor:
    """Draw from a law of W given z = W + ρ ε.

    Noise s added to W and noise ρ of the observation are one noise t, 1/t² = 1/s² + 1/ρ²: the diffusion begins at
    t = ρ itself. Its noise levels are those of the largest ρ.

    Args:
        denoise: the law's denoiser, that of a prior or, with `evidence`, of the posterior.
        z: what is observed, shape (..., post, pre).
        rho: ρ, shape () or (...).
        steps: noise levels.
        source: generator of the draws.
        evidence: what a recording says that the denoiser is conditioned on, if it is.

    Returns:
        W, of the same shape.
    """
    unit = rho[..., None, None]

    def given(x: Tensor, sigma: Tensor) -> Tensor:  # of W/ρ
        t2 = 1 / (sigma**-2 + 1)
        return denoise(t2 * (unit * x / sigma**2 + z), t2.sqrt() * rho) / unit

    known = (Evidence.none(z.shape[-1], z.device) if evidence is None else evidence).scaled(rho)
    along = z if known.vectors is None else z @ known.vectors
    # The prior of W/ρ has the precision ρ²: the least of these as the prior's, the rest as if it had been recorded.
    least = rho.square().min()
    precision = known.eigenvalues + 1 + (rho.square() - least).unsqueeze(-1)
    drawn = sample(
        given, z.shape, sigmas=sweep_levels(float(rho.max()), steps), prior_variance=1 / float(least),
        evidence=Evidence(precision, known.vectors, known.cross + along / unit), generator=source, device=z.device,
    )  # fmt: skip
    return unit * drawn


def sweep_levels(rho: float, steps: int) -> Tensor:
    """Noise levels of a sweep in units of ρ, then 0; shape (steps + 1,), float64.

    They are dense where structure is decided, which the observation leaves open only below ρ. Beside 192 levels, and of
    the same noise, |W| of draws of 40 neurons of the prior `sparse` (`dale`) is off by

        ρ      24 levels              32                     32, even in s^(1/7)
        0.3    −0.007 % (0.000 %)     −0.003 % (0.000 %)     −0.008 % (−0.001 %)
        1      −0.06 % (0.00 %)       −0.02 % (0.00 %)       −0.08 % (0.00 %)
        4      −0.22 % (−0.17 %)      −0.06 % (−0.07 %)      −0.34 % (−0.18 %)
        20     −0.30 % (−0.37 %)      −0.07 % (−0.16 %)      −1.2 % (−1.0 %)
    """
    height, mean, sd = DECISIVE
    return noise_levels(steps, HIGHEST, LOWEST, peaks=((height, min(0.0, mean - math.log(rho)), sd),))


def r_hat(chains: Float[Tensor, "chain *quantity sweep"]) -> Float[Tensor, "*quantity"]:
    """Split R̂ of quantities: √(all variance / variance within half chains).

    References:
        Rank-normalization, folding, and localization: an improved R̂ (Vehtari, Gelman, Simpson, Carpenter, Bürkner,
        2021), equations 1 to 4, https://doi.org/10.1214/20-BA1221
    """
    half = chains.shape[-1] // 2
    parts = torch.cat([chains[..., :half], chains[..., -half:]])
    within = parts.var(-1).mean(0)
    between = parts.mean(-1).var(0)
    return ((half - 1) / half + between / within.clamp(min=1e-300)).sqrt()
