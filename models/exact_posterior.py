"""Exact posteriors over weights of known ensembles, by sampling: what a trained posterior is measured against.

A recording says of W exp(tr(BWᵀ) − ½ tr(WΛWᵀ)) (`neurosde.likelihood`). For three ensembles of
`neurosde.datasets.ensembles`, of a gain that is known or uniform over a range, all conditionals of their posteriors are
standard. The gain g is drawn from a quadrature grid.

Gaussian and low-rank, W = √v z + c m nᵀ with v = g²/N: along the eigenvectors u_k of Λ, where ñ = Uᵀn is standard
normal as n is, b = BU, and with z integrated out,

    log p(B | m, n, g) = Σ_ik [v b²/2 + b P − λ_k P²/2]_ik / (1 + v λ_k) − N/2 Σ_k log(1 + v λ_k),    P = c m ñᵀ,

so that rows of m given n are normal, as rows of ñ given m are, with r × r precisions; and W given both and g is the
Gaussian posterior about c m nᵀ. Of rank 0, the draws are independent.

Sparse, W_ij ~ (1 − d) δ₀ + d N(0, v), v = g²/(N d): given the rest of its row, whether a connection exists has the odds

    d/(1 − d) · (1 + v Λ_jj)^(−½) · exp(½ r² ς),    ς = 1/(Λ_jj + 1/v),    r = B_ij − Σ_{k≠j} W_ik Λ_kj,

and if so W_ij ~ N(ς r, ς). One presynaptic neuron is visited after the other, all rows at once; the gain is drawn given
the weights, and together with them (`neurosde.models.gibbs_chains`). Where activity leaves directions of W almost open
such chains cross between supports rarely. Up to 10 neurons all 2^N supports of a row are therefore summed over instead,
for each gain, and the draws are independent.

References:
    Variable selection via Gibbs sampling (George, McCulloch, 1993), https://doi.org/10.1080/01621459.1993.10476353
    Sampling-based approaches to calculating marginal densities (Gelfand, Smith, 1990), averages of conditional means,
    https://doi.org/10.1080/01621459.1990.10476213
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from neurosde.datasets.ensembles import Ensemble, Gaussian, LowRank, Sparse, base_of
from neurosde.models.analytic import gain_quadrature
from neurosde.models.edm import Evidence
from neurosde.models.gibbs_chains import GibbsChains, LowRankChains, SparseChains
from neurosde.validation import check_count

POINTS = 128  # of the quadrature over an unknown gain
ENUMERATED = 10  # neurons up to which all supports of a row are
DISAGREEMENT = 0.3  # standard deviations of a weight by which chains may differ without a warning
CHAINS = 8
BURN_IN = 200  # sweeps of each chain that are left out
THIN = 8  # sweeps from one draw to the next


@dataclass(frozen=True)
class ExactPosterior:
    """Draws of exact posteriors over W.

    Attributes:
        weights: draws, chain after chain, shape (draw, recording, post, pre), float64.
        mean: posterior mean, the average of conditional means over all sweeps, or the sum over all supports, shape
            (recording, post, pre).
        mean_error: root mean square Monte-Carlo error of an entry of the mean, told from the chains' differences, over
            the root mean square sd of an entry within a chain (if it has 8 draws, else in all); shape (recording,).
        gain: draws of the gain, shape (draw, recording).
    """

    weights: Float[Tensor, "draw recording post pre"]
    mean: Float[Tensor, "recording post pre"]
    mean_error: Float[Tensor, " recording"]
    gain: Float[Tensor, "draw recording"]


def exact_posterior(
    ensemble: Ensemble,
    evidence: Evidence,
    draws: int = 256,
    *,
    chains: int = CHAINS,
    burn_in: int = BURN_IN,
    thin: int = THIN,
    seed: int = 0,
    progress: bool = False,
) -> ExactPosterior:
    """Draw from p(W | recording, ensemble), for several recordings at once.

    Args:
        ensemble: Gaussian, sparse or low-rank, or a mixture of such over gains.
        evidence: of each recording, in units of W, shapes (recording, …).
        draws: number of draws, a multiple of `chains`.
        chains: independent chains for each recording.
        burn_in: sweeps of each chain that are left out.
        thin: sweeps from one draw to the next.
        seed: of the chains.
        progress: show a progress bar, on a terminal.

    Warns where chains differ by more than 0.3 sd of a weight: they have not mixed, and `thin` is too small.

    Raises:
        ValueError: another ensemble, evidence of another shape, or numbers out of range.
    """
    if evidence.cross.ndim != 3:
        raise ValueError(f"evidence must be of shape (recording, post, pre); got {tuple(evidence.cross.shape)}.")
    check_count(chains, "chains", 2)
    check_count(thin, "thin")
    check_count(burn_in, "burn_in", 0)
    if check_count(draws, "draws") % chains:
        raise ValueError(f"draws must be a multiple of chains = {chains}; got {draws}.")
    recordings, N = evidence.cross.shape[:2]
    source = torch.Generator(evidence.cross.device).manual_seed(seed)
    index = torch.arange(recordings, device=evidence.cross.device).repeat_interleave(chains)
    gibbs = _chains(ensemble, evidence, index, source)
    kept, gains = [], []
    mean = torch.zeros_like(gibbs.cross)
    kept_sweeps = draws // chains * thin
    for sweep in tqdm(range(burn_in + kept_sweeps), unit="sweep", disable=None if progress else True):
        W = gibbs.sweep()
        if sweep >= burn_in:
            mean += gibbs.mean / kept_sweeps
            if (sweep - burn_in) % thin == thin - 1:
                kept.append(W.clone())
                gains.append(gibbs.gains[gibbs.component])
    shape = (draws // chains, recordings, chains)
    weights = torch.stack(kept).view(*shape, N, N).transpose(1, 2).transpose(0, 1).reshape(draws, recordings, N, N)
    means = mean.view(recordings, chains, N, N)
    several = weights.view(chains, -1, recordings, N, N)
    told = several.shape[1] >= 8  # draws of a chain, fewer of which do not tell its spread
    within = (several.var(1).mean(0) if told else weights.var(0)).mean((-1, -2))
    error = (means.var(1).mean((-1, -2)) / chains / within.clamp(min=1e-300)).sqrt()
    apart = int((error * math.sqrt(chains) > DISAGREEMENT).sum())
    if told and apart:
        warnings.warn(
            f"the chains of {apart} of {recordings} recordings differ by up to "
            f"{float(error.max()) * math.sqrt(chains):.2g} standard deviations of a weight: they have not mixed. Raise "
            f"thin (now {thin}).",
            stacklevel=2,
        )
    gain = torch.stack(gains).view(shape).permute(2, 0, 1).reshape(draws, recordings)
    return ExactPosterior(weights, means.mean(1), error, gain)


def gain_nodes(ensemble: Ensemble) -> tuple[Tensor, Tensor]:
    """Gains of an ensemble and their probabilities: the one it has, or a quadrature over its range."""
    low, high = ensemble.gain_range
    if high > low:
        return gain_quadrature(low, high, POINTS)
    return torch.tensor([low], dtype=torch.float64), torch.ones(1, dtype=torch.float64)


def _chains(ensemble: Ensemble, evidence: Evidence, index: Tensor, source: torch.Generator) -> GibbsChains:
    base, nodes, each = base_of(ensemble), gain_nodes(ensemble), evidence[index]
    if isinstance(base, Sparse):
        if evidence.cross.shape[-1] <= ENUMERATED:
            return _EnumeratedSparse(base.density, *nodes, evidence, index, source)
        return SparseChains(base.density, *nodes, each, source)
    if isinstance(base, LowRank):
        return LowRankChains(base.strength, base.rank, *nodes, each, source)
    if isinstance(base, Gaussian):
        return LowRankChains(0.0, 0, *nodes, each, source)
    raise ValueError(f"the exact posterior is known of gaussian, sparse and low-rank weights; got {ensemble.name!r}.")


class _EnumeratedSparse(GibbsChains):
    """Independent draws: of the gain, of each row's support given it, and of the row given both."""

    def __init__(
        self,
        density: float,
        gains: Tensor,
        chances: Tensor,
        evidence: Evidence,
        index: Tensor,
        source: torch.Generator,
    ) -> None:
        super().__init__(gains, chances, evidence[index], source)
        N, device = evidence.cross.shape[-1], evidence.cross.device
        self.index = index
        self.variances = self.gains.square() / (N * density)
        self.precision, self.linear = evidence.along_neurons()
        bits = torch.arange(2**N, device=device).unsqueeze(-1) >> torch.arange(N, device=device)
        self.supports = (bits & 1).double()
        number = self.supports.sum(-1)
        log_prior = number * math.log(density) + torch.xlogy(N - number, torch.tensor(1 - density, dtype=torch.float64))
        of_gain, shares, means = [], [], []
        for one, linear in zip(self.precision, self.linear, strict=True):
            log_weights, mean = zip(*(self._of_gain(one, linear, v) for v in self.variances), strict=True)
            log_rows = torch.stack(log_weights) + log_prior.view(-1, 1)  # (component, support, row)
            of_gain.append((self.log_chances + log_rows.logsumexp(1).sum(-1)).softmax(-1))
            shares.append(log_rows.softmax(1))
            means.append(torch.einsum("c,csr,csrj->rj", of_gain[-1], shares[-1], torch.stack(mean)))
        self.of_gain, self.shares, self.mean = torch.stack(of_gain), torch.stack(shares), torch.stack(means)[index]

    def _of_gain(self, precision: Tensor, linear: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Log evidence of each support (support, row), and the means (support, row, pre)."""
        L, pulled = self._factored(precision, linear.expand(len(self.supports), -1, -1), v, self.supports)
        half = torch.linalg.solve_triangular(L, pulled.mT, upper=False)
        mean = torch.linalg.solve_triangular(L.mT, half, upper=True).mT * self.supports.unsqueeze(-2)
        volume = L.diagonal(dim1=-2, dim2=-1).log().sum(-1) + 0.5 * L.shape[-1] * v.log()
        return 0.5 * half.square().sum(-2) - volume.unsqueeze(-1), mean

    def _factored(self, precision: Tensor, linear: Tensor, v: Tensor, support: Tensor) -> tuple[Tensor, Tensor]:
        """Cholesky factor of the precision on a support, with 1/v for what is off it, and B on it."""
        on = support.unsqueeze(-1) * support.unsqueeze(-2)
        eye = torch.eye(support.shape[-1], dtype=torch.float64, device=support.device)
        return torch.linalg.cholesky(on * precision + eye / v), linear * support.unsqueeze(-2)

    def sweep(self) -> Tensor:
        """Draw gains, supports given them, then W given both."""
        k, N = self.index, self.linear.shape[-1]
        self.component = torch.multinomial(self.of_gain[k], 1, generator=self.source).squeeze(-1)
        shares = self.shares[k, self.component].mT.reshape(len(k) * N, -1)  # (chain and row, support)
        support = self.supports[torch.multinomial(shares, 1, generator=self.source).squeeze(-1)].view(len(k), N, N)
        v = self.variances[self.component].view(-1, 1, 1, 1)
        L, pulled = self._factored(self.precision[k].unsqueeze(1), self.linear[k].unsqueeze(-2), v, support)
        half = torch.linalg.solve_triangular(L, pulled.mT, upper=False) + self._normal(len(k), N, N, 1)
        W = torch.linalg.solve_triangular(L.mT, half, upper=True).squeeze(-1)
        return W * support
