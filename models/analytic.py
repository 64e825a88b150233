"""Denoisers in closed form: what a trained network is measured against, and priors that need none.

In the units of the diffusion (J = W/s₀), float64, in the interface of `neurosde.models.edm.Denoiser`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softplus

from neurosde.models.edm import Evidence, fold
from neurosde.validation import check_count, check_positive

_GAINS = 512
# Gains of each grid on the way to the quadrature, how many nats below the most probable one they may be, and its nodes:
# of up to 200 neurons, whose gain is known to 0.4 %, nodes are no farther apart than that.
_GRIDS, _NATS, _NODES = (12, 8, 8), 16.0, 24
COMPONENT_ENTRIES = 10_000_000  # matrix entries times components of a mixture that are in memory at a time


def mixture(variances: Tensor, probabilities: Tensor | None, name: str = "variances") -> tuple[Tensor, Tensor]:
    """Variances, or what `name` says, and probabilities of the components of a mixture, in float64, with sum 1.

    Raises:
        ValueError: variances or probabilities out of range.
    """
    variances = torch.as_tensor(variances, dtype=torch.float64)
    if variances.ndim != 1 or not bool((variances > 0).all()):
        raise ValueError(f"{name} must be a vector of positive numbers.")
    if probabilities is None:
        probabilities = torch.ones_like(variances)
    probabilities = torch.as_tensor(probabilities, dtype=torch.float64)
    if probabilities.shape != variances.shape or not bool((probabilities >= 0).all()):
        raise ValueError(f"probabilities must be non-negative, one for each of the {name}.")
    return variances, probabilities / probabilities.sum()


_legendre = lru_cache(np.polynomial.legendre.leggauss)  # nodes and weights between -1 and 1


def gain_quadrature(low: float, high: float, points: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights of Gauss–Legendre quadrature over a gain that is uniform between `low` and `high`.

    Raises:
        ValueError: gains that are not positive, or not in order.
    """
    check_positive(low, "low")
    check_count(points, "points")
    if high <= low:
        raise ValueError(f"high must exceed low = {low}; got {high}.")
    nodes, weights = _legendre(points)
    return low + (high - low) * (torch.from_numpy(nodes) + 1) / 2, torch.from_numpy(weights) / 2


