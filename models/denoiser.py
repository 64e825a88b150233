"""The pair network: F of the diffusion (`neurosde.models.edm`), for matrices of any size.

Relabelling the neurons of its input, rows and columns alike, relabels its output. Its state is a feature vector for
every pair (post, pre), kept as (channel, batch, post, pre), and one for every neuron. A block

    1. gathers pairs into nodes: means over rows and columns, the diagonal, and the mean over all;
    2. lets nodes attend to one another, biased by the pairs between them, each by its own features of the edge;
    3. updates pairs from themselves, their transposes, their two nodes, the diagonal, and **products of matrices**,
       AB/√N, AᵀB/√N and ABᵀ/√N channel by channel: paths over a third neuron.

1 and 3 hold a basis of the linear maps between matrices that commute with relabelling. W is directed: nothing is made
symmetric. Noise level and number of neurons come in through adaptive normalisation.

A network of a posterior also sees how well each weight is known, `neurosde.models.knowledge`: what is known of two
presynaptic neurons together is a feature of their pair. It can answer in two places: with what is left unknown, as F
does, and with what each weight adds to the evidence, F = F₁ + F₂ diag(C)^(−1/2) C^(1/2), so that D = D₀ + F₂
diag(C)^(−1/2) C + ….

A network with thresholds also sees Z's parts of singular values above them, `neurosde.models.spectral`, and answers
with their share, too: what products of channels that are normalised entry by entry can only come near to.

References:
    Invariant and equivariant graph networks (Maron, Ben-Hamu, Shamir, Lipman, 2019), https://arxiv.org/abs/1812.09902
    Provably powerful graph networks (Maron, Ben-Hamu, Serviansky, Lipman, 2019), https://arxiv.org/abs/1905.11136
    Scalable diffusion models with transformers (Peebles, Xie, 2023), https://arxiv.org/abs/2212.09748
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from neurosde.models.knowledge import FARTHEST, NODE_FEATURES, OVERALL_FEATURES, PAIR_FEATURES, Knowledge
from neurosde.models.spectral import Spectrum, spectrum
from neurosde.validation import check_count, check_positive

Preset = Literal["tiny", "small", "deep", "spectral", "base"]
_SIGMA_FEATURES = 16
_LOG_SIGMA = (-7.0, 7.0)  # range of log s that the noise level's features cover


@dataclass(frozen=True)
class PairNetworkConfig:
    """Sizes of a pair network.

    Attributes:
        channels: features of a pair.
        products: channels that are multiplied as matrices, a multiple of 3.
        width: features of a node, a multiple of `heads`.
        heads: attention heads.
        blocks: number of blocks.
        families: names of the ensembles that it can be told apart by; empty where there is but one.
        recordings: whether it is conditioned on recordings.
        thresholds: of squared singular values of Z over N, above which Z's parts are features; none by default.
    """

    channels: int = 32
    products: int = 24
    width: int = 64
    heads: int = 4
    blocks: int = 4
    families: tuple[str, ...] = ()
    recordings: bool = False
    thresholds: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for name in ("channels", "products", "width", "heads", "blocks"):
            check_count(getattr(self, name), name)
        if self.products % 3 or self.width % self.heads:
            raise ValueError(
                f"products must be a multiple of 3, and width one of heads; got products = {self.products}, "
                f"width = {self.width}, heads = {self.heads}."
            )
        for threshold in self.thresholds:
            check_positive(threshold, "thresholds")


PRESETS: dict[str, PairNetworkConfig] = {
    "tiny": PairNetworkConfig(channels=16, products=12, width=32, heads=2, blocks=2),
    "small": PairNetworkConfig(),
    "deep": PairNetworkConfig(blocks=6),
    "spectral": PairNetworkConfig(blocks=6, thresholds=(2.5, 3.5, 4.2, 5.0, 6.5)),
    "base": PairNetworkConfig(channels=96, products=72, width=192, heads=8, blocks=6),
}


class PairNetwork(nn.Module):
    """F(Z, U; s, N), permutation-equivariant; of a posterior F(Z, U; s, N, Λ, B).

    Args:
        config: its sizes.
        checkpoint_above: matrices larger than this recompute each block's activations in the backward pass instead of
            keeping them.
    """

    def __init__(self, config: PairNetworkConfig, checkpoint_above: int = 128) -> None:
        super().__init__()
        self.config = config
        self.checkpoint_above = checkpoint_above
        C, width = config.channels, config.width
        self.condition = nn.Sequential(nn.Linear(_SIGMA_FEATURES + 1, width), nn.SiLU(), nn.Linear(width, width))
        self.family = nn.Embedding(len(config.families) + 1, width) if config.families else None  # 0: not told
        self.pairs = nn.Sequential(nn.Linear(5, 2 * C), nn.SiLU(), nn.Linear(2 * C, C))
        self.nodes = nn.Linear(9, width)
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.blocks))
        self.norm = _AdaptiveNorm(C, width)
        self.hidden = nn.Linear(C, C)
        self.output = nn.Linear(C, 3)
        nn.init.zeros_(self.output.weight)  # an untrained network is the Gaussian prior's denoiser
        nn.init.zeros_(self.output.bias)
        self.known = _Knowing(config) if config.recordings else None
        self.spectral = _Splitting(config) if config.thresholds else None

    def forward(
        self,
        z: Float[Tensor, "batch post pre"],
        u: Float[Tensor, "batch post pre"],
        log_sigma: Float[Tensor, " batch"],
        family: Int[Tensor, " batch"] | None = None,
        knowledge: Knowledge | None = None,
    ) -> Float[Tensor, "batch post pre"]:
        """Return F.

        Args:
            z: Z, the mean in units of its own spread under the prior, shape (batch, post, pre).
            u: D₀ C^(−1/2), the mean in units of what is uncertain about it, shape (batch, post, pre).
            log_sigma: log s, shape (batch,).
            family: 1 + index of the ensemble, or 0 where it is not told, shape (batch,).
            knowledge: what the recordings have made known, for a network that is conditioned on them.
        """
        return self.answer(z, u, log_sigma, family, knowledge, self.split(z))[0]

    def split(self, z: Tensor) -> Spectrum | None:
        """Return Z's parts above the thresholds, for a network that has some."""
        return spectrum(z, self.config.thresholds) if self.config.thresholds else None

    def answer(
        self,
        z: Tensor,
        u: Tensor,
        log_sigma: Tensor,
        family: Tensor | None,
        knowledge: Knowledge | None,
        split: Spectrum | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return F and, of a network that is conditioned on recordings, log p(family) of each, (batch, family)."""
        N = z.shape[-1]
        far = u.clamp(-FARTHEST, FARTHEST)
        entries = torch.stack([z, z.abs(), torch.asinh(u), far / FARTHEST, (-u.square() / 8).exp()])
        condition = self.condition(torch.cat([_sigma_features(log_sigma), _size_feature(N, log_sigma)], dim=-1))
        if self.family is not None:
            untold = torch.zeros(len(z), dtype=torch.long, device=z.device)
            condition = condition + self.family(untold if family is None else family)
        first, activation, second = self.pairs
        P, H = _linear(first, entries), self.nodes(_node_features(z))
        if self.known is not None and knowledge is not None:
            P = P + _map(self.known.pairs.weight, knowledge.pairs.transpose(0, 1))
            H = H + self.known.nodes(knowledge.nodes)
            condition = condition + self.known.overall(knowledge.overall)
        if self.spectral is not None and split is not None:
            parts = torch.cat([split.above, split.projections], dim=1).transpose(0, 1)
            P = P + _map(self.spectral.pairs.weight, parts)
            condition = condition + self.spectral.overall(torch.log1p(split.counts.clamp(min=0)))
        P = _linear(second, activation(P)).to(z.dtype)
        for block in self.blocks:
            if self.checkpoint_above < N and torch.is_grad_enabled():
                P, H = checkpoint(block, P, H, condition, use_reentrant=False)
            else:
                P, H = block(P, H, condition)
        hidden = functional.silu(_linear(self.hidden, self.norm(P, condition)))
        constant, near, scale = _linear(self.output, hidden)
        F = constant + near * far + scale * z
        if self.spectral is not None and split is not None:
            F = F + (_linear(self.spectral.output, hidden) * split.above.transpose(0, 1)).sum(0)
        if self.known is None or knowledge is None:
            return F, None
        constant, near = _linear(self.known.output, hidden)
        of_weights = constant + near * knowledge.scores.clamp(-FARTHEST, FARTHEST)
        return F + of_weights @ knowledge.response, self.known.log_families(H, condition)


class _Knowing(nn.Module):
    """What a network that is conditioned on recordings has beside that of a prior; untrained, it changes nothing."""

    def __init__(self, config: PairNetworkConfig) -> None:
        super().__init__()
        C, width = config.channels, config.width
        self.pairs = nn.Linear(PAIR_FEATURES, 2 * C, bias=False)
        self.nodes = nn.Linear(NODE_FEATURES, width, bias=False)
        self.overall = nn.Linear(OVERALL_FEATURES, width, bias=False)
        self.output = nn.Linear(C, 2)
        self.families = nn.Linear(2 * width, max(1, len(config.families)))
        for layer in self.children():
            for parameter in layer.parameters():
                nn.init.zeros_(parameter)

    def log_families(self, H: Tensor, condition: Tensor) -> Tensor:
        return self.families(torch.cat([H.mean(1), condition], dim=-1)).log_softmax(-1)


class _Splitting(nn.Module):
    """What a network with thresholds has beside one without; untrained, it changes nothing."""

    def __init__(self, config: PairNetworkConfig) -> None:
        super().__init__()
        C, count = config.channels, len(config.thresholds)
        self.pairs = nn.Linear(3 * count, 2 * C, bias=False)
        self.overall = nn.Linear(count, config.width, bias=False)
        self.output = nn.Linear(C, count)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)


class _AdaptiveNorm(nn.Module):
    """Layer norm over dimension 0; scale and shift depend on the condition of each of the batch, dimension 1."""

    def __init__(self, features: int, condition: int) -> None:
        super().__init__()
        self.modulation = nn.Linear(condition, 2 * features)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        modulation = self.modulation(functional.silu(condition))
        scale, shift = modulation.T.reshape(-1, len(condition), *(1,) * (x.ndim - 2)).to(x.dtype).chunk(2)
        centred = x - x.mean(0)
        inverse = (centred.square().mean(0) + 1e-5).rsqrt()
        reused = _reused(centred)
        normed = torch.mul(centred, inverse, out=reused)
        return torch.addcmul(shift, normed, 1 + scale, out=reused).to(modulation.dtype)


class _Block(nn.Module):
    def __init__(self, config: PairNetworkConfig) -> None:
        super().__init__()
        C, K, width = config.channels, config.products, config.width
        self.heads = config.heads
        self.pair_norm, self.node_norm = _AdaptiveNorm(C, width), _AdaptiveNorm(width, width)
        self.gather = nn.Linear(3 * C + width, 5 * width)  # q, k, v and 2·width hidden units
        self.overall = nn.Linear(2 * C + width, 5 * width, bias=False)
        self.spread = nn.Linear(3 * width, width)
        self.factors = nn.Linear(C, 2 * K + config.heads)  # A, B, and the attention's bias
        self.own, self.other = nn.Linear(C, 2 * C, bias=False), nn.Linear(C, 2 * C, bias=False)
        self.paths = nn.Linear(K, 2 * C, bias=False)
        self.ends = nn.Linear(width, 6 * C)
        self.update = nn.Linear(C, C)

    def forward(self, P: Tensor, H: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        normed = self.pair_norm(P, condition)
        K = self.paths.in_features
        A, B, bias = _linear(self.factors, normed).split([K, K, self.heads])
        nodes = self.node_norm(H.movedim(-1, 0), condition).movedim(0, -1)
        H = H + self._nodes(normed, nodes, bias.transpose(0, 1))
        weight = torch.cat([self.own.weight, self.other.weight, self.paths.weight / math.sqrt(len(P[0, 0]))], dim=1)
        hidden = _map(weight, torch.cat([normed, normed.mT, *_products(A, B)]))
        post, pre, loop = self.ends(H).movedim(-1, 0).contiguous().chunk(3)
        hidden.add_(post.unsqueeze(3)).add_(pre.unsqueeze(2))
        hidden.diagonal(dim1=2, dim2=3).add_(loop)
        gate, value = hidden.chunk(2)
        gate = functional.silu(gate, inplace=not torch.is_grad_enabled())
        return P + _linear(self.update, torch.mul(gate, value, out=_reused(gate))), H

    def _nodes(self, pairs: Tensor, nodes: Tensor, bias: Tensor) -> Tensor:
        ends = pairs.mean(3), pairs.mean(2), pairs.diagonal(dim1=2, dim2=3)
        rows, columns, loops = (one.movedim(0, -1) for one in ends)
        features = self.gather(torch.cat([rows, columns, loops, nodes], dim=-1))
        everything = torch.cat([rows.mean(1), loops.mean(1), nodes.mean(1)], dim=-1)
        features = features + self.overall(everything).unsqueeze(1)
        width = nodes.shape[-1]
        q, k, v, hidden = features.split([width, width, width, 2 * width], dim=-1)
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (q, k, v))
        attended = functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.spread(torch.cat([attended.transpose(1, 2).flatten(2), functional.silu(hidden)], dim=-1))


def _reused(tensor: Tensor) -> Tensor | None:
    """Where to put a result in place of a tensor that is of no more use, unless a gradient needs it."""
    return None if torch.is_grad_enabled() else tensor


def _products(A: Tensor, B: Tensor) -> list[Tensor]:
    """AB, AᵀB and ABᵀ of a third of the channels each; shape (channel, batch, post, pre)."""
    (A0, A1, A2), (B0, B1, B2) = A.chunk(3), B.chunk(3)
    return [A0 @ B0, A1.mT @ B1, A2 @ B2.mT]


def _linear(layer: nn.Module, pairs: Tensor) -> Tensor:
    """Apply nn.Linear to pairs, shape (channel, batch, post, pre)."""
    weight, bias = layer.parameters()
    return _map(weight, pairs).add_(bias.view(-1, 1, 1, 1))


def _map(weight: Tensor, pairs: Tensor) -> Tensor:
    return (weight @ pairs.flatten(1)).unflatten(1, pairs.shape[1:])


def _sigma_features(log_sigma: Tensor) -> Tensor:
    """Bumps along log s, shape (batch, feature)."""
    low, high = _LOG_SIGMA
    centres = torch.linspace(low, high, _SIGMA_FEATURES, device=log_sigma.device, dtype=log_sigma.dtype)
    width = (high - low) / (_SIGMA_FEATURES - 1)
    return (-0.5 * ((log_sigma.unsqueeze(-1) - centres) / width).square()).exp()


def _size_feature(N: int, like: Tensor) -> Tensor:
    return torch.full_like(like, math.log(N / 30)).unsqueeze(-1)


def _node_features(z: Tensor) -> Tensor:
    """What rows and columns sum to, as deviations in units of what independent standard normal entries show."""
    N = z.shape[-1]
    root = math.sqrt(N)
    square = z.square()
    sums = [z.mean(2) * root, z.mean(1) * root, z.diagonal(dim1=1, dim2=2)]
    squares = [(square.mean(2) - 1) * root, (square.mean(1) - 1) * root]
    total = [z.mean((1, 2)) * N, (square.mean((1, 2)) - 1) * N]
    nodes = torch.asinh(torch.stack(sums + squares, dim=-1))
    level = square.mean((1, 2)).add(1e-6).log().view(-1, 1, 1).expand(-1, N, 1)
    trace = z.diagonal(dim1=1, dim2=2).mean(1).view(-1, 1, 1).expand(-1, N, 1) * root
    overall = torch.asinh(torch.stack(total, dim=-1)).unsqueeze(1).expand(-1, N, -1)
    return torch.cat([nodes, overall, level, trace], dim=-1)
