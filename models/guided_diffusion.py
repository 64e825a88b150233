"""Draws refined by guidance: noise is added to them, and taken away again with the likelihood as a guide.

With as much noise as σ_max nothing of the draws is left, and what comes is what the guidance draws from the prior; with
less they keep what that noise leaves of them. It is as right as the guidance is (`neurosde.models.dps`): exact, of all
three, for Gaussian priors only. `SplitGibbs` is exact for any, and takes more evaluations.

A guidance diverges where the recording tells more than its approximation bears, for some draws sooner than for others.
Draws do not depend on one another: those for which it diverges are let go, and stay as they were.

References:
    SDEdit: guided image synthesis and editing with stochastic differential equations (Meng, He, Song, Song, Wu, Zhu,
    Ermon, 2022), https://arxiv.org/abs/2108.01073
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from neurosde.brownian import as_generator
from neurosde.models.dps import DiffusionPosteriorSampling, LikelihoodGuidance, MomentMatching, PseudoinverseGuidance
from neurosde.models.edm import SIGMA_MIN, Denoiser, Evidence, noise_levels
from neurosde.models.function_guidance import FunctionGradient, FunctionGuidance
from neurosde.models.refinement import Refinement, check_draws, log_likelihood
from neurosde.models.samplers import sample
from neurosde.validation import check_count, check_positive

Guidance = Literal["mmps", "pigdm", "dps"]
GUIDANCES: dict[str, type[LikelihoodGuidance]] = {
    "mmps": MomentMatching, "pigdm": PseudoinverseGuidance, "dps": DiffusionPosteriorSampling
}  # fmt: skip
OF_FUNCTIONS: dict[str, type[FunctionGuidance]] = {"pigdm": FunctionGuidance, "dps": FunctionGradient}
STEPS = 64
RHO = 3.0


@dataclass(frozen=True)
class GuidedDiffusion:
    """The prior's diffusion, guided by the likelihood, from draws with noise on them.

    Args:
        denoise: the prior's denoiser, differentiable.
        guidance: "mmps" (`MomentMatching`), "pigdm" (`PseudoinverseGuidance`) or "dps" (`DiffusionPosteriorSampling`).
        steps: noise levels.
        rho: standard deviation of the noise that is added, in the units of the denoiser; much more than the default
            is more than the derivatives of a trained network bear.
        log_prob: a likelihood of one's own, of weights (draw, post, pre) in the units of the denoiser, that guides in
            place of the evidence's, by "pigdm" (`FunctionGuidance`) or "dps" (`FunctionGradient`).

    Raises:
        ValueError: an unknown guidance, or one that needs a Gaussian likelihood, or numbers out of range.
    """

    denoise: Denoiser
    guidance: Guidance = "mmps"
    steps: int = STEPS
    rho: float = RHO
    log_prob: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        if self.guidance not in get_args(Guidance):
            raise ValueError(f"guidance must be one of {get_args(Guidance)}; got {self.guidance!r}.")
        if self.log_prob is not None and self.guidance not in OF_FUNCTIONS:
            raise ValueError(
                f"a likelihood of one's own guides by one of {tuple(OF_FUNCTIONS)}; got guidance {self.guidance!r}."
            )
        check_count(self.steps, "steps", 2)
        if check_positive(self.rho, "rho") <= SIGMA_MIN:
            raise ValueError(f"rho must exceed the smallest noise level, {SIGMA_MIN}; got {self.rho}.")

    def refine(
        self,
        draws: Float[Tensor, "draw post pre"],
        evidence: Evidence,
        generator: int | torch.Generator | None = None,
        progress: bool = False,
    ) -> Refinement:
        """Move draws towards the posterior, in one sweep; see `SplitGibbs.refine`.

        Warns where the guidance diverges for some of the draws. They stay as they were: `Refinement.diverged`.

        Raises:
            ValueError: draws that are not (draw, post, pre) of as many neurons as were recorded, or not finite.
            FloatingPointError: the guidance diverges for all draws, or the denoiser returned NaN or infinite values.
        """
        check_draws(draws, evidence)
        source = as_generator(generator, draws.device)
        before = draws.double()
        noise = torch.randn(before.shape, generator=source, dtype=torch.float64, device=before.device)
        if self.log_prob is None:
            guidance = GUIDANCES[self.guidance](self.denoise, evidence)
        else:
            guidance = OF_FUNCTIONS[self.guidance](self.denoise, self.log_prob, before.shape[-1])
        guided = _LettingGo(guidance, torch.zeros(len(before), dtype=torch.bool, device=before.device))
        W = sample(
            guided, before.shape, sigmas=noise_levels(self.steps, self.rho),
            start=before + self.rho * noise, evidence=evidence, generator=source, progress=progress,
        )  # fmt: skip
        if lost := int(guided.diverged.sum()):
            told = (
                f"guidance {self.guidance!r} diverges for {lost} of {len(W)} draws, at noise level {guided.level:.3g} "
                "first: the recording tells more than its approximation bears"
            )
            if lost == len(W):
                raise FloatingPointError(f"{told}. {self._instead()}")
            told += ". They stay as they were, of another law than the others."
            warnings.warn(f"{told} {self._instead()}", stacklevel=2)
            W = torch.where(guided.diverged[:, None, None], before, W)
        kept = ~guided.diverged
        moved = (W - before)[kept].square().mean().sqrt() / W.var(0).mean().sqrt().clamp(min=1e-300)
        return Refinement(
            W,
            torch.tensor([self.rho], dtype=torch.float64),
            moved.reshape(1).cpu(),
            log_likelihood(W, evidence)[kept].mean().reshape(1).cpu(),
            {},
            self.steps,
            guided.diverged,
        )

    def _instead(self) -> str:
        """What to do where it diverges, in the words of Python and of the command line."""
        if self.log_prob is None:
            other = "by 'gibbs', which bears all recordings (SplitGibbs; neurosde refine --method gibbs), or "
        else:
            other = "by 'pigdm' (neurosde refine --method pigdm), or " if self.guidance == "dps" else ""
        return f"Refine {other}from less noise, with rho (--rho) below {self.rho:g}."


class _LettingGo:
    """A guidance, in the interface of `Denoiser`, that draws follow until it diverges, and then the prior.

    Attributes:
        diverged: for which draws it has, shape (draw,).
        level: the noise level at which it did first.
    """

    def __init__(self, guidance: LikelihoodGuidance, diverged: Tensor) -> None:
        self.guidance, self.diverged, self.level = guidance, diverged, math.nan

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        found, mean, diverges = self.guidance.guided(x, sigma)
        if bool(diverges.any()) and math.isnan(self.level):
            self.level = float(torch.as_tensor(sigma).max())
        self.diverged = self.diverged | diverges
        return torch.where(self.diverged[:, None, None], mean, found)