def uniform_gains(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Squares of gains and logarithms of their probabilities, each (component, ...): gains uniform from low to high.

    They are even in the logarithm, as what can be known of a gain is: 0.45 % apart between 0.3 and 3, and of Gaussian
    weights of 100 neurons it is known to 0.7 %.

    Args:
        low: lowest gains, shape (...).
        high: highest ones; equal to the lowest where the gain is known.
    """
    count = 1 if bool((low == high).all()) else _GAINS
    share = (torch.arange(count, dtype=low.dtype, device=low.device).view(-1, *(1,) * low.ndim) + 0.5) / count
    gains = low * (high / low) ** share
    return gains.square(), gains.log()


def gains_near(
    log_likelihood: Callable[[Tensor], Tensor], low: float, high: float, like: Tensor
) -> tuple[Tensor, Tensor]:
    """Gains that a noisy matrix may be of, out of those between `low` and `high`, and logarithms of probabilities.

    The posterior of a gain is smooth and narrow. Where it is not next to nothing is found on a grid even in log gain,
    then on finer ones within it, and nodes are those of Gauss–Legendre quadrature there.

    Args:
        log_likelihood: of gains, shape (component, ...), the logarithm of the likelihood of each, of the same shape.
        low: lowest gain.
        high: highest gain; the gain is uniform between them.
        like: a tensor of one number for each matrix, shape (...), float64.

    Returns:
        Gains, shape (component, ...), and the logarithm of each one's probability up to a constant, of the same shape.
    """
    first, last = torch.full_like(like, math.log(low)), torch.full_like(like, math.log(high))
    axes = (-1, *(1,) * like.ndim)
    with torch.no_grad():
        for count in _GRIDS:
            share = torch.linspace(0, 1, count, dtype=torch.float64, device=like.device).view(axes)
            log_gains = first + (last - first) * share
            log_p = log_likelihood(log_gains.exp()) + log_gains
            some = log_p >= log_p.amax(0) - _NATS
            place = torch.arange(count, device=like.device).view(axes)
            least = torch.where(some, place, count).amin(0).sub(1).clamp(min=0)
            most = torch.where(some, place, -1).amax(0).add(1).clamp(max=count - 1)
            first, last = (log_gains.gather(0, end.unsqueeze(0))[0] for end in (least, most))
    nodes, weights = (torch.from_numpy(one).to(like.device).view(axes) for one in _legendre(_NODES))
    log_gains = first + (last - first) * (nodes + 1) / 2
    return log_gains.exp(), log_gains + weights.log() + (last - first).log()


class ScaleMixtureDenoiser:
    """Gaussian entries whose variance is one of several, the same for the whole matrix: an unknown gain.

    J_ij ~ N(0, v_k) iid with probability p_k. Given k the posterior is N(D₀, C) (`edm.fold`), and k has the posterior

        p(k | W_s) ∝ p_k |C_k|^(N/2) v_k^(−N²/2) exp(½ tr(M C_k Mᵀ)),    M = B + W_s/s².

    Args:
        variances: v_k, shape (component,).
        probabilities: p_k, shape (component,); by default equal.
        evidence: of a recording; without it this is the prior's denoiser.

    Raises:
        ValueError: variances or probabilities out of range.
    """

    def __init__(
        self, variances: Tensor, probabilities: Tensor | None = None, evidence: Evidence | None = None
    ) -> None:
        self.variances, self.probabilities = mixture(variances, probabilities)
        self.evidence = evidence

    @classmethod
    def of_gains(
        cls, low: float, high: float, points: int = 64, evidence: Evidence | None = None
    ) -> ScaleMixtureDenoiser:
        """Gain uniform between `low` and `high`, in units of g_rms: Gauss–Legendre quadrature over it.

        Raises:
            ValueError: gains that are not positive, or not in order.
        """
        gains, weights = gain_quadrature(low, high, points)
        return cls(gains.square(), weights, evidence)

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Return E[J | J_s = x], shape (..., post, pre)."""
        axes = (-1, *(1,) * (x.ndim - 2))
        v, chances = (one.to(x.device).view(axes) for one in (self.variances, self.probabilities))
        return scale_mixture_mean(x, sigma, self.evidence or Evidence.none(x.shape[-1], x.device), v, chances.log())


def scale_mixture_mean(x: Tensor, sigma: Tensor, evidence: Evidence, variances: Tensor, log_chances: Tensor) -> Tensor:
    """E[J | J_s = x] of normal entries of one of several variances, v_k with probability p_k.

    The posterior mean M C_k of each differs along the eigenvectors of C_k only, which all have in common: neither the
    weights of the components nor the mean over them needs a matrix for each. See `ScaleMixtureDenoiser`. Some matrices
    are in memory at a time.

    Args:
        x: J_s, shape (..., post, pre).
        sigma: noise level, shape () or (...).
        evidence: what a recording says.
        variances: v_k, shape (component, ...) or what broadcasts to it.
        log_chances: log p_k up to a constant, of the same shape.

    Returns:
        Shape (..., post, pre), float64.
    """
    N, batch = x.shape[-1], x.shape[:-2]
    folded = fold(x, sigma, evidence)
    power = folded.mean.square().sum(-2).reshape(-1, N)
    C = folded.variances.expand(*batch, N).reshape(-1, N)
    aligned = (len(variances), *(1,) * (len(batch) + 1 - variances.ndim), *variances.shape[1:])
    v, log_p = (one.reshape(aligned).expand(-1, *batch).reshape(len(one), -1) for one in (variances, log_chances))
    size = max(1, COMPONENT_ENTRIES // (len(v) * N))
    parts = zip(power.split(size), C.split(size), v.split(size, 1), log_p.split(size, 1), strict=True)
    share = torch.cat([_mean_share(*part) for part in parts]).view(*batch, 1, N)
    mean = folded.mean * share
    return mean if evidence.vectors is None else mean @ evidence.vectors.mT


def _mean_share(power: Tensor, C: Tensor, v: Tensor, log_chances: Tensor) -> Tensor:
    """Mean over the components of C_k/C, of what is C where the variance is 1, along each direction.

    Args:
        power: |D₀|² along each direction, shape (matrix, direction).
        C: shape (matrix, direction).
        v: v_k, shape (component, matrix).
        log_chances: log p_k, of the same shape.
    """
    share, log_odds = relative_covariance(power, C, v, C.shape[-1])
    return ((log_chances + log_odds).softmax(0).unsqueeze(-1) * share).sum(0)


def relative_covariance(power: Tensor, C: Tensor, v: Tensor, rows: Tensor | float) -> tuple[Tensor, Tensor]:
    """What entries of another variance make of a posterior mean, and how likely they make what was seen.

    Args:
        power: |D₀|² along each direction, where D₀ is the posterior mean for entries of variance 1, shape (matrix,
            direction).
        C: posterior variances for the same entries, shape (matrix, direction).
        v: variances, shape (component, matrix).
        rows: how many rows each matrix has, shape () or (matrix,).

    Returns:
        C_k/C along each direction, shape (component, matrix, direction), and the logarithm of the likelihood, up to
        what all components have in common, shape (component, matrix).
    """
    v = v.unsqueeze(-1)
    share = 1 / (1 + C * (1 / v - 1))
    # With M = D₀ C⁻¹, of tr(M C_k Mᵀ) what all components have in common is left out: of a precise recording it is all
    # but the last digits.
    along = power * share * (1 - 1 / v)
    return share, 0.5 * (along.sum(-1) + torch.as_tensor(rows, device=C.device) * (share / v).log().sum(-1))


@dataclass(frozen=True)
class SpikeAndSlabDenoiser:
    """Sparse weights: each entry is 0, or N(0, variance) with probability `density`, independently.

    Args:
        density: probability of a connection.
        variance: of the connections that exist.

    Raises:
        ValueError: a density outside (0, 1], or a variance that is not positive.
    """

    density: float
    variance: float

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise ValueError(f"density must lie in (0, 1]; got {self.density}.")
        check_positive(self.variance, "variance")

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Return E[J | J_s = x], shape (..., post, pre)."""
        s2 = torch.as_tensor(sigma, dtype=torch.float64, device=x.device)[..., None, None].square()
        shrinkage = self.variance / (self.variance + s2)
        return self.existence(x, sigma) * shrinkage * x.double()

    def existence(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Probability that each connection exists, given J_s = x; shape (..., post, pre)."""
        return torch.sigmoid(self.log_odds(x, sigma))

    def log_odds(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Logarithm of the odds that each connection exists, given J_s = x; shape (..., post, pre)."""
        s2 = torch.as_tensor(sigma, dtype=torch.float64, device=x.device)[..., None, None].square()
        return _slab_log_odds(x.double(), s2, self.density, self.variance)


class SpikeAndSlabMixtureDenoiser:
    """Sparse weights of unknown gain: the slab's variance is one of several, the same for the whole matrix.

    Given the variance v_k entries are independent, and with π for the density and N(·; v) for the normal density,

        p(k | W_s) ∝ p_k Π_ij [π N(x_ij; v_k + s²) + (1 − π) N(x_ij; s²)],    D = Σ_k p(k | W_s) D_k.

    Args:
        density: probability π of a connection, below 1 (at 1 it is `ScaleMixtureDenoiser`).
        variances: v_k of the connections that exist, shape (component,).
        probabilities: p_k, shape (component,); by default equal.

    Raises:
        ValueError: density, variances or probabilities out of range.
    """

    def __init__(self, density: float, variances: Tensor, probabilities: Tensor | None = None) -> None:
        if not 0 < density < 1:
            raise ValueError(f"density must lie in (0, 1); got {density}.")
        self.density = density
        self.variances, self.probabilities = mixture(variances, probabilities)

    @classmethod
    def of_gains(cls, low: float, high: float, density: float, points: int = 32) -> SpikeAndSlabMixtureDenoiser:
        """Gain uniform between `low` and `high`, in units of g_rms; connections have the variance gain²/density.

        Raises:
            ValueError: gains that are not positive or not in order, or a density out of range.
        """
        gains, weights = gain_quadrature(low, high, points)
        return cls(density, gains.square() / density, weights)

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Return E[J | J_s = x], shape (..., post, pre)."""
        axes = (-1, *(1,) * (x.ndim - 2))
        some = self.probabilities > 0
        v, chances = (one[some].to(x.device).view(axes) for one in (self.variances, self.probabilities))
        return slab_mixture_mean(self.density, x, sigma, v, chances.log())


def slab_mixture_mean(density: float, x: Tensor, sigma: Tensor, variances: Tensor, log_chances: Tensor) -> Tensor:
    """E[J | J_s = x] of sparse weights whose connections have one of several variances.

    See `SpikeAndSlabMixtureDenoiser`. Some components are in memory at a time.

    Args:
        density: probability of a connection, below 1.
        x: J_s, shape (..., post, pre).
        sigma: noise level, shape () or (...).
        variances: v_k of the connections that exist, shape (component, ...) or what broadcasts to it.
        log_chances: log p_k up to a constant, of the same shape.

    Returns:
        Shape (..., post, pre), float64.
    """
    x, s2 = x.double(), _square(x, sigma)
    mean = x  # whose weight is 0, but for rounding
    log_total = x.new_full(x.shape[:-2], -math.inf)  # of the components so far
    size = max(1, COMPONENT_ENTRIES // max(1, x.numel()))
    for some, chances in zip(variances.split(size), log_chances.split(size), strict=True):
        v = some[..., None, None]
        log_odds = _slab_log_odds(x, s2, density, v)
        log_weight = chances + softplus(log_odds).sum((-1, -2))
        log_total = torch.logaddexp(log_total, log_weight.logsumexp(0))
        share = (log_weight - log_total).exp()[..., None, None]
        mean = mean + (share * (torch.sigmoid(log_odds) * (v / (v + s2)) * x - mean)).sum(0)
    return mean


def slab_log_likelihood(density: float, x: Tensor, sigma: Tensor, variances: Tensor) -> Tensor:
    """Logarithm of the density of J_s = x over Π (1 − π) N(x; s²), for sparse weights of each of several variances.

    Args and shapes as of `slab_mixture_mean`; shape (component, ...).
    """
    x, s2 = x.double(), _square(x, sigma)
    size = max(1, COMPONENT_ENTRIES // max(1, x.numel()))
    parts = (_slab_log_odds(x, s2, density, some[..., None, None]) for some in variances.split(size))
    return torch.cat([softplus(part).sum((-1, -2)) for part in parts])


def _square(x: Tensor, sigma: Tensor) -> Tensor:
    return torch.as_tensor(sigma, dtype=torch.float64, device=x.device)[..., None, None].square()


def _slab_log_odds(x: Tensor, s2: Tensor, density: float, variance: Tensor | float) -> Tensor:
    odds = math.log(density) - (math.log1p(-density) if density < 1 else -math.inf)
    total = variance + s2
    return odds - 0.5 * (total / s2).log() + 0.5 * x.square() * (1 / s2 - 1 / total)
