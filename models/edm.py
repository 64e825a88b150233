"""Diffusion over weight matrices, with a recording folded in.

W_s = W + s ε, ε iid standard normal, s from σ_max (nothing of W is left) down to 0. A recording's likelihood is
Gaussian in W with precision Λ and cross term B (`neurosde.likelihood`), and so is the noise; for the prior N(0, v) of
an entry both fold into one row covariance and one mean,

    C = (Λ + I/s² + I/v)⁻¹,    D₀ = (B + W_s/s²) C,

and everything that a Gaussian prior lacks is left to a network F, which sees inputs and makes outputs of unit variance:

    Z = D₀ (vI − C)^(−1/2),    D(W_s; s, Λ, B) = D₀ + F C^(1/2),    loss = ‖(D − W) C^(−1/2)‖² / N².

With Λ = B = 0 these are EDM's c_skip, c_in, c_out and weighting. With F = 0, D is the exact posterior mean for the
Gaussian prior. All is in J units, J = W/s₀ with s₀ = g_rms/√N, so that v = 1 is the prior variance at every N.

References:
    Elucidating the design space of diffusion-based generative models (Karras, Aittala, Aila, Laine, 2022),
    https://arxiv.org/abs/2206.00364
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from neurosde.models.eigen import eigh_of_many
from neurosde.validation import check_positive, check_square

SIGMA_MIN = 2e-3
DECISIVE, ELSEWHERE = (1.0, 1.0, 1.8), 0.5  # of the density of noise levels, see `noise_levels`


class Denoiser(Protocol):
    """What samplers take: the mean of W given W_s."""

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Return E[W | W_s = x], shape (..., post, pre), for the noise levels sigma, shape () or (...)."""
        ...


@dataclass(frozen=True)
class Evidence:
    """What recordings say about W, by the eigenvectors of Λ. In float64 and in the units of the diffusion.

    Attributes:
        eigenvalues: of Λ, not negative, shape (..., direction).
        vectors: eigenvectors of Λ as columns, shape (..., pre, direction); None where the directions are the neurons.
        cross: B along them, B U, shape (..., post, direction).
    """

    eigenvalues: Tensor
    vectors: Tensor | None
    cross: Tensor

    @classmethod
    def of(cls, precision: Float[Tensor, "*batch pre pre"], cross: Float[Tensor, "*batch post pre"]) -> Evidence:
        """Decompose Λ once for all noise levels.

        Args:
            precision: Λ, symmetric, shape (..., pre, pre).
            cross: B, shape (..., post, pre).

        Raises:
            ValueError: shapes that do not fit, numbers that are not finite, or a Λ that is not a precision.
        """
        check_square(precision.shape, "precision")
        if precision.shape != cross.shape:
            raise ValueError(
                f"precision (..., pre, pre) and cross (..., post, pre) must have one shape; got "
                f"{tuple(precision.shape)} and {tuple(cross.shape)}."
            )
        precision, cross = precision.double(), cross.double()
        if not bool(precision.isfinite().all() and cross.isfinite().all()):
            raise ValueError("precision and cross must be finite; leave out transitions that are not.")
        eigenvalues, vectors = eigh_of_many(precision)
        rounding = precision.shape[-1] * torch.finfo(torch.float64).eps * eigenvalues.abs().amax(-1, keepdim=True)
        if bool((eigenvalues < -rounding).any()):
            raise ValueError(
                f"precision must have no negative eigenvalue; got {float(eigenvalues.min()):.3g}. It is Σφφᵀ over a "
                "variance: see neurosde.likelihood."
            )
        # Directions that the activity never visited have eigenvalues of the size of rounding: nothing is known there.
        visited = eigenvalues > rounding
        return cls(eigenvalues * visited, vectors, cross @ vectors * visited.unsqueeze(-2))

    def scaled(self, scale: Tensor | float) -> Evidence:
        """Return the same evidence in units s₀ times as large: Λ → s₀² Λ and B → s₀ B.

        Args:
            scale: s₀, shape () or (...).
        """
        unit = torch.as_tensor(scale, dtype=torch.float64, device=self.eigenvalues.device).unsqueeze(-1)
        return Evidence(unit.square() * self.eigenvalues, self.vectors, unit.unsqueeze(-1) * self.cross)

    def to(self, device: torch.device | str) -> Evidence:
        """Return it on a device."""
        vectors = None if self.vectors is None else self.vectors.to(device)
        return Evidence(self.eigenvalues.to(device), vectors, self.cross.to(device))

    def over_noise(self, variance: Tensor) -> Evidence:
        """Return that of the same transitions with noise of another variance, shape (...): Λ and B over it."""
        over = variance.unsqueeze(-1)
        return Evidence(self.eigenvalues / over, self.vectors, self.cross / over.unsqueeze(-1))

    def expand(self, batch: Sequence[int]) -> Evidence:
        """Return the same evidence for each matrix of a batch, without copies."""
        N = self.eigenvalues.shape[-1]
        vectors = None if self.vectors is None else self.vectors.expand(*batch, N, N)
        return Evidence(self.eigenvalues.expand(*batch, N), vectors, self.cross.expand(*batch, N, N))

    def along_neurons(self) -> tuple[Tensor, Tensor]:
        """Return Λ (..., pre, pre) and B (..., post, pre) in the basis of the neurons."""
        if self.vectors is None:
            return torch.diag_embed(self.eigenvalues), self.cross
        return (self.vectors * self.eigenvalues.unsqueeze(-2)) @ self.vectors.mT, self.cross @ self.vectors.mT

    def flat(self) -> Evidence:
        """Return it with one batch dimension."""
        N = self.eigenvalues.shape[-1]
        vectors = None if self.vectors is None else self.vectors.reshape(-1, N, N)
        return Evidence(self.eigenvalues.reshape(-1, N), vectors, self.cross.reshape(-1, N, N))

    def __getitem__(self, index: Any) -> Evidence:
        """Return the evidence of some matrices of a batch."""
        vectors = None if self.vectors is None else self.vectors[index]
        return Evidence(self.eigenvalues[index], vectors, self.cross[index])

    @classmethod
    def none(cls, N: int, device: torch.device | str | None = None) -> Evidence:
        """Return the evidence of no recording: Λ = B = 0."""
        zeros = torch.zeros(N, N, dtype=torch.float64, device=device)
        return cls(zeros[0], None, zeros)


