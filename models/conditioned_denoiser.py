"""The denoiser of weights given a recording: a trained network, or in closed form where that is the answer."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from neurosde.datasets.ensembles import is_gaussian, make_ensemble
from neurosde.models.analytic import scale_mixture_mean, uniform_gains
from neurosde.models.edm import Denoiser, Evidence
from neurosde.models.graphed_network import GraphedNetwork
from neurosde.models.network_denoiser import GAUSSIAN, NetworkDenoiser

if TYPE_CHECKING:
    from neurosde.models.diffusion_cfg import PosteriorConfig


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
        ends = (gain, gain) if gain_known else _range_of_gains(kinds)
        if ends is not None:
            variances, log_chances = uniform_gains(*(end / gain for end in ends))
            return partial(scale_mixture_mean, evidence=evidence, variances=variances, log_chances=log_chances)
    told = 0 if family is None else 1 + config.network.families.index(family)
    return NetworkDenoiser(network, told, evidence, gain, gain_known)


def _trained_on(config: PosteriorConfig, family: str | None) -> list[dict[str, Any]]:
    """The ensembles of a family that a network was trained on; none where no family is told."""
    kinds = [*config.training.get("ensembles", ()), *config.training.get("of_cubes", ())]
    return [kind for kind in kinds if kind["name"] == family]


def _range_of_gains(kinds: list[dict[str, Any]]) -> tuple[Tensor | float, Tensor | float] | None:
    """Range of the gain of ensembles, if it is one range."""
    ranges = {(kind["gain"], kind.get("gain_high", kind["gain"])) for kind in kinds}
    return next(iter(ranges)) if len(ranges) == 1 else None
