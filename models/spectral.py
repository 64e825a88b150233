"""Features of a matrix's singular values: its part above a threshold, and what projects onto it.

Low-rank structure stands out of a random background by its singular values: of an N × N matrix Z whose entries are
independent and of unit variance those of M = ZZᵀ/N fill [0, 4]. With S a smoothed step of M at a threshold c, and
S′ the same of ZᵀZ/N, the features are S Z, √N S, √N S′ and the number of singular values above, tr S. All commute with
relabelling, and with any rotation.

S is a polynomial of M, by purification: 3S² − 2S³ has the fixed points 0 and 1 and drives all between them there. From
S = ½ + (M − c)/(2L), L ≥ |M − c|, `SHARPENINGS` of them make a step whose slope at c is 1.5^SHARPENINGS/(2L).

References:
    Some recent advances in density matrix theory (McWeeny, 1960), purification,
    https://doi.org/10.1103/RevModPhys.32.335
    The singular values and vectors of low rank perturbations of large rectangular random matrices (Benaych-Georges,
    Nadakuditi, 2012), https://arxiv.org/abs/1103.2221
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

SHARPENINGS = 14


@dataclass(frozen=True)
class Spectrum:
    """Features of a batch of matrices at several thresholds.

    Attributes:
        above: S Z, shape (batch, threshold, post, pre).
        projections: √N S and √N S′, shape (batch, 2 · threshold, neuron, neuron).
        counts: tr S, shape (batch, threshold).
    """

    above: Tensor
    projections: Tensor
    counts: Tensor


def spectrum(Z: Tensor, thresholds: tuple[float, ...]) -> Spectrum:
    """Return the features of matrices.

    Args:
        Z: shape (batch, post, pre).
        thresholds: c, of squared singular values over N.
    """
    N = Z.shape[-1]
    M = torch.stack([Z @ Z.mT, Z.mT @ Z], dim=1).unsqueeze(2) / N  # (batch, side, 1, neuron, neuron)
    c = torch.tensor(thresholds, dtype=Z.dtype, device=Z.device).view(-1, 1, 1)
    largest = torch.maximum(M.square().sum((-1, -2), keepdim=True).sqrt() - c, c)  # no eigenvalue is above |M|
    unit = torch.eye(N, dtype=Z.dtype, device=Z.device)
    S = 0.5 * unit + (M - c * unit) / (2 * largest)
    for _ in range(SHARPENINGS):
        square = S @ S
        S = 3 * square - 2 * square @ S
    above = S[:, 0] @ Z.unsqueeze(1)
    counts = S[:, 0].diagonal(dim1=-2, dim2=-1).sum(-1)
    return Spectrum(above, math.sqrt(N) * S.flatten(1, 2), counts)
