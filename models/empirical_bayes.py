"""Noise and gain from the recording itself, and point estimates with their ridge parameter.

A real recording comes without σ and g. With the weights integrated out, the transitions' probability given the noise
scale s and the prior variance v is closed form in the eigenvalues λ_k of Σφφᵀ and P = (Σyφᵀ)U:

    log p(y) = Σ_i { −n/2 log 2πs² − ½ Σ_k log(1 + vλ_k/s²) − (Σy_i² − Σ_k P_ik²/(λ_k + r))/2s² },   r = s²/v.

Given r, the best s² is explicit, so that one number is left to search.

References:
    Bayesian interpolation (MacKay, 1992), https://doi.org/10.1162/neco.1992.4.3.415
    Generalized cross-validation as a method for choosing a good ridge parameter (Golub, Heath, Wahba, 1979),
    https://doi.org/10.1080/00401706.1979.10489751
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy.special
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from neurosde.likelihood import TransitionStatistics
from neurosde.models.edm import Evidence
from neurosde.models.gaussian_posterior import gaussian_log_evidence
from neurosde.time_constant import TimeConstantStatistics
from neurosde.validation import check_positive

GAINS = 121  # tried of a batch of recordings
NOISE_GRID = 81
TAU_GRID = 41


@dataclass(frozen=True)
class EmpiricalBayes:
    """Noise and prior that a recording makes most probable.

    Attributes:
        noise_std: σ per √time.
        prior_variance: variance v of a weight.
        log_evidence: log probability of the transitions with the weights integrated out.
        at_floor: whether σ is not larger than what rounding of the recording alone would look like.
    """

    noise_std: float
    prior_variance: float
    log_evidence: float
    at_floor: bool

    def gain(self, N: int) -> float:
        """Return g = √(N v)."""
        return math.sqrt(N * self.prior_variance)


class _Spectrum:
    """The statistics in the eigenbasis of Σφφᵀ, as numpy."""

    def __init__(self, statistics: TransitionStatistics) -> None:
        eigenvalues, self.vectors, self.projections = statistics.spectrum()
        self.eigenvalues = eigenvalues.numpy()
        self.power = self.projections.square().sum(0).numpy()
        self.total = float(statistics.yy.sum())
        # Σy² − ΣP²/(λ + r) would lose what r does to rounding where there is no noise: split off its part at r = 0.
        self.shrinkable = np.divide(self.power, self.eigenvalues, where=self.eigenvalues > 0, out=0 * self.power)
        self.residual = max(self.total - float(self.shrinkable.sum()), 0.0)
        self.rows = statistics.num_neurons
        self.n = statistics.degrees

    def log_evidence(self, s2: float, v: float) -> float:
        """Up to the change of variables from y to h, which depends on neither."""
        misfit = self.misfit(s2 / v)
        log_determinant = float(np.log1p(v * self.eigenvalues / s2).sum())
        return -0.5 * (self.rows * (self.n * math.log(2 * math.pi * s2) + log_determinant) + misfit / s2)

    def log_evidences(self, s2: np.ndarray, v: np.ndarray) -> np.ndarray:
        """`log_evidence` of each pair, shape (len(s2), len(v))."""
        s2, v = s2[:, None, None], v[None, :, None]
        r = s2 / v
        misfit = self.residual + (self.shrinkable * r / (self.eigenvalues + r)).sum(-1)
        log_determinant = np.log1p(self.eigenvalues / r).sum(-1)
        s2 = s2[..., 0]
        return np.asarray(-0.5 * (self.rows * (self.n * np.log(2 * math.pi * s2) + log_determinant) + misfit / s2))

    def best_noise(self, r: float) -> float:
        """The s² that maximises the evidence at r = s²/v."""
        return self.misfit(r) / (self.rows * self.n)

    def misfit(self, r: float) -> float:
        """Σy² − Σ P²/(λ + r)."""
        return self.residual + float((self.shrinkable * r / (self.eigenvalues + r)).sum())


def empirical_bayes(
    statistics: TransitionStatistics, *, noise_std: float | None = None, prior_variance: float | None = None
) -> EmpiricalBayes:
    """Estimate what is not given of the noise and the prior variance by maximising the evidence.

    Args:
        statistics: sums over the transitions.
        noise_std: σ where it is known.
        prior_variance: v = g²/N where the gain is known.

    Returns:
        Both, given or estimated; σ is not below the statistics' `noise_floor`.

    Raises:
        ValueError: a given value is not positive, or the recording is silent and does not tell what is missing.
    """
    spectrum = _Spectrum(statistics)
    if (noise_std is None or prior_variance is None) and not (spectrum.total > 0 and spectrum.eigenvalues.any()):
        raise ValueError("the recording is silent: gain and noise cannot be estimated from it; give both.")
    floor = statistics.noise_scale(statistics.noise_floor) ** 2
    scale = max(spectrum.total / (spectrum.rows * spectrum.n), floor, 1e-300)
    if noise_std is not None:
        check_positive(noise_std, "noise_std", zero_ok=True)
        s2 = max(statistics.noise_scale(noise_std) ** 2, floor)
    if prior_variance is not None:
        check_positive(prior_variance, "prior_variance")

    if noise_std is None and prior_variance is None:

        def profile(r: float) -> tuple[float, float]:
            best = max(spectrum.best_noise(r), floor)
            return best, best / r

        typical = float(spectrum.eigenvalues.mean())
        r = _maximise(lambda r: spectrum.log_evidence(*profile(r)), typical)
        s2, v = profile(r)
    elif noise_std is None:
        assert prior_variance is not None
        v = prior_variance
        s2 = _maximise(lambda value: spectrum.log_evidence(max(value, floor), v), scale)
        s2 = max(s2, floor)
    elif prior_variance is None:
        typical = s2 / float(spectrum.eigenvalues.mean())
        v = _maximise(lambda value: spectrum.log_evidence(s2, value), typical)
    else:
        v = prior_variance
    return EmpiricalBayes(
        noise_std=statistics.noise_std(math.sqrt(s2)),
        prior_variance=v,
        log_evidence=spectrum.log_evidence(s2, v) - spectrum.rows * statistics.log_volume,
        at_floor=s2 <= 1.01 * floor,
    )


def evidence_gain(evidence: Evidence, low: float, high: float) -> Tensor:
    """Root mean square over the posterior of the gain g = √(N v) of the prior W ~ N(0, v), σ known.

    The mean square of W given the recording, and not the most probable gain, which a short recording can put anywhere.

    Args:
        evidence: Λ and B in units of W, shapes (..., direction) and (..., post, direction).
        low: smallest gain; all between this and the largest are equally probable before the recording.
        high: largest gain.

    Returns:
        √(E g²), shape (...).
    """
    N = evidence.eigenvalues.shape[-1]
    squares = torch.linspace(low, high, GAINS, dtype=torch.float64, device=evidence.cross.device).square()
    return (gaussian_log_evidence(evidence, squares / N).softmax(-1) @ squares).sqrt()


def sample_noise_scales(
    statistics: TransitionStatistics,
    count: int,
    gains: tuple[float, float],
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw the noise s of a transition (`TransitionStatistics.noise_scale` of σ) from its posterior.

    W has the prior N(0, g²/N) and is integrated out, as is log g, uniform over a range; so is log s. Both on a grid,
    whose cells the draws are uniform in.

    Args:
        statistics: sums over the transitions.
        count: number of draws.
        gains: range of g.
        generator: of the draws.

    Returns:
        s, shape (count,), float64, on the CPU, not below the floor of rounding.

    Raises:
        ValueError: the recording is silent.
    """
    log_s, density = _noise_density(statistics, gains)
    drawn = np.exp(_from_grid(log_s, density, _uniform(count, generator)))
    return torch.as_tensor(np.maximum(drawn, statistics.noise_scale(statistics.noise_floor)))


