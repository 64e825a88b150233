"""Denoiser of weights that obey Dale's law, of unknown gain, in closed form.

In the units of the diffusion the weights from neuron j are J_ij = a_k |z_ij| or −b_k |z_ij| (excitation, inhibition; k
is the gain). A denoiser that is equivariant to relabelling knows how many neurons inhibit, and not which, so every set
of n of the N columns is as likely. Given k columns are independent but for their number: with L_j the likelihood of
column j if it inhibits over that if it excites, and e_n the elementary symmetric polynomial,

    p(k | W_s) ∝ p_k e_n(L) Π_j p(x_j | k, excites),    p(j inhibits | k, W_s) = L_j e_{n−1}(L without L_j)/e_n(L),

and the entries of a column of known sign are independent: their mean is that of a normal law cut off at 0.

References:
    Weighted finite population sampling to maximize entropy (Chen, Dempster, Liu, 1994), of a given number of successes
    among independent ones, https://doi.org/10.1093/biomet/81.3.457
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from neurosde.datasets.ensembles import Dale
from neurosde.models.analytic import COMPONENT_ENTRIES, gain_quadrature, mixture


class DaleDenoiser:
    """Weights of one sign per column, and of one of several gains; which columns inhibit is not known.

    Args:
        ensemble: the law of the weights; its own gain plays no part.
        gains: in units of g_rms, shape (component,).
        probabilities: of the gains, shape (component,); by default equal.

    Raises:
        ValueError: gains or probabilities out of range.
    """

    def __init__(self, ensemble: Dale, gains: Tensor, probabilities: Tensor | None = None) -> None:
        self.ensemble = ensemble
        self.gains, self.probabilities = mixture(gains, probabilities, "gains")

    @classmethod
    def of_gains(cls, low: float, high: float, ensemble: Dale, points: int = 64) -> DaleDenoiser:
        """Gain uniform between `low` and `high`, in units of g_rms: Gauss–Legendre quadrature over it.

        Raises:
            ValueError: gains that are not positive, or not in order.
        """
        return cls(ensemble, *gain_quadrature(low, high, points))

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Return E[J | J_s = x], shape (..., post, pre)."""
        axes = (-1, *(1,) * (x.ndim - 2))
        some = self.probabilities > 0
        gains, chances = (one[some].to(x.device).view(axes) for one in (self.gains, self.probabilities))
        return dale_mean(self.ensemble, x, sigma, gains, chances.log())


def dale_mean(ensemble: Dale, x: Tensor, sigma: Tensor, gains: Tensor, log_chances: Tensor) -> Tensor:
    """E[J | J_s = x] of weights of one sign per column, and of one of several gains. See `DaleDenoiser`.

    Args:
        ensemble: the law of the weights; its own gain plays no part.
        x: J_s, shape (..., post, pre).
        sigma: noise level, shape () or (...).
        gains: in units of g_rms, shape (component, ...) or what broadcasts to it.
        log_chances: logarithms of their probabilities up to a constant, of the same shape.

    Returns:
        Shape (..., post, pre), float64. Some gains are in memory at a time.
    """
    mean = x.double()  # whose weight is 0, but for rounding
    log_total = mean.new_full(x.shape[:-2], -math.inf)  # of the gains so far
    size = max(1, COMPONENT_ENTRIES // max(1, x.numel()))
    for some, chances in zip(gains.split(size), log_chances.split(size), strict=True):
        log_likelihood, (excited, inhibited, inhibits) = _given(ensemble, x, sigma, some)
        log_weight = chances + log_likelihood
        log_total = torch.logaddexp(log_total, log_weight.logsumexp(0))
        share = (log_weight - log_total).exp()  # (gain, ...), of all so far
        found = excited + inhibits.unsqueeze(-2) * (inhibited - excited)
        mean = mean + (share[..., None, None] * (found - mean)).sum(0)
    return mean


def dale_log_likelihood(ensemble: Dale, x: Tensor, sigma: Tensor, gains: Tensor) -> Tensor:
    """Logarithm of the density of J_s = x under Dale's law, up to what all gains have in common.

    Args and shapes as of `dale_mean`; shape (component, ...).
    """
    size = max(1, COMPONENT_ENTRIES // max(1, x.numel()))
    return torch.cat([_given(ensemble, x, sigma, some)[0] for some in gains.split(size)])


def _given(ensemble: Dale, x: Tensor, sigma: Tensor, gains: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Log likelihood of gains; means of entries of columns that excite and that inhibit, and how likely these are."""
    x, N = x.double(), x.shape[-1]
    s2 = torch.as_tensor(sigma, dtype=torch.float64, device=x.device)[..., None, None].square()
    columns = ensemble.column_scales(N).to(x.device) * math.sqrt(N)
    scale = gains[..., None, None]
    (excited, logs), (inhibited, others) = (_one_sided(scale * sign, x, s2) for sign in (columns.max(), columns.min()))
    log_e, inhibits = _of_so_many(others - logs, int((columns < 0).sum()))
    return logs.sum(-1) + log_e, (excited, inhibited, inhibits)


def _one_sided(scale: Tensor, x: Tensor, s2: Tensor) -> tuple[Tensor, Tensor]:
    """Means of entries that are scale · |z|, shape (gain, matrix, post, pre), and the log density of each column."""
    total = scale.square() + s2
    shrinkage = scale.square() / total
    sd = (shrinkage * s2).sqrt()
    a = shrinkage * x * scale.sign() / sd
    scaled = torch.special.erfcx(-a.clamp(max=30) / math.sqrt(2))  # 2 Φ(a) exp(a²/2), beyond where Φ(a) is 1
    mean = shrinkage * x + scale.sign() * sd * math.sqrt(2 / math.pi) / scaled
    log_mass = torch.where(a > 20, 0.0, (scaled / 2).log() - a.square() / 2)
    return mean, (log_mass - 0.5 * (total.log() + x.square() / total)).sum(-2)


def _of_so_many(odds: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Of independent events with these log odds, given that so many happen: log e_n, and the probability of each.

    Args:
        odds: shape (..., event).
        count: n, from 1 to all events but one.

    Returns:
        log e_n of the odds, shape (...), and the probabilities, shape (..., event).
    """
    impossible = odds.new_full(odds.shape[:-1] + (count + 1,), -1e300)  # of −∞ gradients would be NaN
    impossible[..., 0] = 0

    def sums(order: list[int]) -> list[Tensor]:
        """Logarithms of e_0 … e_n of the events before each in this order, and of all."""
        found = [impossible]
        for j in order:
            with_it = found[-1][..., :-1] + odds[..., j, None]
            found.append(torch.cat([found[-1][..., :1], torch.logaddexp(found[-1][..., 1:], with_it)], -1))
        return found

    events = list(range(odds.shape[-1]))
    before, after = sums(events), sums(events[::-1])[::-1]  # after[j + 1]: of those after j
    without = torch.stack(before[:-1], -2)[..., :count] + torch.stack(after[1:], -2)[..., :count].flip(-1)
    log_e = before[-1][..., count]
    return log_e, (odds + without.logsumexp(-1) - log_e.unsqueeze(-1)).exp()