@dataclass(frozen=True)
class Folded:
    """W_s and the evidence in one: the posterior of W for a Gaussian prior of variance v, N(D₀, C) row by row.

    Attributes:
        mean: D₀ along the directions, D₀ U, shape (..., post, direction).
        variances: eigenvalues of C, shape (..., direction).
        prior_variance: v, shape (...).
        vectors: U, shape (..., pre, direction), or None for the identity.
    """

    mean: Tensor
    variances: Tensor
    prior_variance: Tensor
    vectors: Tensor | None

    @property
    def posterior_mean(self) -> Tensor:
        """D₀, shape (..., post, pre)."""
        return _along(self.mean, self.vectors, back=True)

    @property
    def whitened_mean(self) -> Tensor:
        """D₀ C^(−1/2), shape (..., post, pre): the mean in units of what is uncertain about it."""
        return _along(self.mean * self.variances.rsqrt().unsqueeze(-2), self.vectors, back=True)

    def power(self, exponent: float) -> Tensor:
        """C to a power, shape (..., pre, pre)."""
        if self.vectors is None:
            return torch.diag_embed(self.variances**exponent)
        return (self.vectors * (self.variances**exponent).unsqueeze(-2)) @ self.vectors.mT

    @property
    def network_input(self) -> Tensor:
        """Z = D₀ (vI − C)^(−1/2), shape (..., post, pre): under the prior each row has unit covariance."""
        v = self.prior_variance.unsqueeze(-1)
        gained = v - self.variances  # what is known, of the prior's variance
        inverse = torch.where(gained > 0, gained, 1).rsqrt() * (gained > 0)
        return _along(self.mean * inverse.unsqueeze(-2), self.vectors, back=True)

    def scaled(self, F: Tensor) -> Tensor:
        """F C^(1/2), shape (..., post, pre)."""
        return _along(_along(F, self.vectors) * self.variances.sqrt().unsqueeze(-2), self.vectors, back=True)

    def whitened(self, residual: Tensor) -> Tensor:
        """Residual C^(−1/2), shape (..., post, pre)."""
        return _along(_along(residual, self.vectors) * self.variances.rsqrt().unsqueeze(-2), self.vectors, back=True)

    def loss(self, F: Tensor, weights: Tensor) -> Tensor:
        """‖(D₀ + F C^(1/2) − W) C^(−1/2)‖²/N² of each matrix, shape (...): 1 for F = 0 under a Gaussian prior."""
        return (F - self.whitened(weights - self.posterior_mean)).square().mean((-1, -2))


