"""Priors of weights in units of s₀ whose denoisers have a closed form, numbers and devices, for tests of samplers."""

import pytest
import torch

from neurosde.models import ScaleMixtureDenoiser, SpikeAndSlabDenoiser

D = torch.float64
ON_A_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICES = ["cpu", pytest.param("cuda", marks=ON_A_GPU)]
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
