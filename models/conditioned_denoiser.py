"""The denoiser of weights, given a recording or not: a trained network, or in closed form where that is the answer."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from neurosde.datasets.ensembles import (
    Dale,
    Ensemble,
    LowRank,
    Sparse,
    base_of,
    is_gaussian,
    make_ensemble,
)
from neurosde.models.analytic import scale_mixture_mean, uniform_gains
from neurosde.models.analytic_low_rank import SpikedDenoiser
from neurosde.models.best_denoiser import best_denoiser
from neurosde.models.edm import Denoiser, Evidence
from neurosde.models.empirical_bayes import evidence_gain
from neurosde.models.graphed_network import GraphedNetwork
from neurosde.models.guidance import ChosenDenoiser, RescaledDenoiser
from neurosde.models.network_denoiser import GAUSSIAN, NetworkDenoiser

if TYPE_CHECKING:
    from neurosde.models.diffusion_cfg import PosteriorConfig

SAMPLED = 0.4  # noise level up to which a Gibbs sampler may answer


def conditioned_denoiser(
    network: GraphedNetwork,
    config: PosteriorConfig,
    family: str | None,
    evidence: Evidence,
    gain: Tensor,
    gain_known: bool,
) -> Denoiser:
    """Return E[J | J_s, recording].

    Where weights are told to be iid Gaussian, or sparse with all connections there, nothing is open but the gain, over
    which the mean is known in closed form: the network is not asked.

    Args:
        network: the pair network of a posterior.
        config: what it was trained for.
        family: name of the ensemble, where it is told.
        evidence: what a recording says, in J units, shape (...).
        gain: gain s₀√N that the unit of J stands for, shape (...).
        gain_known: whether the weights are known to have this gain.
    """
    kinds = _trained_on(config, family)
    if family == GAUSSIAN or (kinds and all(is_gaussian(make_ensemble(**kind)) for kind in kinds)):
        ends = (gain, gain) if gain_known else _one_range(kinds)
        if ends is not None:
            variances, log_chances = uniform_gains(*(end / gain for end in ends))
            return partial(scale_mixture_mean, evidence=evidence, variances=variances, log_chances=log_chances)
    told = 0 if family is None else 1 + config.network.families.index(family)
    return NetworkDenoiser(network, told, evidence, gain, gain_known)


def prior_denoiser(
    network: GraphedNetwork,
    config: PosteriorConfig,
    family: str | None,
    N: int,
    gain: Tensor,
    gain_known: bool,
    sampled: bool = False,
) -> Denoiser:
    """Return E[J | J_s] without a recording: what a posterior takes for its prior.

    Where weights are told to obey Dale's law, or to be sparse, it is the best denoiser, in closed form, and where they
    are told to be low-rank and that is allowed, a Gibbs sampler's. Else it is what `conditioned_denoiser` answers. (Of
    50 neurons under Dale's law the network of `base` was short of ⟨W_s, W⟩ by 1 to 2.5 % of |W|² at s = 1 and 2, and
    draws that were refined with it came out 1.4 % too small.)

    Args:
        network: the pair network of a posterior.
        config: what it was trained for.
        family: name of the ensemble, where it is told.
        N: number of neurons.
        gain: gain s₀√N that the unit of J stands for, shape (...).
        gain_known: whether the weights are known to have this gain.
        sampled: whether a Gibbs sampler may answer where s ≤ 0.4. Its error, which is the same at each call, is of one
            of N² directions, 0.07 of a standard deviation of 20 neurons and 0.16 of 100 at s = 0.1, 0.2 and 0.5 at 0.3,
            but up to 2 at 1.
    """
    kinds = [make_ensemble(**kind) for kind in _trained_on(config, family)]
    if len(kinds) == 1 and not is_gaussian(kind := kinds[0]):
        base = base_of(kind)
        if isinstance(base, Dale | Sparse):
            if gain_known:  # in its unit the weights of all gains are the same
                one = replace(base, gain=1.0)
                return best_denoiser(one, math.sqrt(N * one.variance(N)))
            return RescaledDenoiser(best_denoiser(kind, config.gain_rms), gain / config.gain_rms)
        if isinstance(base, LowRank) and sampled:
            background = float(gain.amin()) ** 2 - base.strength**2 if gain_known else None
            if background is None or background > 0:
                spiked = RescaledDenoiser(_spiked(kind, background), gain)
                network_says = prior_denoiser(network, config, family, N, gain, gain_known)
                return ChosenDenoiser(spiked, network_says, lambda sigma: sigma <= SAMPLED)
    nothing = Evidence.none(N, gain.device).expand(gain.shape)
    own = gain if gain_known else evidence_gain(nothing, *config.gains)
    return RescaledDenoiser(conditioned_denoiser(network, config, family, nothing, own, gain_known), gain / own)


def _spiked(kind: Ensemble, background: float | None) -> SpikedDenoiser:
    """The denoiser of low-rank weights W √N, of a known squared gain of the background or of all gains."""
    base = base_of(kind)
    assert isinstance(base, LowRank)
    gains = kind.gain_range if background is None else (math.sqrt(background),) * 2
    variances, log_chances = uniform_gains(*torch.tensor(gains, dtype=torch.float64))
    return SpikedDenoiser(variances, base.strength, base.rank, log_chances.exp(), chains=4, burn_in=5, sweeps=20)


def _trained_on(config: PosteriorConfig, family: str | None) -> list[dict[str, Any]]:
    """The ensembles of a family that a network was trained on; none where no family is told."""
    return [kind for kind in config.ensembles if kind["name"] == family]


def _one_range(kinds: list[dict[str, Any]]) -> tuple[Tensor | float, Tensor | float] | None:
    """Range of the gain of ensembles, if it is one range."""
    ranges = {make_ensemble(**kind).gain_range for kind in kinds}
    return next(iter(ranges)) if len(ranges) == 1 else None
