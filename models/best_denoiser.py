"""The best denoiser of an ensemble, E[J | J_s], where it is known."""

from __future__ import annotations

import torch

from neurosde.datasets.ensembles import Dale, Ensemble, GainMixture, Gaussian, LowRank, Sparse, is_gaussian
from neurosde.models.analytic import ScaleMixtureDenoiser, SpikeAndSlabMixtureDenoiser
from neurosde.models.analytic_dale import DaleDenoiser
from neurosde.models.analytic_low_rank import SpikedDenoiser
from neurosde.models.edm import Denoiser

# Of the quadrature over gains, for each neuron: from 0.8 to 2 they are no farther apart than 0.7 of how well a gain is
# known.
POINTS = 3


def best_denoiser(ensemble: Ensemble, gain_rms: float, N: int) -> Denoiser:
    """Return E[J | J_s] of an ensemble, J = W √N/g_rms.

    Args:
        ensemble: Gaussian, sparse, low-rank weights or Dale's law, of one gain or a mixture.
        gain_rms: g_rms, the unit.
        N: most neurons that it will be asked about: the more, the closer gains must be in a quadrature over them.

    Raises:
        ValueError: it is not known for this ensemble.
    """
    base: Ensemble = ensemble.base if isinstance(ensemble, GainMixture) else ensemble
    if not isinstance(base, Gaussian | Sparse | LowRank | Dale):
        known = ", ".join(kind.name for kind in (Gaussian, Sparse, LowRank, Dale))
        raise ValueError(f"the best denoiser is known for the ensembles {known}; got {base.name}.")
    low, points = base.gain / gain_rms, max(32, POINTS * N)
    high = ensemble.gain_high / gain_rms if isinstance(ensemble, GainMixture) else low
    fixed = torch.tensor([low], dtype=torch.float64)
    if is_gaussian(base):
        return ScaleMixtureDenoiser.of_gains(low, high, points) if high > low else ScaleMixtureDenoiser(fixed.square())
    if isinstance(base, Sparse):
        if high > low:
            return SpikeAndSlabMixtureDenoiser.of_gains(low, high, base.density, points)
        return SpikeAndSlabMixtureDenoiser(base.density, fixed.square() / base.density)
    if isinstance(base, Dale):
        return DaleDenoiser.of_gains(low, high, base, points) if high > low else DaleDenoiser(base, fixed)
    assert isinstance(base, LowRank)
    strength = base.strength / gain_rms
    if high > low:
        return SpikedDenoiser.of_gains(low, high, strength, base.rank)
    return SpikedDenoiser(fixed.square(), strength, base.rank)
