"""What a recording and a noise level have made known of each weight, as features of the pair network.

Along the eigenvectors of Λ all weights onto a neuron are known alike, with the covariance C of `neurosde.models.edm`.
A structure such as sparseness, or the sign of a column, is one of single weights. So the network is told of each

    q = D₀_ij/√C_jj        the mean in units of what is uncertain about it, whatever the other weights are,
    b = (D₀ C⁻¹)_ij/√(C⁻¹)_jj    the same if all others were 0: the evidence of this weight alone,

of each neuron how well weights from it are known, C_jj and 1/(C⁻¹)_jj, and of each pair of them how far their weights
are known together only: the correlations of C and of C⁻¹. Each is invariant to the unit of W but through s and s₀.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from neurosde.models.edm import Folded

PAIR_FEATURES, NODE_FEATURES, OVERALL_FEATURES = 12, 4, 5
LOG_UNIT = 0.25  # logarithms of what is left of a variance reach from 0 down to about −20
FARTHEST = 8.0  # posterior standard deviations beyond which a weight is certainly not 0


@dataclass(frozen=True)
class Knowledge:
    """Features of a batch of matrices, in the dtype of the network.

    Attributes:
        pairs: shape (batch, feature, post, pre).
        nodes: shape (batch, neuron, feature).
        overall: shape (batch, feature).
        scores: q, shape (batch, post, pre).
        response: diag(C)^(−1/2) C^(1/2), shape (batch, pre, pre): from what a weight adds to the evidence to F.
    """

    pairs: Tensor
    nodes: Tensor
    overall: Tensor
    scores: Tensor
    response: Tensor


def knowledge_of(folded: Folded, sigma: Tensor, gain: Tensor, gain_known: Tensor, dtype: torch.dtype) -> Knowledge:
    """Return the features of matrices and recordings that have been folded.

    Args:
        folded: noisy matrices (batch, post, pre) and the evidence of a recording each.
        sigma: noise levels s, shape (batch,).
        gain: s₀√N, the gain that the unit of J stands for, shape (batch,).
        gain_known: whether the weights are known to have this gain, shape (batch,).
        dtype: of the features.
    """
    D0 = folded.posterior_mean
    v = folded.prior_variance
    C, K, root = folded.power(1.0), folded.power(-1.0), folded.power(0.5)
    variance, precision = C.diagonal(dim1=-2, dim2=-1), K.diagonal(dim1=-2, dim2=-1)
    sd = variance.sqrt().unsqueeze(-2)
    q = D0 / sd
    b = (D0 @ K) * precision.rsqrt().unsqueeze(-2)
    of_noise = 1 / (1 / v + 1 / sigma.square())  # variance of a weight if there were no recording
    known = LOG_UNIT * (variance / of_noise.unsqueeze(-1)).log()
    alone = -LOG_UNIT * (precision * of_noise.unsqueeze(-1)).log()
    wide = known.unsqueeze(-2).expand_as(D0), alone.unsqueeze(-2).expand_as(D0), sd.expand_as(D0)
    pairs = [
        torch.asinh(D0),
        torch.asinh(q),
        q.clamp(-FARTHEST, FARTHEST) / FARTHEST,
        (-q.square() / 8).exp(),
        torch.asinh(b),
        (-b.square() / 8).exp(),
        _correlation(C),
        _correlation(K),
        *wide,
        (-D0.square() * 2).exp(),
    ]
    spread = torch.log(folded.variances / of_noise.unsqueeze(-1)) * LOG_UNIT  # along the directions
    overall = [spread.mean(-1), spread.amin(-1), spread.amax(-1), gain.log(), gain_known.to(spread)]
    nodes = torch.stack([known, alone, sd.squeeze(-2).expand_as(known), known - alone], dim=-1)
    return Knowledge(
        torch.stack(torch.broadcast_tensors(*pairs), dim=1).to(dtype),
        nodes.to(dtype),
        torch.stack(torch.broadcast_tensors(*overall), dim=-1).to(dtype),
        q.to(dtype),
        (root / sd.mT).to(dtype),
    )


def _correlation(matrix: Tensor) -> Tensor:
    """Correlations off the diagonal, 0 on it; shape (..., pre, pre)."""
    scale = matrix.diagonal(dim1=-2, dim2=-1).rsqrt()
    found = scale.unsqueeze(-1) * matrix * scale.unsqueeze(-2)
    return found - torch.diag_embed(found.diagonal(dim1=-2, dim2=-1))