def fold(x: Tensor, sigma: Tensor | float, evidence: Evidence, prior_variance: Tensor | float = 1.0) -> Folded:
    """Fold a noisy matrix and the evidence into one.

    Args:
        x: W_s, shape (..., post, pre).
        sigma: noise level s > 0, shape () or (...).
        evidence: what recordings say.
        prior_variance: v, shape () or (...).

    Returns:
        The posterior for a Gaussian prior, in float64.
    """
    x = x.double()
    s = torch.as_tensor(sigma, dtype=torch.float64, device=x.device).unsqueeze(-1)
    v = torch.as_tensor(prior_variance, dtype=torch.float64, device=x.device)
    variances = 1 / (evidence.eigenvalues + s**-2 + 1 / v.unsqueeze(-1))
    mean = (evidence.cross + _along(x, evidence.vectors) / s.unsqueeze(-1).square()) * variances.unsqueeze(-2)
    return Folded(mean, variances, v, evidence.vectors)


def _along(matrix: Tensor, vectors: Tensor | None, back: bool = False) -> Tensor:
    """Rows of a matrix along the directions, or from them back to neurons."""
    if vectors is None:
        return matrix
    return matrix @ (vectors.mT if back else vectors)


def largest_sigma(variance: float, N: int, alignment: float = 1.0) -> float:
    """σ_max at which nothing of W can be told: five standard deviations of its most variable feature, at least 80.

    Args:
        variance: prior variance of an entry, 1 in J units.
        N: neurons.
        alignment: largest eigenvalue of Cov(vec J) over `variance`; 1 for independent entries, up to N² where all
            entries move together, as with an unknown mean.

    References:
        Improved techniques for training score-based generative models (Song, Ermon, 2020), section 3.1,
        https://arxiv.org/abs/2006.09011
    """
    check_positive(variance, "variance")
    if not 1 <= alignment <= N**2:
        raise ValueError(f"alignment must lie between 1 and N² = {N**2}; got {alignment}.")
    return max(80.0, 5 * math.sqrt(variance * alignment))


def noise_levels(
    steps: int,
    sigma_max: float = 80.0,
    sigma_min: float = SIGMA_MIN,
    peaks: Sequence[tuple[float, float, float]] = (DECISIVE,),
    elsewhere: float = ELSEWHERE,
) -> Tensor:
    """Noise levels from σ_max to σ_min, then 0; shape (steps + 1,), float64.

    They are dense where structure is decided, which is where a denoiser bends: in u = log s their density is

        ∝ Σ a exp(−(u − m)²/(2b²)) + e

    over `peaks` (a, m, b), by default one, (1, 1, 1.8), with e = `elsewhere`, 0.5. Signs of columns, clusters, factors
    and the gain become certain between s = 40 and 0.5, each within a narrow range, and where levels are far apart
    there, draws come out too small. Signs of small weights are decided last: with a density of 0.2 there in place of
    0.5, 3 % more weights were small.

    Raises:
        ValueError: fewer than two steps, or levels that do not fall.
    """
    if steps < 2:
        raise ValueError(f"steps must be at least 2; got {steps}.")
    if not 0 < sigma_min < sigma_max < math.inf:
        raise ValueError(f"sigma_max must exceed sigma_min > 0; got {sigma_max} and {sigma_min}.")
    u = np.linspace(math.log(sigma_max), math.log(sigma_min), 10_001)
    heights = (height * np.exp(-0.5 * ((u - mean) / sd) ** 2) for height, mean, sd in peaks)
    density = sum(heights, np.full_like(u, elsewhere))
    passed = np.concatenate([[0.0], np.cumsum(density[1:] + density[:-1])])
    levels = np.exp(np.interp(np.linspace(0, passed[-1], steps), passed, u))
    levels[0], levels[-1] = sigma_max, sigma_min
    return torch.cat([torch.from_numpy(levels), torch.zeros(1, dtype=torch.float64)])
