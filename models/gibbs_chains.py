"""Gibbs samplers of posteriors over weights: many chains side by side, each given its own recording.

See `neurosde.models.exact_posterior` for the conditionals, and `neurosde.models.gibbs_dale` and
`neurosde.models.gibbs_clusters` for more of them. Chains begin anywhere, or at given weights: what only the weights
tell, such as factors, is then drawn given these.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from neurosde.models.edm import Evidence
from neurosde.models.eigen import eigh_of_many
from neurosde.models.gaussian_posterior import gaussian_log_evidence

_ROUNDS = 10  # in which factors are drawn given weights


class GibbsChains(ABC):
    """Chains side by side, one for each row of the evidence, whose gain is one of a grid.

    Args:
        gains: of the grid, shape (component,).
        chances: their probabilities, up to a factor, shape (component,).
        evidence: of the recording of each chain, in units of W, shapes (chain, …).
        source: generator.

    Attributes:
        enough: sweeps after which what an error of the gain was is gone: one or two where W is summed over in it.
        mean: of chains that `exact_posterior` takes, the mean of W given what else the last sweep drew.
    """

    enough = 16
    mean: Tensor

    def __init__(self, gains: Tensor, chances: Tensor, evidence: Evidence, source: torch.Generator | None) -> None:
        device = evidence.cross.device
        self.evidence, self.source = evidence, source
        self.gains, self.log_chances = gains.to(device), chances.log().to(device)
        # Beginning anywhere in the range: chains that have not mixed differ.
        self.component = torch.randint(len(gains), (len(evidence.cross),), generator=source, device=device)

    @property
    def cross(self) -> Tensor:
        """B of each chain, along the directions."""
        return self.evidence.cross

    @abstractmethod
    def sweep(self) -> Tensor:
        """Draw all once more, and return W (chain, post, pre)."""

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.source, dtype=torch.float64, device=self.cross.device)

    def _uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.source, dtype=torch.float64, device=self.cross.device)

    def _draw_gain(self, log_likelihood: Tensor) -> None:
        """Draw the component of the gain, given log p(rest | gain) (chain, component)."""
        p = (self.log_chances + log_likelihood).softmax(-1)
        self.component = torch.multinomial(p, 1, generator=self.source).squeeze(-1)

    def _draw_gain_of_weights(self, number: Tensor | int, square: Tensor) -> None:
        """Draw the gain given weights that are in proportion to it.

        Args:
            number: how many there are, shape () or (chain,).
            square: sum of their squares, each over its variance at gain 1, shape (chain,).
        """
        count = torch.as_tensor(number, device=square.device).unsqueeze(-1)
        self._draw_gain(-count * self.gains.log() - 0.5 * square.unsqueeze(-1) / self.gains.square())

    def _move_together(self, W: Tensor, precision: Tensor, linear: Tensor) -> Tensor:
        """Draw gain and weights along c g, c W, and return the weights.

        Given the gain weights are many, and tell it well: each alone hardly moves. Along these the density of weights
        given the gain and the change of volume cancel, so that the gains of the grid are as probable as their own
        chances and the likelihood of c W say.

        Args:
            W: weights that are in proportion to the gain, shape (chain, post, pre).
            precision: Λ along the neurons, shape (chain, pre, pre).
            linear: B along the neurons, shape (chain, post, pre).
        """
        a, b = ((W @ precision) * W).sum((-1, -2)), (linear * W).sum((-1, -2))
        before = self.gains[self.component].unsqueeze(-1)
        c = self.gains / before
        self._draw_gain((c - 1) * (b.unsqueeze(-1) - a.unsqueeze(-1) * (c + 1) / 2))
        return W * (self.gains[self.component].unsqueeze(-1) / before).unsqueeze(-1)


class LowRankChains(GibbsChains):
    """Low-rank weights, and Gaussian ones, which are of rank 0 and whose draws are independent.

    Args:
        strength: of the structure.
        rank: of the structure.
        gains, chances, evidence, source: as of `GibbsChains`.
        weights: W to begin at, shape (chain, post, pre).
    """

    def __init__(
        self,
        strength: float,
        rank: int,
        gains: Tensor,
        chances: Tensor,
        evidence: Evidence,
        source: torch.Generator | None,
        weights: Tensor | None = None,
    ) -> None:
        super().__init__(gains, chances, evidence, source)
        self.enough = 16 if rank else 1
        chains, N = self.cross.shape[:2]
        self.c = strength / math.sqrt(rank * N) if rank else 0.0
        self.variances = self.gains.square() / N
        self.factors = 1 + self.variances.unsqueeze(-1) * evidence.eigenvalues.unsqueeze(-2)  # (chain, component, k)
        self.of_gain = gaussian_log_evidence(evidence, self.variances)
        self.n = self._normal(chains, N, rank)  # along the directions
        self.m = self._normal(chains, N, rank)
        if weights is not None and self.c:
            self._begin_at(weights if evidence.vectors is None else weights @ evidence.vectors)

    def sweep(self) -> Tensor:
        """Draw gains and factors with W summed over, then W given them."""
        precision = self.evidence.eigenvalues
        structure = self.c * self.m @ self.n.mT
        linear = (self.cross * structure).sum(-2) - 0.5 * precision * structure.square().sum(-2)
        self._draw_gain(self.of_gain + (linear.unsqueeze(-2) / self.factors).sum(-1))
        v = self.variances[self.component]
        factor = 1 + v.unsqueeze(-1) * precision
        weight, seen = precision / factor, self.cross / factor.unsqueeze(-2)
        if self.c:
            weighted = weight.unsqueeze(-1) * self.n
            self.m = self._factor(self.c**2 * (self.n.mT @ weighted).unsqueeze(-3), self.c * seen @ self.n)
            each = self.c**2 * weight[..., None, None] * (self.m.mT @ self.m).unsqueeze(-3)
            self.n = self._factor(each, self.c * seen.mT @ self.m)
            structure = self.c * self.m @ self.n.mT
        variance = 1 / (precision + 1 / v.unsqueeze(-1))
        mean = (self.cross + structure / v[:, None, None]) * variance.unsqueeze(-2)
        W = mean + variance.sqrt().unsqueeze(-2) * self._normal(*mean.shape)
        vectors = self.evidence.vectors
        self.mean = mean if vectors is None else mean @ vectors.mT
        return W if vectors is None else W @ vectors.mT

    def _begin_at(self, W: Tensor) -> None:
        """Draw factors given weights along the directions: from their largest singular values on."""
        some, size = min(self.m.shape[-1], W.shape[-1]), W.shape[-2:].numel()
        squares, left_vectors = eigh_of_many(W @ W.mT)
        squares = squares[:, -some:].maximum(1e-24 * squares[:, -1:]).clamp(min=1e-200)
        root = (squares.sqrt() * self.c).sqrt().unsqueeze(-2)
        self.m[..., :some] = left_vectors[..., -some:] * root / self.c
        self.n[..., :some] = W.mT @ left_vectors[..., -some:] / root
        for _ in range(_ROUNDS):
            left = (W - self.c * self.m @ self.n.mT).square().sum((-1, -2)).unsqueeze(-1)
            self._draw_gain(-0.5 * (size * self.variances.log() + left / self.variances))
            over = self.c / self.variances[self.component][:, None, None]
            self.m = self._factor((self.c * over * self.n.mT @ self.n).unsqueeze(-3), over * W @ self.n)
            self.n = self._factor((self.c * over * self.m.mT @ self.m).unsqueeze(-3), over * W.mT @ self.m)

    def _factor(self, precision: Tensor, linear: Tensor) -> Tensor:
        """Draw rows of precision I + `precision` (chain, row or 1, r, r) and linear term (chain, row, r)."""
        rank = linear.shape[-1]
        L = torch.linalg.cholesky(precision + torch.eye(rank, dtype=linear.dtype, device=linear.device))
        L = L.expand(*linear.shape, rank)
        half = torch.linalg.solve_triangular(L, linear.unsqueeze(-1), upper=False) + self._normal(*linear.shape, 1)
        return torch.linalg.solve_triangular(L.mT, half, upper=True).squeeze(-1)


class SparseChains(GibbsChains):
    """Sparse weights: one presynaptic neuron after the other, all rows at once.

    Args:
        density: probability of a connection.
        gains, chances, evidence, source: as of `GibbsChains`.
        weights: W to begin at, shape (chain, post, pre), with zeros where there is no connection.
    """

    def __init__(
        self,
        density: float,
        gains: Tensor,
        chances: Tensor,
        evidence: Evidence,
        source: torch.Generator | None,
        weights: Tensor | None = None,
    ) -> None:
        super().__init__(gains, chances, evidence, source)
        N = evidence.cross.shape[-1]
        self.precision, self.linear = evidence.along_neurons()
        self.variances = self.gains.square() / (N * density)
        self.log_odds = math.log(density) - math.log1p(-density) if density < 1 else math.inf
        if weights is None:  # half of the chains begin without connections, half with all of them
            prior = self.variances[self.component][:, None, None].sqrt() * self._normal(*self.linear.shape)
            self.W = prior * (torch.arange(len(prior), device=prior.device) % 2)[:, None, None]
        else:
            self.W = weights.clone()
            self._draw_gain_given()

    def sweep(self) -> Tensor:
        """Draw gains with all weights, weights one by one, then gains given them."""
        self.W = self._move_together(self.W, self.precision, self.linear)
        self.residual = self.linear - self.W @ self.precision  # so that rounding does not add up
        v = self.variances[self.component].unsqueeze(-1)
        mean = torch.empty_like(self.W)
        N = self.W.shape[-1]
        normal, uniform = self._normal(N, *self.W.shape[:2]), self._uniform(N, *self.W.shape[:2])
        for j in range(N):
            precision = self.precision[:, j, j].unsqueeze(-1)
            r = self.residual[..., j] + self.W[..., j] * precision
            variance = 1 / (precision + 1 / v)
            log_odds = self.log_odds + 0.5 * (variance / v).log() + 0.5 * r.square() * variance
            exists = torch.sigmoid(log_odds)
            mean[..., j] = exists * variance * r
            drawn = torch.where(uniform[j] < exists, variance * r + variance.sqrt() * normal[j], 0.0)
            self.residual -= (drawn - self.W[..., j]).unsqueeze(-1) * self.precision[:, j].unsqueeze(-2)
            self.W[..., j] = drawn
        self._draw_gain_given()
        self.mean = mean
        return self.W

    def _draw_gain_given(self) -> None:
        at_one = self.variances[0] / self.gains[0].square()
        self._draw_gain_of_weights((self.W != 0).sum((-1, -2)), self.W.square().sum((-1, -2)) / at_one)
