"""The best denoiser of an ensemble, E[J | J_s], where it is known."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from neurosde.datasets.ensembles import Dale, Ensemble, Gaussian, LowRank, Sparse, base_of, is_gaussian
from neurosde.models.analytic import (
    ScaleMixtureDenoiser,
    SpikeAndSlabMixtureDenoiser,
    gains_near,
    slab_log_likelihood,
    slab_mixture_mean,
    uniform_gains,
)
from neurosde.models.analytic_dale import DaleDenoiser, dale_log_likelihood, dale_mean
from neurosde.models.analytic_low_rank import SpikedDenoiser
from neurosde.models.edm import Denoiser

CLOSED = (Gaussian, Sparse, Dale)  # ensembles whose best denoiser is known in closed form


def in_closed_form(ensemble: Ensemble) -> bool:
    """Whether the best denoiser of an ensemble, of one gain or a mixture, is known in closed form."""
    return isinstance(base_of(ensemble), CLOSED)


def best_denoiser(ensemble: Ensemble, gain_rms: float) -> Denoiser:
    """Return E[J | J_s] of an ensemble, J = W √N/g_rms.

    Args:
        ensemble: Gaussian, sparse, low-rank weights or Dale's law, of one gain or a mixture.
        gain_rms: g_rms, the unit.

    Raises:
        ValueError: it is not known for this ensemble.
    """
    base = base_of(ensemble)
    if not isinstance(base, LowRank | Gaussian | Sparse | Dale):
        known = ", ".join(kind.name for kind in (*CLOSED, LowRank))
        raise ValueError(f"the best denoiser is known for the ensembles {known}; got {base.name}.")
    low, high = (gain / gain_rms for gain in ensemble.gain_range)
    fixed = torch.tensor([low], dtype=torch.float64)
    if is_gaussian(base):
        variances, log_chances = uniform_gains(fixed[0], fixed.new_tensor(high))
        return ScaleMixtureDenoiser(variances, log_chances.exp())
    if isinstance(base, Sparse | Dale) and high > low:
        return _OfAnyGain(base, low, high)
    if isinstance(base, Sparse):
        return SpikeAndSlabMixtureDenoiser(base.density, fixed.square() / base.density)
    if isinstance(base, Dale):
        return DaleDenoiser(base, fixed)
    assert isinstance(base, LowRank)
    strength = base.strength / gain_rms
    if high > low:
        return SpikedDenoiser.of_gains(low, high, strength, base.rank)
    return SpikedDenoiser(fixed.square(), strength, base.rank)


@dataclass(frozen=True)
class _OfAnyGain:
    """Sparse weights or Dale's law, of a gain that is uniform over a range, in units of g_rms."""

    ensemble: Sparse | Dale
    low: float
    high: float

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        kind, like = self.ensemble, torch.zeros(x.shape[:-2], dtype=torch.float64, device=x.device)
        if isinstance(kind, Dale):
            near = gains_near(partial(dale_log_likelihood, kind, x.detach(), sigma), self.low, self.high, like)
            return dale_mean(kind, x, sigma, *near)
        density = kind.density

        def log_likelihood(gains: Tensor) -> Tensor:
            return slab_log_likelihood(density, x.detach(), sigma, gains.square() / density)

        gains, log_chances = gains_near(log_likelihood, self.low, self.high, like)
        return slab_mixture_mean(density, x, sigma, gains.square() / density, log_chances)
