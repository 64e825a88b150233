"""The exact posterior over weights for a Gaussian prior.

With W_ij ~ N(0, v) iid and transitions of precision Λ and B (see `neurosde.likelihood`) the posterior is matrix normal:
rows independent, W_i ~ N(mean_i, C) with C = (Λ + I/v)⁻¹ and mean = BC. Its mean is ridge regression with λ = s²/v.

References:
    Bayesian inference in statistical analysis (Box, Tiao, 1973), chapter 8, https://doi.org/10.1002/9781118033197
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from neurosde.brownian import as_generator
from neurosde.likelihood import TransitionStatistics
from neurosde.models.edm import Evidence
from neurosde.validation import check_positive


class GaussianPosterior:
    """A matrix-normal distribution over W: independent rows with one covariance C. All in float64.

    The covariance is held by its eigenvectors and standard deviations: a recording without noise leaves some directions
    of W known 10¹⁰ times better than others, which C itself could not hold to rounding.

    Args:
        mean: posterior mean (post, pre), shape (neuron, neuron).
        directions: orthonormal eigenvectors of C as columns, shape (pre, direction).
        direction_sd: standard deviation of a row along each of them, shape (direction,).
        prior_variance: variance v of the prior of an entry; infinite for a flat prior.
        noise_std: σ that the posterior is conditioned on.

    Raises:
        ValueError: shapes that do not fit, or a standard deviation that is not positive.
    """

    def __init__(
        self, mean: Tensor, directions: Tensor, direction_sd: Tensor, prior_variance: float, noise_std: float
    ) -> None:
        N = mean.shape[-1]
        if mean.ndim != 2 or directions.shape != (N, N) or direction_sd.shape != (N,):
            raise ValueError(
                f"mean (post, pre), directions (pre, pre) and direction_sd (pre,) must fit; got {tuple(mean.shape)}, "
                f"{tuple(directions.shape)} and {tuple(direction_sd.shape)}."
            )
        if not bool((direction_sd > 0).all()):
            raise ValueError("direction_sd must be positive: a row's covariance must be positive definite.")
        self.mean = mean
        self.directions = directions
        self.direction_sd = direction_sd
        self.prior_variance = prior_variance
        self.noise_std = noise_std

    @classmethod
    def from_statistics(
        cls, statistics: TransitionStatistics, noise_std: float, prior_variance: float
    ) -> GaussianPosterior:
        """Condition the prior N(0, prior_variance) on a recording.

        σ below the statistics' `noise_floor` (σ = 0 included) is taken at the floor: W is then determined on the span
        of the activity to the precision of the recording, and keeps its prior off it.

        Args:
            statistics: sums over the transitions.
            noise_std: σ per √time.
            prior_variance: variance of an entry, g²/N; `math.inf` for a flat prior.

        Raises:
            ValueError: the prior variance is not positive, or a flat prior meets activity that does not span all
                neurons.
        """
        check_positive(noise_std, "noise_std", zero_ok=True)
        if not prior_variance > 0:
            raise ValueError(f"prior_variance must be positive; got {prior_variance}.")
        sigma = max(noise_std, statistics.noise_floor)
        noise_variance = statistics.noise_scale(sigma) ** 2
        eigenvalues, vectors, projections = statistics.spectrum()
        if math.isinf(prior_variance):
            rank = int((eigenvalues > 0).sum())
            if rank < len(eigenvalues) or statistics.degrees < len(eigenvalues):
                raise ValueError(
                    f"without a prior, W is undetermined: the activity spans {rank} of {len(eigenvalues)} directions "
                    f"in {statistics.degrees} transitions. Record longer, or use method 'exact' or 'ridge'."
                )
        scaled = eigenvalues + noise_variance / prior_variance
        sd = (noise_variance / scaled).sqrt()
        return cls(projections / scaled @ vectors.mT, vectors, sd, prior_variance, sigma)

    @property
    def factor(self) -> Float[Tensor, "pre direction"]:
        """F with C = F Fᵀ, shape (pre, direction)."""
        return self.directions * self.direction_sd

    @property
    def covariance(self) -> Float[Tensor, "pre other"]:
        """Covariance C of a row, shape (pre, pre)."""
        return self.factor @ self.factor.mT

    @property
    def sd(self) -> Float[Tensor, "post pre"]:
        """Standard deviation of each weight, (post, pre)."""
        return self.factor.norm(dim=-1).expand_as(self.mean)

    @property
    def contraction(self) -> float:
        """1 − posterior variance / prior variance, averaged over the weights: 0 has learnt nothing, 1 everything.

        Without a prior there is nothing to contract from: NaN.
        """
        if math.isinf(self.prior_variance):
            return math.nan
        return 1 - float(self.covariance.diagonal().mean()) / self.prior_variance

    def sample(self, shape: Sequence[int] = (), generator: int | torch.Generator | None = None) -> Tensor:
        """Draw weights, shape (*shape, post, pre)."""
        source = as_generator(generator)
        z = torch.randn(*shape, *self.mean.shape, generator=source, dtype=self.mean.dtype)
        return self.mean + z @ self.factor.mT

    def log_prob(self, weights: Float[Tensor, "*batch post pre"]) -> Float[Tensor, "*batch"]:
        """Log density of W, shape (...)."""
        z = self.whiten(weights)
        rows, columns = self.mean.shape
        log_determinant = rows * self.direction_sd.log().sum()
        return -0.5 * z.square().sum((-1, -2)) - log_determinant - 0.5 * rows * columns * math.log(2 * math.pi)

    def whiten(self, weights: Float[Tensor, "*batch post pre"]) -> Float[Tensor, "*batch post pre"]:
        """Map W to what is standard normal under the posterior, (W − mean) along each direction over its sd."""
        return (weights.to(self.mean.dtype) - self.mean) @ self.directions / self.direction_sd

    def interval(self, level: float) -> tuple[Tensor, Tensor]:
        """Lower and upper end of the central interval of each weight, each (post, pre).

        Raises:
            ValueError: the level is not between 0 and 1.
        """
        if not 0 < level < 1:
            raise ValueError(f"level must lie between 0 and 1; got {level}.")
        half = math.sqrt(2) * float(torch.erfinv(torch.tensor(level, dtype=torch.float64))) * self.sd
        return self.mean - half, self.mean + half


def gaussian_log_evidence(evidence: Evidence, variances: Tensor) -> Tensor:
    """Log of how probable a recording is for the prior W_ij ~ N(0, v), of each of some v, less what does not hang on v.

    log ∫ N(W; 0, v) exp(tr(BWᵀ) − ½ tr(WΛWᵀ)) dW = ½ Σ_k (v |b_k|²/(1 + vλ_k) − n log(1 + vλ_k)), with λ_k the
    eigenvalues of Λ, b_k the columns of B along its eigenvectors, and n rows. Of a precise recording the first part is
    nearly |b_k|²/λ_k whatever v is, and rounding would hide the rest: it is taken less that of the largest variance r,

        v/(1 + vλ) − r/(1 + rλ) = (v − r)/((1 + vλ)(1 + rλ)).

    Args:
        evidence: Λ and B in units of W, shapes (..., direction) and (..., post, direction).
        variances: v, shape (component,).

    Returns:
        Log evidences up to a constant of each recording and set of variances, shape (..., component).
    """
    v, r = variances.unsqueeze(-1), variances.max()
    eigenvalues = evidence.eigenvalues.unsqueeze(-2)
    power, rows = evidence.cross.square().sum(-2).unsqueeze(-2), evidence.cross.shape[-2]
    explained = power * (v - r) / (1 + v * eigenvalues) / (1 + r * eigenvalues)
    return 0.5 * (explained - rows * torch.log1p(v * eigenvalues)).sum(-1)
