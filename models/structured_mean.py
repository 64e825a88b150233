"""What a denoiser can learn with less noise: the mean of W where more is known than the denoiser is told.

A denoiser is the mean of W given W_s and a recording. Least squares finds it from W itself, or from any T with

    E[T | W_s, Λ, B] = E[W | W_s, Λ, B],

and the less T scatters about it, the fewer examples are needed. By the tower property a mean of W given W_s, Λ, B and
more is such a T. Given its gain and its structure (signs of columns, clusters, factors) the entries of a matrix are
independent (`neurosde.datasets.entry_law`), and what is left of the scatter is what structure is uncertain:

- of normal entries, about the structure's mean M and of variances v_ij, T is the mean of each row, M + (B − MΛ +
  (W_s − M)/s²)(Λ + I/s² + diag(1/v_i))⁻¹. The gain need not be known: T is the mean over what it may have been, given
  W_s and the recording, too. (An error of the gain is one along W itself, small in each entry and large in that
  direction. Of a network that was trained without this mean, three quarters of the denoising error for Gaussian weights
  of 50 neurons, without a recording and at s = 1, lay in that one of 2500 directions, 0.36 standard deviations of what
  is open there.)
- of others, T_ij is an entry's mean given the rest of its row, which the recording ties it to: a normal likelihood of
  precision p = Λ_jj + 1/s² about (B_ij − Σ_{k≠j} W_ik Λ_kj + W_s,ij/s²)/p, and the entry's own law for prior. Without a
  recording there is no tie, and the rest says nothing. With one T is taken to W + (T − W) diag(P) (P + diag(P)/4)⁻¹,
  P = Λ + (1/s² + 1) I: as good a target, for T − W has mean zero given what is seen, whatever it is multiplied with.
  (Each entry for itself overshoots along what many neurons have in common, as a Jacobi iteration does: of normal
  entries T − W is −(W − D) P diag(P)⁻¹, which can be N times W − D. The factor makes it −(W − D) along P's large
  directions. Of ¼, ½, 1 and ⅒ the first was never far from the least scatter about `base` of signed and sparse weights,
  0.15 to 0.5 of that of W.)

References:
    Rao-Blackwellisation of sampling schemes (Casella, Robert, 1996), https://doi.org/10.1093/biomet/83.1.81
    Stable target field for reduced variance score estimation in diffusion models (Xu, Tong, Jaakkola, 2023), on the
    scatter of W itself as a target, https://arxiv.org/abs/2302.00670
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from neurosde.datasets.entry_law import EntryLaw
from neurosde.models.analytic import COMPONENT_ENTRIES, relative_covariance, scale_mixture_mean, uniform_gains
from neurosde.models.edm import Evidence, fold
from neurosde.models.eigen import eigh_of_many

_DAMPING = 0.25


def structured_mean(law: EntryLaw, J: Tensor, x: Tensor, sigma: Tensor, evidence: Evidence) -> Tensor:
    """Return T, shape (matrix, post, pre), float64.

    Args:
        law: of the entries of each matrix given its structure, in J units.
        J: the matrices themselves, shape (matrix, post, pre).
        x: J_s, shape (matrix, post, pre).
        sigma: noise level s > 0 of each, shape (matrix,).
        evidence: what a recording says of each.
    """
    T = entry_means(law, J, x, sigma, evidence)
    normal = ~law.one_sided & (law.density == 1)
    alike = law.scale.flatten(1).amax(1) == law.scale.flatten(1).amin(1)
    if bool((some := normal & alike).any()):
        T[some] = _alike_mean(law[some], x[some], sigma[some], evidence[some])
    if bool((some := normal & ~alike).any()):
        T[some] = _row_means(law[some], x[some], sigma[some], evidence[some])
    if evidence.vectors is None:
        return T
    rest = ~normal
    if bool(rest.any()):
        P = fold(x[rest], sigma[rest], evidence[rest]).power(-1.0)
        diagonal = P.diagonal(dim1=1, dim2=2)
        off = (T[rest] - J[rest]) * diagonal.unsqueeze(-2)
        T[rest] = J[rest] + torch.linalg.solve(P + torch.diag_embed(_DAMPING * diagonal), off, left=False)
    return T


def entry_means(law: EntryLaw, J: Tensor, x: Tensor, sigma: Tensor, evidence: Evidence) -> Tensor:
    """Return the mean of each entry given structure, W_s, the recording, and the rest of its row."""
    noise = sigma.square()[:, None, None]
    if evidence.vectors is None:
        tied = evidence.eigenvalues.unsqueeze(-2)
        unexplained = evidence.cross - J * tied
    else:
        tied = (evidence.vectors.square() @ evidence.eigenvalues.unsqueeze(-1)).mT
        unexplained = _about(J, evidence) @ evidence.vectors.mT
    variance = 1 / (tied + 1 / noise)
    return entry_mean(law, (unexplained + J * tied + x / noise) * variance, variance)


def entry_mean(law: EntryLaw, centre: Tensor, variance: Tensor) -> Tensor:
    """Mean of each entry given one normal measurement of it.

    Args:
        law: of the entries.
        centre: what was measured, shape (matrix, post, pre).
        variance: of the measurement, shape (matrix, post, pre) or what broadcasts to it.

    Returns:
        Shape (matrix, post, pre).
    """
    total = law.scale.square() + variance
    shrinkage, off = law.scale.square() / total, centre - law.mean
    prior_odds = (law.density / (1 - law.density)).log()[:, None, None]
    log_odds = prior_odds - 0.5 * (total / variance).log() + 0.5 * off.square() * shrinkage / variance
    exists = torch.sigmoid(log_odds) * shrinkage * off
    # Of a normal law cut off at 0: with a = mean/sd, mean + sd φ(a)/Φ(a).
    sd, sign = (shrinkage * variance).sqrt(), law.scale.sign()
    a = shrinkage * off * sign / sd
    positive = sd * (a + math.sqrt(2 / math.pi) / torch.special.erfcx(-a / math.sqrt(2)))
    return law.mean + torch.where(law.one_sided[:, None, None], sign * positive, exists)


def _about(weights: Tensor, evidence: Evidence) -> Tensor:
    """B − WΛ along the directions."""
    along = weights if evidence.vectors is None else weights @ evidence.vectors
    return evidence.cross - along * evidence.eigenvalues.unsqueeze(-2)


def _alike_mean(law: EntryLaw, x: Tensor, sigma: Tensor, evidence: Evidence) -> Tensor:
    """Mean of normal entries of one variance, over the gains that it may have been of."""
    about = Evidence(evidence.eigenvalues, evidence.vectors, _about(law.mean, evidence))
    relative, chances = uniform_gains(*law.gains.unbind(-1))
    return law.mean + scale_mixture_mean(x - law.mean, sigma, about, law.scale[:, 0, 0].square() * relative, chances)


def _row_means(law: EntryLaw, x: Tensor, sigma: Tensor, evidence: Evidence) -> Tensor:
    """Mean of normal entries of any variances, over the gains that they may have been of.

    In units of its entries' spreads a row has unit variance, and at another gain one common variance. Rows of one
    matrix whose spreads are the same have the same directions.
    """
    count, N = x.shape[:2]
    noise = sigma.square()[:, None, None]
    owner = torch.arange(count, dtype=x.dtype, device=x.device)[:, None, None].expand(count, N, 1)
    spreads, row = torch.cat([owner, law.scale], -1).flatten(0, 1).unique(dim=0, return_inverse=True)
    matrix, spread = spreads[:, 0].long(), spreads[:, 1:]
    along = evidence.eigenvalues + 1 / noise.squeeze(-1)
    cross = _about(law.mean, evidence)
    if evidence.vectors is None:
        vectors, tied = None, spread.square() * along[matrix]
    else:
        precision = (evidence.vectors * along.unsqueeze(-2)) @ evidence.vectors.mT
        tied, vectors = eigh_of_many(spread.unsqueeze(-1) * precision[matrix] * spread.unsqueeze(-2))
        vectors, cross = vectors[row], cross @ evidence.vectors.mT
    C = 1 / (tied + 1)
    seen = ((cross + (x - law.mean) / noise) * law.scale).flatten(0, 1)
    mean = C[row] * (seen if vectors is None else (seen.unsqueeze(-2) @ vectors).squeeze(-2))
    power = torch.zeros_like(C).index_add_(0, row, mean.square())
    rows = torch.bincount(row, minlength=len(C))
    variances, log_chances = uniform_gains(*law.gains.unbind(-1))
    parts = variances[:, matrix].split(max(1, COMPONENT_ENTRIES // C.numel()))
    log_odds = torch.cat([relative_covariance(power, C, some, rows)[1] for some in parts])
    chances = log_chances.index_add(1, matrix, log_odds).softmax(0)[:, matrix].unsqueeze(-1)
    shares = zip(chances.split([len(some) for some in parts]), parts, strict=True)
    share = sum((chance * relative_covariance(power, C, some, rows)[0]).sum(0) for chance, some in shares)
    mean = mean * share[row]
    found = mean if vectors is None else (mean.unsqueeze(-2) @ vectors.mT).squeeze(-2)
    return law.mean + found.view_as(x) * law.scale
