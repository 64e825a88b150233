"""Refining draws of a trained posterior: refiners are handed its denoisers, in the units that recordings suggest.

Draws and likelihoods are in the units of W, a denoiser in those of J = W √N/g, where the gain g is that of each draw's
recording. See `neurosde.models.split_gibbs` and `neurosde.models.guided_diffusion`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from neurosde.models.diffusion_prior import DiffusionPrior
from neurosde.models.edm import Denoiser, Evidence
from neurosde.models.guidance import RescaledDenoiser
from neurosde.models.guided_diffusion import GuidedDiffusion
from neurosde.models.refinement import Refinement
from neurosde.models.refiner_options import Refiner
from neurosde.models.split_gibbs import SplitGibbs


def refine_draws(
    draws: Tensor,
    in_W: Evidence,
    method: Refiner,
    options: Mapping[str, Any],
    *,
    given: Callable[[Evidence], tuple[Denoiser, Evidence, Tensor]],
    prior: Callable[[Tensor], Denoiser],
    ask_given: bool,
    resolve: Callable[..., Tensor],
    close: Callable[[Tensor], Tensor],
    log_prob: Callable[[Tensor], Tensor] | None,
    generator: torch.Generator | None,
    progress: bool,
) -> Refinement:
    """Move draws to the posterior of a prior and the likelihood itself.

    Args:
        draws: W to begin with, shape (draw, post, pre), of several recordings (draw, recording, post, pre).
        in_W: what the recording of each draw says, in units of W, shape (draw,) or (draw, recording).
        method: the refiner.
        options: of `SplitGibbs` or `GuidedDiffusion`, see `refiner_options`.
        given: of evidence in units of W, the denoiser given it, the evidence in the denoiser's units, and the gain
            that these stand for.
        prior: the denoiser of the prior alone, in the units of gains, shape (draw,) or (draw, recording).
        ask_given: whether split Gibbs asks at first for what is known of recordings, too.
        resolve: of draws in the denoiser's unit and a generator, what weights are that are too small to be told from 0
            (`neurosde.models.resolution.resolved`).
        close: of W, what else is done with refined draws (`neurosde.models.closing`).
        log_prob: a likelihood of W (draw, post, pre) to guide by in place of that of transitions.
        generator: on the device of the network.
        progress: show a progress bar, on a terminal.

    Returns:
        The refined draws, in the units of W, and how they came about.

    Raises:
        ValueError: draws that are not finite or too few, or options out of range.
        FloatingPointError: a guidance diverges for all draws.
    """
    _, evidence, gain = given(in_W)
    unit = gain[..., None, None] / math.sqrt(draws.shape[-1])
    if method == "gibbs":

        def conditional(part: Evidence) -> Denoiser:
            """The denoiser given a part of the recording, in the units of the whole."""
            denoise, _, own = given(part.scaled(1 / unit[..., 0, 0]))
            return RescaledDenoiser(denoise, gain / own)

        refiner: SplitGibbs | GuidedDiffusion = SplitGibbs(
            prior(gain), conditional=conditional if ask_given else None, **options
        )
    else:
        own = None if log_prob is None else lambda J: log_prob(unit * J)
        refiner = GuidedDiffusion(prior(gain), method, log_prob=own, **options)
    found = refiner.refine(draws.to(unit) / unit, evidence, generator, progress)
    J = resolve(found.draws, generator=generator)
    return replace(found, draws=torch.where(found.diverged[..., None, None], draws.to(J), close(J * unit)))


def prior_in_units(prior: DiffusionPrior, family: str | None) -> Callable[[Tensor], Denoiser]:
    """The denoiser of a prior, told the family where it is of several, in the units of gains: of gains, a denoiser."""
    denoise = prior.denoiser(family if prior.families else None)
    return lambda gain: RescaledDenoiser(denoise, gain / prior.config.gain_rms)
