"""Tiny posteriors and recordings, for tests of what is done with them."""

import math
from dataclasses import replace

import torch

from neurosde.likelihood import transition_statistics
from neurosde.models.denoiser import PRESETS, PairNetwork
from neurosde.models.diffusion_cfg import CFGPosterior, PosteriorConfig
from neurosde.solve import simulate_rate_network

D = torch.float64
SIGMA, DT, GAIN = 0.3, 0.1, 1.2
FAMILIES = ("gaussian", "dale")


def network_of(trained=True, seed=0, **changes):
    """A tiny network in float64; "trained" is one whose zero weights are random instead."""
    config = replace(PRESETS["tiny"], families=FAMILIES, recordings=True, **changes)
    torch.manual_seed(seed)
    network = PairNetwork(config).double()
    if trained:
        for parameter in network.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.1)
    return network.eval()


def model_of(**options):
    network = network_of(**options)
    return CFGPosterior(network, PosteriorConfig(network.config, 1.5, (4, 20), gains=(0.3, 3.0)))


def recording_of(N=6, T=60, trials=2, seed=0, gain=GAIN):
    generator = torch.Generator().manual_seed(seed)
    W = gain / math.sqrt(N) * torch.randn(N, N, generator=generator, dtype=D)
    h0 = torch.randn(trials, N, generator=generator, dtype=D)
    x, h = simulate_rate_network(W, h0, T, DT, 1.0, noise_std=SIGMA, return_h=True, generator=generator)
    return W, x, transition_statistics(voltage=h, dt=DT)
