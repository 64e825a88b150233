"""Sweeps of Gibbs sampling that close a diffusion: draws of ensembles whose conditionals are known.

What is hard about a posterior over weights is its structure: which columns inhibit, which neurons are of one cluster,
which weights are there, along which factors. Diffusion finds it. Given structure the rest is standard, but a network
answers it to a per cent only, and what all weights have in common, such as an error of the gain, adds up: of 100
neurons draws in clusters came out 2 to 4 % too small, of a posterior spread of 3 %. So draws of an ensemble of
`neurosde.datasets.ensembles` take some sweeps of its Gibbs sampler, from where they are; where the ensemble is not told
each draw's own is drawn first, of what the network says given the draw. Each sweep leaves the exact posterior as it is.
(What weights do not say exactly, labels of clusters and factors, is drawn given them to begin with, in a few rounds.)
Connections, factors and clusters move with the rest; signs of columns stay as diffusion drew them, and so do draws of
other ensembles, and what only the network answers: means and densities.

References:
    Markov chains for exploring posterior distributions (Tierney, 1994), on hybrids of several kernels,
    https://doi.org/10.1214/aos/1176325750
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from neurosde.datasets.ensembles import (
    Block,
    Dale,
    Ensemble,
    Gaussian,
    LowRank,
    Sparse,
    base_of,
    make_ensemble,
)
from neurosde.models.analytic import COMPONENT_ENTRIES, uniform_gains
from neurosde.models.edm import Evidence
from neurosde.models.gibbs_chains import GibbsChains, LowRankChains, SparseChains
from neurosde.models.gibbs_clusters import ClusterChains
from neurosde.models.gibbs_dale import DaleChains

if TYPE_CHECKING:
    from neurosde.models.diffusion_prior import PriorConfig

_ON_A_GPU = 8  # times as many entries at a time, for it waits for kernels to be launched


def closed_as_trained(
    draws: Tensor,
    evidence: Evidence,
    config: PriorConfig,
    family: str | None,
    log_families: Callable[[Tensor], Tensor] | None,
    *,
    gain: float | None,
    generator: torch.Generator | None,
) -> Tensor:
    """Close draws by sweeps for the ensemble that a network was trained on, or for that of each draw.

    Args:
        draws: W, shape (..., post, pre).
        evidence: what the recording of each draw says, in units of W, shapes that expand to those of the draws.
        config: what the network was trained for.
        family: name of the ensemble, where it is told; a network of one ensemble is not told it.
        log_families: of W, the logarithm of the probability of each of the network's families, (..., family); without
            it draws of an untold ensemble stay as they are.
        gain: root mean square gain √(N E W²), where it is known.
        generator: on the device of the draws.

    Returns:
        W, shape (..., post, pre).
    """
    batch, N = draws.shape[:-2], draws.shape[-1]
    families = config.network.families
    if families and family is None:
        if log_families is None:
            return draws
        chances = log_families(draws).exp().reshape(-1, len(families))
        which = torch.multinomial(chances, 1, generator=generator).squeeze(-1)
    else:
        told = families.index(family) if families and family is not None else 0
        which = torch.full((batch.numel(),), told, device=draws.device)
    ensembles = []
    for name in families or (None,):
        kinds = [kind for kind in config.ensembles if name in (None, kind["name"])]
        ensembles.append(make_ensemble(**kinds[0]) if len(kinds) == 1 else None)
    flat = draws.reshape(-1, N, N)
    return closed(flat, evidence.expand(batch).flat(), ensembles, which, gain=gain, generator=generator).reshape(
        draws.shape
    )


def closed(
    draws: Tensor,
    evidence: Evidence,
    ensembles: Sequence[Ensemble | None],
    which: Tensor,
    *,
    gain: float | None = None,
    sweeps: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Move draws by sweeps of Gibbs sampling of the posteriors of their ensembles.

    Args:
        draws: W, shape (draw, post, pre).
        evidence: what the recording of each draw says, in units of W, shapes (draw, …).
        ensembles: of one gain or mixtures; None for one that is not known.
        which: index of the ensemble of each draw, shape (draw,).
        gain: root mean square gain √(N E W²), where it is known.
        sweeps: how many; by default 16, 2 for clusters, and 1 for Gaussian weights.
        generator: on the device of the draws.

    Returns:
        W, shape (draw, post, pre). Draws stay as they are where their ensemble is not known here, needs more neurons,
        or cannot have the gain that is told.
    """
    N, found = draws.shape[-1], draws.clone()
    for k, ensemble in enumerate(ensembles):
        own = (which == k).nonzero().squeeze(-1)
        if ensemble is None or not len(own):
            continue
        base = base_of(ensemble)
        copies = 14 + 9 * base.num_blocks if isinstance(base, Block) else 4  # of a matrix, in memory for each draw
        in_memory = COMPONENT_ENTRIES * (_ON_A_GPU if draws.is_cuda else 1)
        for some in own.split(max(1, in_memory // (copies * N**2 + 512 * N))):
            chains = _chains(draws[some], evidence[some], ensemble, gain, generator)
            if chains is not None:
                for _ in range(chains.enough if sweeps is None else sweeps):
                    found[some] = chains.sweep()
            del chains  # before the next ones are made
    return found


def _chains(
    draws: Tensor, evidence: Evidence, ensemble: Ensemble, gain: float | None, source: torch.Generator | None
) -> GibbsChains | None:
    base, N = base_of(ensemble), draws.shape[-1]
    needed = base.num_blocks if isinstance(base, Block) else 2 if isinstance(base, Dale) else 1
    if needed > N:
        return None
    gains = ensemble.gain_range
    if gain is not None:
        of_structure, of_gain = base.square_terms(N)
        if gain**2 <= of_structure:
            return None
        gains = (math.sqrt((gain**2 - of_structure) / of_gain),) * 2
    squares, log_chances = uniform_gains(*torch.tensor(gains, dtype=torch.float64))
    grid = squares.sqrt(), log_chances.exp()
    if isinstance(base, Dale):
        return DaleChains(base, *grid, evidence, source, draws)
    if isinstance(base, Sparse):
        return SparseChains(base.density, *grid, evidence, source, draws)
    if isinstance(base, Block):
        return ClusterChains(base, *grid, evidence, source, draws)
    if isinstance(base, LowRank):
        return LowRankChains(base.strength, base.rank, *grid, evidence, source, draws)
    return LowRankChains(0.0, 0, *grid, evidence, source) if isinstance(base, Gaussian) else None
