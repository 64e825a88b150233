"""What draws leave open: weights that are smaller than a sampler tells.

Diffusion ends at a finite noise level, σ_min. What it leaves of a weight below a few σ_min is next to chance: whether
the weight is there at all, and its sign. Where the ensemble says so, it is decided here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from neurosde.datasets.ensembles import ENSEMBLES, Dale, Sparse
from neurosde.models.edm import SIGMA_MIN

if TYPE_CHECKING:
    from neurosde.models.diffusion_prior import PriorConfig

RESOLUTION = 5 * SIGMA_MIN  # below which a weight of a draw is not told from 0, in J units
MOVED = 12 * SIGMA_MIN  # below which weights of draws are not where they should be


def resolved(J: Tensor, config: PriorConfig, family: str | None, generator: torch.Generator | None) -> Tensor:
    """Give weights that are too small to be told from 0 what their ensemble has there: zeros, or signs.

    Args:
        J: draws in the unit of the network, shape (draw, ..., post, pre).
        config: what the network was trained for.
        family: name of the ensemble, where it is known; a network of one ensemble is not told it.
        generator: of weak weights among zeros.
    """
    if may_be_sparse(config, family):
        return with_exact_zeros(J, generator)
    known = {family} if config.network.families else {kind["name"] for kind in config.ensembles}
    return with_one_sign(J) if known == {Dale.name} else J


def may_be_sparse(config: PriorConfig, family: str | None) -> bool:
    """Whether exact zeros may be among weights: a network has seen some, and is not told that they are of another kind.

    Args:
        config: what a network was trained for.
        family: name of the ensemble, where it is known; a network of one ensemble is not told it.
    """
    told = family if config.network.families else None
    return config.sparse and (told == Sparse.name or told not in ENSEMBLES)


def with_exact_zeros(J: Tensor, generator: torch.Generator | None) -> Tensor:
    """Give weights that are too small to be told from 0 their law, in matrices that have many of them.

    A denoiser leaves next to nothing of a weight below 5 σ_min, be it of no connection or of a weak one, and moves
    those below 12 σ_min. Likelihoods are flat over so small a range, and no recording tells which is which. Those below
    5 σ_min are made weak ones, uniform between −5 σ_min and 5 σ_min, with the probability that makes non-zero weights
    as dense below 12 σ_min as between 12 and 36 σ_min in all draws of the same network; else they are 0.

    Args:
        J: draws in the unit of the network, shape (draw, ..., post, pre).
        generator: of the weak ones.
    """
    drawn, size = (0, -2, -1), J.abs()
    small = size < RESOLUTION
    small &= small.double().mean((-1, -2), keepdim=True) > 0.05
    sparse = small.any(-1, keepdim=True).any(-2, keepdim=True)
    beside = (sparse & (size >= MOVED) & (size < 3 * MOVED)).sum(drawn, keepdim=True)
    found = (sparse & (size >= RESOLUTION) & (size < MOVED)).sum(drawn, keepdim=True)
    share = (beside / 2 - found).clamp(min=0) / small.sum(drawn, keepdim=True).clamp(min=1)
    chance, value = torch.rand(2, *J.shape, generator=generator, dtype=J.dtype, device=J.device)
    return torch.where(small, torch.where(chance < share, RESOLUTION * (2 * value - 1), 0.0), J)


def with_one_sign(J: Tensor) -> Tensor:
    """Give weights below 5 σ_min the sign of their column's sum.

    Args:
        J: draws in the unit of the network, shape (..., post, pre).
    """
    sign = torch.where(J.sum(-2, keepdim=True) < 0, -1.0, 1.0)
    return torch.where(J.abs() < RESOLUTION, sign * J.abs(), J)
