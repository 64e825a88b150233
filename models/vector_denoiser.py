"""The network of a diffusion over vectors: a residual perceptron whose normalisation is adapted by noise level and x.

Each block is h + γ ∘ MLP(LN(h) ∘ (1 + α) + β), where α, β and γ are linear in an embedding of (log s, x). The output
is 0 before training.

References:
    Scalable diffusion models with transformers (Peebles, Xie, 2022), adaptive normalisation,
    https://arxiv.org/abs/2212.09748
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, silu

FREQUENCIES = 16  # of the embedding of log s


class VectorDenoiser(nn.Module):
    """F(Z, s, x): a residual perceptron, normalised by what s and x say.

    Args:
        dim: entries of θ.
        features: entries of x.
        width: units of a layer.
        blocks: residual blocks.
        dropout: share of units left out in training.
    """

    frequencies: Tensor

    def __init__(self, dim: int, features: int, width: int, blocks: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.first = nn.Linear(dim + features, width)
        self.condition = nn.Sequential(
            nn.Linear(2 * FREQUENCIES + features, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
        )
        self.adapt = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(blocks))
        self.inner = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Dropout(dropout), nn.Linear(width, width))
            for _ in range(blocks)
        )
        self.last = nn.Linear(width, dim)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)
        self.register_buffer("frequencies", torch.linspace(0.2, 3, FREQUENCIES))

    def forward(self, z: Tensor, sigma: Tensor, x: Tensor) -> Tensor:
        """Return F, shape (row, dim), for z (row, dim), sigma (row,) and the standardised x (row, feature)."""
        angle = sigma.log().unsqueeze(-1) * self.frequencies
        c = self.condition(torch.cat([angle.sin(), angle.cos(), x], -1))
        h = self.first(torch.cat([z, x], -1))
        for adapt, inner in zip(self.adapt, self.inner, strict=True):
            scale, shift, gate = adapt(c).chunk(3, -1)
            h = h + gate * inner(layer_norm(h, h.shape[-1:]) * (1 + scale) + shift)
        out: Tensor = self.last(silu(h))
        return out
