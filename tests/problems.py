"""Priors of weights in units of s₀ whose denoisers have a closed form, and seeded numbers, for tests of samplers."""

import torch

from neurosde.models import ScaleMixtureDenoiser, SpikeAndSlabDenoiser

D = torch.float64
GAUSSIAN = ScaleMixtureDenoiser(torch.ones(1))
DENSITY = 0.3
SLAB = 1 / DENSITY  # the variance of what is there, so that that of all weights is 1
SPARSE = SpikeAndSlabDenoiser(DENSITY, SLAB)


def source(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=D, generator=source(seed))


def number(s):
    return torch.tensor(s, dtype=D)
