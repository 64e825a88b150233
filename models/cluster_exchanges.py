"""Exchanges of neurons between clusters given a recording, with weights summed over.

Weights tell their clusters so well that labels hardly move while weights are there, though the recording alone would
leave them open. With W_ij ~ N(0, v p_ij²), where p is larger within a cluster than between clusters, rows of cluster k
have the posterior precision A_k = Λ + diag(1/(v p²)). Labels have the likelihood

    log p(recording | labels) = ½ Σ_k (Σ_{i in k} b_iᵀ A_k⁻¹ b_i − n_k log |A_k|) + constant

with b_i the row of B and n_k the neurons of k. Where neurons a of k and b of l exchange their labels, two entries of
the diagonals of A_k and A_l change, and one row of each. So what any exchange makes of it is told by entries of A_k⁻¹,
of the posterior means of all rows in each cluster and of the sums of their squares, and those by updates of rank two
once neurons are exchanged.

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

_MOVES = 5  # attributes of `SummedLabels` that exchanges change, the first ones


class SummedLabels(NamedTuple):
    """Labels, and what tells how likely others are.

    Attributes:
        labels: shape (chain, neuron).
        covariance: A_k⁻¹, shape (chain, cluster, pre, pre).
        means: of each row as if it were of each cluster, shape (chain, cluster, post, pre).
        squares: sum over the rows of each cluster of the outer products of their means, (chain, cluster, pre, pre).
        explained: b_iᵀ A_k⁻¹ b_i, shape (chain, cluster, post).
        step: by how much the precision of an entry is larger between clusters than within one, shape (chain,).
        sizes: of the clusters, shape (cluster,).
    """

    labels: Tensor
    covariance: Tensor
    means: Tensor
    squares: Tensor
    explained: Tensor
    step: Tensor
    sizes: Tensor

    @classmethod
    def of(
        cls,
        labels: Tensor,
        precision: Tensor,
        linear: Tensor,
        variance: Tensor,
        within: float,
        between: float,
        sizes: Tensor,
    ) -> SummedLabels:
        """Begin at labels.

        Args:
            labels: shape (chain, neuron).
            precision: Λ along the neurons, shape (chain, pre, pre).
            linear: B along the neurons, shape (chain, post, pre).
            variance: v, shape (chain,).
            within: p within a cluster.
            between: p between clusters.
            sizes: of the clusters, shape (cluster,).
        """
        clusters = torch.arange(len(sizes), device=labels.device)
        of_cluster = labels.unsqueeze(1) == clusters.unsqueeze(-1)
        entries = (between**-2 + (within**-2 - between**-2) * of_cluster.to(variance)) / variance[:, None, None]
        A = precision.unsqueeze(1) + torch.diag_embed(entries)
        covariance = torch.cholesky_inverse(torch.linalg.cholesky(A))
        means = linear.unsqueeze(1) @ covariance
        squares = (means * of_cluster.unsqueeze(-1)).mT @ means
        explained = (means * linear.unsqueeze(1)).sum(-1)
        step = (between**-2 - within**-2) / variance
        return cls(labels.clone(), covariance, means, squares, explained, step, sizes)

    def some(self, index: Tensor) -> SummedLabels:
        """Return those of some chains."""
        return self._replace(**{name: getattr(self, name)[index] for name in self._fields[:-1]})

    def offers(self, a: int) -> Tensor:
        """Return what the log-likelihood gains by exchanging neuron a with each, 0 with itself, (chain, neuron)."""
        mine = self.labels[:, a : a + 1]
        cluster = torch.stack([mine.expand_as(self.labels), self.labels])  # that a leaves, and that it joins
        chain, b, leaves = self._index(cluster)
        delta = leaves * self.step.unsqueeze(-1)
        C_aa, C_ab, C_bb = (self.covariance[chain, cluster, i, j] for i, j in ((a, a), (a, b), (b, b)))
        S_aa, S_ab, S_bb = (self.squares[chain, cluster, i, j] for i, j in ((a, a), (a, b), (b, b)))
        # Means of the rows a and b at the entries a and b.
        m_aa, m_ab, m_ba, m_bb = (self.means[chain, cluster, i, j] for i, j in ((a, a), (a, b), (b, a), (b, b)))
        S_aa = S_aa + leaves * (m_ba.square() - m_aa.square())
        S_ab = S_ab + leaves * (m_ba * m_bb - m_aa * m_ab)
        S_bb = S_bb + leaves * (m_bb.square() - m_ab.square())
        up, down = 1 + delta * C_aa, 1 - delta * C_bb
        determinant = up * down + (delta * C_ab).square()
        lost = delta * (down * S_aa + 2 * delta * C_ab * S_ab - up * S_bb) / determinant
        rows = self.explained[chain, cluster, b] - self.explained[chain, cluster, a]
        change = 0.5 * (leaves * rows - lost - self.sizes[cluster] * determinant.log()).sum(0)
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
        C, M, S = (each[chain, cluster] for each in (self.covariance, self.means, self.squares))  # (2, chain, …)
        delta = leaves.squeeze(-1) * self.step
        columns = torch.stack([C[..., a], C[:, chain, :, b].transpose(0, 1)], -1)
        up, down, cross = 1 + delta * C[..., a, a], 1 - delta * C[:, chain, b, b], delta * C[:, chain, a, b]
        core = torch.stack([down, cross, cross, -up], -1) * (delta / (up * down + cross.square())).unsqueeze(-1)
        core = core.unflatten(-1, (2, 2))
        towards = columns @ core
        seen = torch.stack([M[..., a], M[:, chain, :, b].transpose(0, 1)], -1)
        gone, come = (row.unsqueeze(-1) * row.unsqueeze(-2) for row in (M[..., a, :], M[:, chain, b]))
        S = S + leaves.unsqueeze(-1) * (come - gone)
        S = S - towards @ torch.stack([S[..., a, :], S[:, chain, b]], -2)
        S = S - torch.stack([S[..., a], S[:, chain, :, b].transpose(0, 1)], -1) @ towards.mT
        place = chain, cluster
        return self._replace(
            labels=labels,
            covariance=self.covariance.index_put(place, C - towards @ columns.mT),
            means=self.means.index_put(place, M - seen @ towards.mT),
            squares=self.squares.index_put(place, S),
            explained=self.explained.index_put(place, self.explained[place] - ((seen @ core) * seen).sum(-1)),
        )

    def drawn(self, gumbel: Tensor, log_uniform: Tensor) -> Tensor:
        """Offer each neuron once to exchange its label, and return labels.

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
        return self.labels
