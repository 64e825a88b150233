"""Exchanges of neurons between clusters given a recording, with weights summed over.

Weights tell their clusters so well that labels hardly move while weights are there, though the recording alone would
leave them open. Let rows of cluster k be of variances D_k, v p² with p larger within a cluster than between clusters,
and let the recording say U, λ and B: its directions, their eigenvalues, and its linear term along them. A row's B is
normal once weights are summed over, and in units in which no direction is huge, with h = 1/(1 + λ τ), τ = v p_in p_out,

    R = U √(λ h),   y = B √(h/λ),   S_k = Rᵀ D_k R + diag(h),
    log p(recording | labels) = −½ Σ_k (Σ_{i in k} y_iᵀ S_k⁻¹ y_i + n_k log |S_k|) + constant,

n_k being the neurons of k. Where neurons a of k and b of l exchange their labels, two entries of D_k and D_l change,
and one row of each cluster. So what any exchange makes of it is told by entries of R S_k⁻¹ Rᵀ, of y S_k⁻¹ Rᵀ for all
rows in each cluster and of sums of products of these, and those by updates of rank two once neurons are exchanged.

References:
    Updating the inverse of a matrix (Hager, 1989), https://doi.org/10.1137/1031049
    The collapsed Gibbs sampler in Bayesian computations with applications to a gene regulation problem (Liu, 1994),
    https://doi.org/10.1080/01621459.1994.10476829
    Informed proposals for local MCMC in discrete spaces (Zanella, 2020), https://doi.org/10.1080/01621459.2019.1585255
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from neurosde.models.edm import Evidence

_MOVES = 5  # attributes of `SummedLabels` that exchanges change, the first ones


class SummedLabels(NamedTuple):
    """Labels, and what tells how likely others are.

    Attributes:
        labels: shape (chain, neuron).
        overlaps: R S_k⁻¹ Rᵀ, shape (chain, cluster, pre, pre).
        pulls: y S_k⁻¹ Rᵀ of each row as if it were of each cluster, shape (chain, cluster, post, pre).
        squares: sum over the rows of each cluster of the outer products of their pulls, (chain, cluster, pre, pre).
        distances: yᵀ S_k⁻¹ y, shape (chain, cluster, post).
        step: by how much the variance of an entry is larger between clusters than within one, shape (chain,).
        sizes: of the clusters, shape (cluster,).
    """

    labels: Tensor
    overlaps: Tensor
    pulls: Tensor
    squares: Tensor
    distances: Tensor
    step: Tensor
    sizes: Tensor

    @classmethod
    def of(
        cls, labels: Tensor, evidence: Evidence, variance: Tensor, within: float, between: float, sizes: Tensor
    ) -> SummedLabels:
        """Begin at labels.

        Args:
            labels: shape (chain, neuron).
            evidence: what the recording of each chain says, in units of W, shapes (chain, …).
            variance: v, shape (chain,).
            within: p within a cluster.
            between: p between clusters.
            sizes: of the clusters, shape (cluster,).
        """
        seen = evidence.eigenvalues
        h = 1 / (1 + seen * (within * between * variance).unsqueeze(-1))
        vectors = torch.eye(seen.shape[-1], dtype=seen.dtype, device=seen.device)
        R = (vectors if evidence.vectors is None else evidence.vectors) * (seen * h).sqrt().unsqueeze(-2)
        y = evidence.cross * torch.where(seen > 0, (h / seen.clamp(min=1e-300)).sqrt(), 0.0).unsqueeze(-2)
        clusters = torch.arange(len(sizes), device=labels.device)
        of_cluster = labels.unsqueeze(1) == clusters.unsqueeze(-1)
        entries = (between**2 + (within**2 - between**2) * of_cluster.to(variance)) * variance[:, None, None]
        R, y = R.unsqueeze(1), y.unsqueeze(1)
        S = (R * entries.unsqueeze(-1)).mT @ R + torch.diag_embed(h).unsqueeze(1)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(S))
        pulls = y @ inverse @ R.mT
        squares = (pulls * of_cluster.unsqueeze(-1)).mT @ pulls
        distances = ((y @ inverse) * y).sum(-1)
        step = (between**2 - within**2) * variance
        return cls(labels.clone(), R @ inverse @ R.mT, pulls, squares, distances, step, sizes)

    def some(self, index: Tensor) -> SummedLabels:
        """Return those of some chains."""
        return self._replace(**{name: getattr(self, name)[index] for name in self._fields[:-1]})

    def offers(self, a: int) -> Tensor:
        """Return what the log-likelihood gains by exchanging neuron a with each, shape (chain, neuron).

        It is 0 with itself, and −∞ with the others of its cluster.
        """
        mine = self.labels[:, a : a + 1]
        cluster = torch.stack([mine.expand_as(self.labels), self.labels])  # that a leaves, and that it joins
        chain, b, leaves = self._index(cluster)
        delta = leaves * self.step.unsqueeze(-1)
        O_aa, O_ab, O_bb = (self.overlaps[chain, cluster, i, j] for i, j in ((a, a), (a, b), (b, b)))
        S_aa, S_ab, S_bb = (self.squares[chain, cluster, i, j] for i, j in ((a, a), (a, b), (b, b)))
        # Pulls of the rows a and b at the entries a and b.
        p_aa, p_ab, p_ba, p_bb = (self.pulls[chain, cluster, i, j] for i, j in ((a, a), (a, b), (b, a), (b, b)))
        S_aa = S_aa + leaves * (p_ba.square() - p_aa.square())
        S_ab = S_ab + leaves * (p_ba * p_bb - p_aa * p_ab)
        S_bb = S_bb + leaves * (p_bb.square() - p_ab.square())
        up, down = 1 + delta * O_aa, 1 - delta * O_bb
        determinant = up * down + (delta * O_ab).square()
        nearer = delta * (down * S_aa + 2 * delta * O_ab * S_ab - up * S_bb) / determinant
        rows = self.distances[chain, cluster, b] - self.distances[chain, cluster, a]
        change = 0.5 * (nearer - leaves * rows - self.sizes[cluster] * determinant.log()).sum(0)
        change = change.masked_fill(self.labels == mine, -math.inf)
        change[:, a] = 0.0
        return change

    def _index(self, cluster: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Chains (chain, 1), neurons (neuron,), and 1 where a leaves clusters and −1 where it joins them, (2, 1, 1)."""
        chains, N = self.labels.shape
        first = torch.arange(max(2, chains, N), device=cluster.device)
        return first[:chains, None], first[:N], (1 - 2 * first[:2])[:, None, None]

    def exchanged(self, a: int, b: Tensor) -> SummedLabels:
        """Return what is where neuron a of each chain has exchanged labels with b (chain,), of another cluster."""
        cluster = torch.stack([self.labels[:, a], self.labels.gather(-1, b.unsqueeze(-1)).squeeze(-1)])
        chain, _, leaves = self._index(cluster)
        chain = chain.squeeze(-1)
        labels = self.labels.clone()
        labels[:, a], labels[chain, b] = cluster[1], cluster[0]
        place = chain, cluster
        overlap, pull, square = (each[place] for each in (self.overlaps, self.pulls, self.squares))  # (2, chain, …)
        delta = leaves.squeeze(-1) * self.step
        columns = torch.stack([overlap[..., a], overlap[:, chain, :, b].transpose(0, 1)], -1)
        up, down = 1 + delta * overlap[..., a, a], 1 - delta * overlap[:, chain, b, b]
        cross = delta * overlap[:, chain, a, b]
        core = torch.stack([down, cross, cross, -up], -1) * (delta / (up * down + cross.square())).unsqueeze(-1)
        core = core.unflatten(-1, (2, 2))
        towards = columns @ core
        seen = torch.stack([pull[..., a], pull[:, chain, :, b].transpose(0, 1)], -1)
        gone, come = (row.unsqueeze(-1) * row.unsqueeze(-2) for row in (pull[..., a, :], pull[:, chain, b]))
        square = square + leaves.unsqueeze(-1) * (come - gone)
        square = square - towards @ torch.stack([square[..., a, :], square[:, chain, b]], -2)
        square = square - torch.stack([square[..., a], square[:, chain, :, b].transpose(0, 1)], -1) @ towards.mT
        return self._replace(
            labels=labels,
            overlaps=self.overlaps.index_put(place, overlap - towards @ columns.mT),
            pulls=self.pulls.index_put(place, pull - seen @ towards.mT),
            squares=self.squares.index_put(place, square),
            distances=self.distances.index_put(place, self.distances[place] - ((seen @ core) * seen).sum(-1)),
        )

    def drawn(self, gumbel: Tensor, log_uniform: Tensor) -> Tensor:
        """Offer each neuron once to exchange its label, in place, and return labels, which are a copy.

        One exchange, or to stay, is proposed as probable as it is, and accepted as Metropolis and Hastings say.

        Args:
            gumbel: standard Gumbel numbers, shape (neuron, chain, neuron).
            log_uniform: logarithms of uniform numbers, shape (neuron, chain).
        """
        for a in range(self.labels.shape[-1]):
            offers = self.offers(a)
            chosen = (offers + gumbel[a]).argmax(-1)
            moving = (chosen != a).nonzero().squeeze(-1)
            if not len(moving):
                continue
            there = self.some(moving).exchanged(a, chosen[moving])
            gain = offers[moving, chosen[moving]]
            log_ratio = offers[moving].logsumexp(-1) - gain - there.offers(a).logsumexp(-1)
            accepted = log_uniform[a, moving] < log_ratio
            for mine, new in zip(self[:_MOVES], there.some(accepted)[:_MOVES], strict=True):
                mine[moving[accepted]] = new
        return self.labels.clone()