def sample_time_constants(
    recording: TimeConstantStatistics,
    count: int,
    gains: tuple[float, float],
    noise_std: float | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw the time constant τ and the noise s of a transition from their joint posterior.

    As `sample_noise_scales`; log τ is uniform over its range beforehand. A free input has a flat prior on what drives,
    b I, whatever τ is.

    Args:
        recording: sums over the transitions for any τ.
        count: number of draws.
        gains: range of g.
        noise_std: σ, where it is known.
        generator: of the draws.

    Returns:
        τ and s, shape (count,) each, float64, on the CPU.

    Raises:
        ValueError: the recording is silent.
    """
    log_tau, density = _time_constant_density(recording, gains, noise_std)
    taus = np.exp(_from_grid(log_tau, density, _uniform(count, generator)))
    taus = np.clip(taus, recording.low, recording.high)
    shares = _uniform(count, generator)
    scales = np.empty(count)
    for k, tau in enumerate(taus):
        statistics = recording.at(float(tau))
        floor = statistics.noise_scale(statistics.noise_floor)
        if noise_std is None:
            scales[k] = np.exp(_from_grid(*_noise_density(statistics, gains), shares[k]))
        else:
            scales[k] = statistics.noise_scale(noise_std)
        scales[k] = max(scales[k], floor)
    return torch.as_tensor(taus), torch.as_tensor(scales)


def most_probable_time_constant(
    recording: TimeConstantStatistics, gains: tuple[float, float], noise_std: float | None = None
) -> float:
    """Return the time constant that the recording makes most probable, see `sample_time_constants`.

    Raises:
        ValueError: the recording is silent.
    """
    log_tau, density = _time_constant_density(recording, gains, noise_std)
    return float(np.clip(np.exp(log_tau[density.argmax()]), recording.low, recording.high))


def _time_constant_density(
    recording: TimeConstantStatistics, gains: tuple[float, float], noise_std: float | None
) -> tuple[np.ndarray, np.ndarray]:
    """Log posterior density of log τ up to a constant, on a grid that holds nearly all of it."""
    N = recording.num_neurons

    def log_density(log_tau: float) -> float:
        statistics = recording.at(math.exp(log_tau))
        if noise_std is None:
            log_s, density = _noise_density(statistics, gains)
            found = scipy.special.logsumexp(density) + math.log(log_s[1] - log_s[0])
        else:
            scale = max(statistics.noise_scale(noise_std), statistics.noise_scale(statistics.noise_floor))
            spectrum = _audible(statistics)
            v, log_step = _gain_grid(spectrum, scale**2, gains)
            found = scipy.special.logsumexp(spectrum.log_evidences(np.array([scale**2]), v)) + log_step
        # Of an input what drives, b I, has the flat prior: that of I itself would favour large τ.
        return float(found) - N * (statistics.log_volume - statistics.free_input * math.log(statistics.gain))

    low, high = math.log(recording.low), math.log(recording.high)
    for _ in range(12):
        grid = np.linspace(low, high, TAU_GRID)
        density = np.array([log_density(point) for point in grid])
        held = np.flatnonzero(density > density.max() - 20)
        first, last = max(held[0] - 1, 0), min(held[-1] + 1, TAU_GRID - 1)
        if last - first > TAU_GRID // 2:
            break
        low, high = grid[first], grid[last]
    return grid, density


def _noise_density(statistics: TransitionStatistics, gains: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
    """Log posterior density of log s up to what depends on s not, on a grid that holds nearly all of it."""
    spectrum, N = _audible(statistics), statistics.num_neurons
    # Given r = s²/v the most probable s² is explicit, which leads near the mode.
    r = spectrum.eigenvalues.mean() * np.geomspace(1e-24, 1e10, 137)[:, None]
    s2 = spectrum.residual + (spectrum.shrinkable * r / (spectrum.eigenvalues + r)).sum(-1)
    s2 = np.maximum(s2 / (spectrum.rows * spectrum.n), 1e-300)
    profile = spectrum.n * np.log(s2) + np.log1p(spectrum.eigenvalues / r).sum(-1)
    centre = 0.5 * math.log(s2[profile.argmin()])
    v, log_step = _gain_grid(spectrum, math.exp(2 * centre), gains)
    # Of n transitions of N neurons log s is known to 1/√(2nN) at best, and to more where few of them are left over.
    width = 1 / math.sqrt(2 * N * statistics.degrees)
    for _ in range(30):
        log_s = centre + width * np.linspace(-8, 8, NOISE_GRID)
        density = np.asarray(scipy.special.logsumexp(spectrum.log_evidences(np.exp(2 * log_s), v), axis=1)) + log_step
        if density[[0, -1]].max() < density.max() - 20 or width > 1:
            break
        width *= 1.5
    return log_s, density


def _audible(statistics: TransitionStatistics) -> _Spectrum:
    spectrum = _Spectrum(statistics)
    if not (spectrum.total > 0 and spectrum.eigenvalues.any()):
        raise ValueError("the recording is silent: nothing can be estimated from it; give gain, noise and tau.")
    return spectrum


def _gain_grid(spectrum: _Spectrum, s2: float, gains: tuple[float, float]) -> tuple[np.ndarray, float]:
    """Prior variances of gains evenly spaced in log g where they are probable, and the logarithm of the spacing."""
    low, high = np.log(gains)
    if low == high:
        return np.exp(2 * np.array([low])) / spectrum.rows, 0.0
    for _ in range(8):
        grid = np.linspace(low, high, NOISE_GRID // 2)
        density = spectrum.log_evidences(np.array([s2]), np.exp(2 * grid) / spectrum.rows)[0]
        held = np.flatnonzero(density > density.max() - 30)
        first, last = max(held[0] - 1, 0), min(held[-1] + 1, len(grid) - 1)
        if last - first > len(grid) // 2:
            break
        low, high = grid[first], grid[last]
    return np.exp(2 * grid) / spectrum.rows, math.log(grid[1] - grid[0])


def _uniform(count: int, generator: torch.Generator | None) -> np.ndarray:
    device = None if generator is None else generator.device
    drawn: np.ndarray = torch.rand(count, generator=generator, dtype=torch.float64, device=device).cpu().numpy()
    return drawn


def _from_grid(grid: np.ndarray, log_density: np.ndarray, share: np.ndarray | float) -> np.ndarray:
    """Quantiles of a density on an even grid, uniform within the cells about its points."""
    half = 0.5 * (grid[1] - grid[0])
    cumulated = np.concatenate([[0], np.cumsum(np.exp(log_density - log_density.max()))])
    cells = np.concatenate([grid - half, [grid[-1] + half]])
    return np.interp(share * cumulated[-1], cumulated, cells)


def ridge_parameter(statistics: TransitionStatistics, choice: str | float = "cross-validation") -> float:
    """The λ of ridge regression, by generalised cross-validation or by evidence.

    Args:
        statistics: sums over the transitions.
        choice: "cross-validation", "evidence", or λ itself.

    Raises:
        ValueError: neither of these.
    """
    if not isinstance(choice, str):
        return check_positive(choice, "ridge parameter")
    if choice == "evidence":
        estimate = empirical_bayes(statistics)
        return statistics.noise_scale(estimate.noise_std) ** 2 / estimate.prior_variance
    if choice != "cross-validation":
        raise ValueError(f"ridge parameter must be 'cross-validation', 'evidence' or a number; got {choice!r}.")
    spectrum = _Spectrum(statistics)
    eigenvalues, power, n = spectrum.eigenvalues, spectrum.power, spectrum.n

    def score(r: float) -> float:
        residual = spectrum.total - float((power * (eigenvalues + 2 * r) / (eigenvalues + r) ** 2).sum())
        freedom = 1 - float((eigenvalues / (eigenvalues + r)).sum()) / n
        return -math.log(max(residual, 1e-300)) + 2 * math.log(max(freedom, 1e-300))

    return _maximise(score, float(eigenvalues.mean()) or 1.0)


def ridge(statistics: TransitionStatistics, parameter: str | float = "cross-validation") -> Tensor:
    """Ridge estimate of W (post, pre): argmin Σ|y − Wφ|² + λ|W|²."""
    spectrum = _Spectrum(statistics)
    r = ridge_parameter(statistics, parameter)
    return spectrum.projections / (torch.as_tensor(spectrum.eigenvalues) + r) @ spectrum.vectors.mT


def least_squares(statistics: TransitionStatistics) -> Tensor:
    """Least-squares estimate of W (post, pre); of minimum norm where the activity does not span all neurons."""
    return statistics.yx @ torch.linalg.pinv(statistics.xx, hermitian=True)


def _maximise(objective: Callable[[float], float], typical: float) -> float:
    """Maximise over a positive number: a grid over 34 decades about a typical value, then Brent's method.

    Noise-free recordings put r = s²/v some 17 decades below the eigenvalues, hence the width.
    """
    grid = math.log(typical) + np.log(10) * np.linspace(-24, 10, 137)
    values = [objective(math.exp(point)) for point in grid]
    best = int(np.argmax(values))
    low, high = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    found = minimize_scalar(
        lambda p: -objective(math.exp(p)), bounds=(low, high), method="bounded", options={"xatol": 1e-9}
    )
    return math.exp(float(found.x))
