"""Denoiser of low-rank structure in a random background of unknown gain, by Gibbs sampling.

The prior, in the units of the diffusion, is that of `neurosde.datasets.ensembles.LowRank`:

    J = √v_k z + c m nᵀ,    c = b/√r,    z (N, N), m (N, r), n (N, r) iid standard normal,    k with probability p_k.

At finite N nothing but the conditionals is known in closed form. Let x = J + s ε, τ_k = v_k + s² and, in the basis in
which nᵀn is diagonal with entries λ_q, y = x n. With m integrated out, and then given k,

    log p(x | n, k) = −½ [N (N − r) log τ_k + Σ_q N log(τ_k + c²λ_q) + (|x|² − Σ_q c²|y_q|²/(τ_k + c²λ_q))/τ_k],
    m_q | n, k, x ~ N(c y_q/(τ_k + c²λ_q), τ_k/(τ_k + c²λ_q)),
    E[J | n, x] = Σ_k p(k | n, x) [v_k/τ_k x + s²/τ_k c² Σ_q y_q n_qᵀ/(τ_k + c²λ_q)].

Each half sweep draws k and m given n, the next k and n given m (on xᵀ), and both averages are kept (Rao–Blackwell). The
likelihood leaves |m_q|/|n_q| open, and so does the average: a move along it was tried and gained nothing.

References:
    The singular values and vectors of low rank perturbations of large rectangular random matrices (Benaych-Georges,
    Nadakuditi, 2012), where structure stands out of the background, b²N > rτ, https://arxiv.org/abs/1103.2221
    Sampling-based approaches to calculating marginal densities (Gelfand, Smith, 1990), averages of conditional means,
    https://doi.org/10.1080/01621459.1990.10476213
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from neurosde.models.analytic import gain_quadrature, mixture
from neurosde.models.eigen import eigh_of_many
from neurosde.validation import check_count, check_positive


class SpikedDenoiser:
    """Low-rank structure in a Gaussian background whose variance is one of several.

    Args:
        variances: v_k of the background, shape (component,).
        strength: b, standard deviation of an entry of the structure.
        rank: r of the structure.
        probabilities: p_k, shape (component,); by default equal.
        chains: independent Gibbs chains for each matrix, half from the prior, half from the singular vectors of W_s.
        burn_in: sweeps of each that are left out.
        sweeps: sweeps of each that are averaged.
        seed: of the chains; the same at each call, so that the denoiser is a function.

    Raises:
        ValueError: an argument out of range, or fewer than two chains (the error is told from their differences).
    """

    def __init__(
        self,
        variances: Tensor,
        strength: float,
        rank: int = 2,
        probabilities: Tensor | None = None,
        *,
        chains: int = 8,
        burn_in: int = 30,
        sweeps: int = 100,
        seed: int = 0,
    ) -> None:
        self.variances, self.probabilities = mixture(variances, probabilities)
        check_positive(strength, "strength", zero_ok=True)
        self.strength = strength
        self.rank = check_count(rank, "rank")
        if chains < 2:
            raise ValueError(f"chains must be at least 2; got {chains}.")
        self.chains, self.seed = chains, seed
        self.burn_in, self.sweeps = check_count(burn_in, "burn_in"), check_count(sweeps, "sweeps")

    @classmethod
    def of_gains(
        cls,
        low: float,
        high: float,
        strength: float,
        rank: int = 2,
        points: int = 64,
        *,
        chains: int = 8,
        burn_in: int = 30,
        sweeps: int = 100,
        seed: int = 0,
    ) -> SpikedDenoiser:
        """Gain of the background uniform between `low` and `high`, in units of g_rms as `strength` is.

        Raises:
            ValueError: gains that are not positive or not in order, or another argument out of range.
        """
        gains, weights = gain_quadrature(low, high, points)
        return cls(gains.square(), strength, rank, weights, chains=chains, burn_in=burn_in, sweeps=sweeps, seed=seed)

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Return E[J | J_s = x], shape (..., post, pre), with the Monte-Carlo error of the chains."""
        return self.with_error(x, sigma)[0]

    def with_error(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """E[J | J_s = x] (..., post, pre), and its mean squared Monte-Carlo error of an entry, shape (...)."""
        shape, x = x.shape, x.double().reshape(-1, *x.shape[-2:])
        s = torch.as_tensor(sigma, dtype=torch.float64, device=x.device).expand(shape[:-2]).reshape(-1)
        means = self.chain_means(x, s)
        error = means.var(1).mean((-1, -2)) / self.chains
        return means.mean(1).view(shape), error.view(shape[:-2])

    def chain_means(self, x: Tensor, s: Tensor) -> Tensor:
        """Average of each chain, (matrix, chain, post, pre), for x (matrix, post, pre) and noise levels s (matrix,)."""
        source = torch.Generator(x.device).manual_seed(self.seed)
        forward, backward = (
            _Conditional.of(one, s, self.variances, self.probabilities, self.strength / math.sqrt(self.rank), source)
            for one in (x, x.mT)
        )
        n = self._start(x, source)
        shrunk = x.new_zeros(len(x), self.chains)  # sum of Σ_k p(k | ·) v_k/τ_k
        structure = x.new_zeros(len(x), self.chains, *x.shape[1:])
        for sweep in range(self.burn_in + self.sweeps):
            keep = sweep >= self.burn_in
            m, from_n = forward.draw(n)
            n, from_m = backward.draw(m)
            if keep:
                shrunk = shrunk + from_n.shrinkage + from_m.shrinkage
                for left, right in ((from_n.left, from_n.right), (from_m.right, from_m.left)):
                    structure += left @ right.mT
        means = shrunk[..., None, None] * x.unsqueeze(1) + structure
        return means / (2 * self.sweeps)

    def _start(self, x: Tensor, source: torch.Generator) -> Tensor:
        """First n of the chains, (matrix, chain, pre, rank)."""
        N = x.shape[-1]
        n = torch.randn(len(x), self.chains, N, self.rank, dtype=x.dtype, device=x.device, generator=source)
        top = eigh_of_many(x.mT @ x)[1][..., -min(self.rank, N) :]  # right singular vectors
        n[:, ::2, :, : top.shape[-1]] = math.sqrt(N) * top.unsqueeze(1)
        return n


@dataclass(frozen=True)
class _Average:
    """E[J | n, x] = shrinkage x + left rightᵀ."""

    shrinkage: Tensor
    left: Tensor
    right: Tensor


@dataclass(frozen=True)
class _Conditional:
    """What is known of m given n; of n given m, if x is transposed. All have the axes (matrix, chain, …)."""

    x: Tensor
    square: Tensor
    variances: Tensor
    totals: Tensor
    log_prior: Tensor
    c: float
    source: torch.Generator

    @classmethod
    def of(
        cls, x: Tensor, s: Tensor, variances: Tensor, probabilities: Tensor, c: float, source: torch.Generator
    ) -> _Conditional:
        variances = variances.to(x.device)
        totals = (variances + s.square().unsqueeze(-1)).unsqueeze(1)  # (matrix, 1, component)
        square = x.square().sum((-1, -2))[:, None, None]
        return cls(x, square, variances, totals, probabilities.to(x.device).log(), c, source)

    def draw(self, n: Tensor) -> tuple[Tensor, _Average]:
        """Draw (k, m) given n, (matrix, chain, neuron, rank), and average over both."""
        N, r = n.shape[-2:]
        values, basis = torch.linalg.eigh(n.mT @ n)
        n = n @ basis
        y = torch.einsum("bij,bcjq->bciq", self.x, n)
        tau = self.totals
        full = tau.unsqueeze(-1) + self.c**2 * values.clamp(min=0).unsqueeze(-2)  # τ_k + c²λ_q, (…, component, rank)
        explained = self.c**2 * (y.square().sum(-2).unsqueeze(-2) / full).sum(-1)
        volume = N * ((N - r) * tau.log() + full.log().sum(-1))
        p = (self.log_prior - (volume + (self.square - explained) / tau) / 2).softmax(-1)
        weight = (p * (1 - self.variances / tau)).unsqueeze(-1) * self.c**2 / full  # s²/τ_k c²/(τ_k + c²λ_q)
        average = _Average((p * self.variances / tau).sum(-1), y * weight.sum(-2).unsqueeze(-2), n)

        k = torch.multinomial(p.flatten(0, 1), 1, generator=self.source).view(*p.shape[:2], 1)
        of_k = full.gather(-2, k.unsqueeze(-1).expand(*k.shape, r))  # (matrix, chain, 1, rank)
        spread = (tau.expand_as(p).gather(-1, k).unsqueeze(-1) / of_k).sqrt()
        noise = torch.randn(y.shape, dtype=y.dtype, device=y.device, generator=self.source)
        return (self.c * y / of_k + spread * noise) @ basis.mT, average
