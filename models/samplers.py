"""Samplers: from noise to weights, with any denoiser.

Forward, W_s = W + s ε adds noise; backward, its probability flow is dW/ds = (W_s − D(W_s; s))/s, along which the law of
W_s is the same as of the noising process. D(·; 0) is the identity, so that no step to 0 evaluates D at its end.

    multistep  fourth order: exact for a Gaussian, see below; one evaluation a step
    heun       second order: the slope is averaged over the step's two ends; two evaluations a step
    dpmpp_2m   second order: D is extrapolated in log s from the step before; one evaluation a step
    sde        multistep with fresh noise, which forgets the errors of earlier steps; exact for a Gaussian, too

Multistep splits off the Gaussian that comes nearest to the prior, N(0, v) iid, as EDM's preconditioning does:

    D = v/(s² + v) W_s + s√v/√(s² + v) F,    y = W_s/√(s² + v),    θ = arctan(s/√v)    ⇒    dy/dθ = −F.

F is 0 where the prior is that Gaussian. It is extrapolated as the polynomial in log s through its last three values,
Σ_k ℓ_k(log s) F_k, so that the step is y_t = y_s + Σ_k F_k ∫ ℓ_k(log s) dθ. The next step evaluates F at its end, and
with that value for a fourth the step is made once more, without another evaluation; long steps are not. The first steps
have fewer values and lower order; from σ_max = 80 they turn θ by less than 0.01.

A recording is integrated exactly too: for the Gaussian prior its posterior is Gaussian, with precision λ + 1/v along
each eigenvector of Λ. Along it the same holds about the posterior's mean, with 1/(λ + 1/v) for v. Where the posterior
is that Gaussian any number of steps is exact, however much is known along some directions and however little along
others. All samplers then start from what this Gaussian is at σ_max.

The reverse process may have fresh noise of any variance, η times that of the forward one, if the drift makes up for it
(η = 0 is the flow). Then from s to t, with r = (t² + v)/(s² + v) and r_u = (t² + v)/(u² + v) for u on the way,

    y_t = r^(η/2) y_s + √(1 − r^η) ε + (1 + η) Σ_k F_k ∫ ℓ_k(log u) r_u^(η/2) dθ_u.

A trained network's draws drift along the flow: where it errs, later steps see matrices unlike those it was trained on.
Fresh noise forgets that, at the price of more steps. Long steps take none.

What the correction does: of a trained prior for Dale's law, N = 100, the norms of draws by 40 `noise_levels` differ
from those by 240, from the same noise, by −0.83 ± 0.04 % without it and by −0.02 ± 0.01 % were every step corrected.
Long corrected steps leave zeros spread: of weights known to be 0, D = 0, the draw W_s should be s ε for any s. By `sde`
and 16 to 100 levels its spread is at most 1.1 s with the limits below; with limits half as large again it reaches 60 s.

References:
    Elucidating the design space of diffusion-based generative models (Karras, Aittala, Aila, Laine, 2022),
    algorithm 1, https://arxiv.org/abs/2206.00364
    DPM-Solver++: fast solver for guided sampling of diffusion probabilistic models (Lu, Zhou, Bao, Chen, Li, Zhu,
    2022), algorithm 2 and section 5, https://arxiv.org/abs/2211.01095
    UniPC: a unified predictor-corrector framework for fast sampling of diffusion models (Zhao, Bai, Rao, Zhou, Lu,
    2023), correction without another evaluation, https://arxiv.org/abs/2302.04867
    Simplifying, stabilizing and scaling continuous-time consistency models (Lu, Song, 2024), the angle θ,
    https://arxiv.org/abs/2410.11081
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from neurosde.brownian import as_generator
from neurosde.models.edm import Denoiser, Evidence, noise_levels
from neurosde.validation import check_positive

Method = Literal["multistep", "heun", "dpmpp_2m", "sde"]
STEPS = 64
CHURN = 0.5
ORDER = 3  # of multistep's first guess at a step, once it has as many values; the correction has one more
# Where a weight is known, such as to be 0, y falls as s does: dy/d log s = y c/(c + s²). Steps are measured in log s
# times this rate, and (1 + η): of longer ones than SHORT errors would grow, since F turns with them. They are of second
# order and not corrected; those longer than CHURNED have no fresh noise, which long steps would amplify.
SHORT, CHURNED = 0.6, 0.2


def sample(
    denoise: Denoiser,
    shape: Sequence[int],
    *,
    method: Method = "multistep",
    sigmas: Tensor | None = None,
    start: Tensor | None = None,
    prior_variance: float = 1.0,
    evidence: Evidence | None = None,
    churn: float = CHURN,
    generator: int | torch.Generator | None = None,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> Tensor:
    """Draw from the law whose denoiser is given.

    Args:
        denoise: E[W | W_s], see `Denoiser`.
        shape: of the draws, (..., post, pre).
        method: the sampler.
        sigmas: noise levels, falling, the last one 0; shape (steps + 1,). By default 64 steps from 80.
        start: W_s at the first level instead of pure noise, shape `shape`.
        prior_variance: v, mean square of an entry, which multistep and sde integrate exactly; 1 in J units.
        evidence: what recordings say that `denoise` is conditioned on, if it is.
        churn: η of the method sde: variance of its fresh noise, 1 as in the forward process reversed.
        generator: seed or generator, on the device of the draws.
        device: of the draws; by default that of the generator or of `start`, or the CPU.
        progress: show a progress bar, on a terminal.

    Returns:
        Draws in float64, shape `shape`.

    Raises:
        ValueError: an unknown method, levels that do not fall to 0, a start of another shape, or a prior variance or
            churn that is not positive, or that is given to a method that makes no use of it.
        FloatingPointError: the denoiser returned NaN or infinite values.
    """
    if method not in get_args(Method):
        raise ValueError(f"method must be one of {get_args(Method)}; got {method!r}.")
    check_positive(prior_variance, "prior_variance")
    check_positive(churn, "churn")
    if prior_variance != 1 and method not in ("multistep", "sde"):
        raise ValueError(f"prior_variance is for methods 'multistep' and 'sde'; got {prior_variance} with {method!r}.")
    if churn != CHURN and method != "sde":
        raise ValueError(f"churn is for method='sde'; got {churn} with {method!r}.")
    levels = noise_levels(STEPS) if sigmas is None else torch.as_tensor(sigmas, dtype=torch.float64)
    falling = levels.ndim == 1 and len(levels) >= 2 and bool((levels[1:] < levels[:-1]).all())
    if not falling or float(levels[-1]) != 0 or not bool(levels.isfinite().all()):
        raise ValueError("sigmas must be finite, strictly falling, and end with 0; use neurosde.models.noise_levels.")
    if device is None:
        known = generator if isinstance(generator, torch.Generator) else start
        device = "cpu" if known is None else known.device
    source = as_generator(generator, device)

    def normal() -> Tensor:
        return torch.randn(*shape, generator=source, dtype=torch.float64, device=device)

    gaussian = Gaussian(float(prior_variance), evidence)
    x = gaussian.noised(float(levels[0]), normal()) if start is None else start.double()
    if x.shape != torch.Size(shape):
        raise ValueError(f"start must have the shape of the draws, {tuple(shape)}; got {tuple(x.shape)}.")
    if method == "multistep":
        step = _multistep(denoise, gaussian)
    elif method == "sde":
        step = _multistep(denoise, gaussian, churn, normal)
    elif method == "heun":
        step = _heun(denoise)
    else:
        step = _dpmpp(denoise)
    with torch.no_grad():
        for s, t in tqdm(
            list(zip(levels[:-1].tolist(), levels[1:].tolist(), strict=True)),
            unit="step",
            disable=None if progress else True,
        ):
            x = step(x, s, t)
            if not bool(x.isfinite().all()):
                raise FloatingPointError(f"the denoiser returned NaN or infinite values at noise level {s:.3g}.")
    return x


Step = Callable[[Tensor, float, float], Tensor]


class Gaussian:
    """The posterior for the prior N(0, v), along its directions: independent entries.

    Args:
        v: prior variance.
        evidence: what recordings say, if they do.

    Attributes:
        mean: m, shape (..., post, direction), or 0.
        variances: c, shape (..., 1, direction), or v.
    """

    def __init__(self, v: float, evidence: Evidence | None) -> None:
        self.vectors = None if evidence is None else evidence.vectors
        self.variances: Tensor | float = v
        self.mean: Tensor | float = 0.0
        if evidence is not None:
            self.variances = 1 / (evidence.eigenvalues.unsqueeze(-2) + 1 / v)
            self.mean = evidence.cross * self.variances

    def noised(self, s: float, z: Tensor) -> Tensor:
        """W_s for a standard normal z; where there is no evidence, s z: what W adds cannot be told from it."""
        if isinstance(self.variances, float):
            return s * z
        return self.back(self.mean + (s**2 + self.variances).sqrt() * z)

    def along(self, x: Tensor) -> Tensor:
        """Rows of a matrix along the directions."""
        return x if self.vectors is None else x @ self.vectors

    def back(self, x: Tensor) -> Tensor:
        """The same from the directions to neurons."""
        return x if self.vectors is None else x @ self.vectors.mT


def _multistep(
    denoise: Denoiser, gaussian: Gaussian, churn: float = 0.0, normal: Callable[[], Tensor] | None = None
) -> Step:
    """Exact where F is a polynomial in log s through its last values, so for the Gaussian at any steps."""
    points: list[float] = []  # log s of the last evaluations, the latest first
    values: list[Tensor] = []  # F there
    # Of the last step: y after it if F were 0, what F adds, and whether it is short.
    made: list[tuple[Tensor, _Weights, bool]] = []
    m = gaussian.mean

    def step(x: Tensor, s: float, t: float) -> Tensor:
        mean = _denoised(denoise, x, s)
        c = torch.as_tensor(gaussian.variances, dtype=torch.float64, device=x.device)
        x, mean = gaussian.along(x) - m, gaussian.along(mean) - m
        total = s**2 + c
        points.insert(0, math.log(s))
        values.insert(0, (mean - c / total * x) * (total / c).sqrt() / s)
        y = x * total.rsqrt()
        if t == 0:  # F stays what it is, and is of this very x: W may be known better than to the last level
            return gaussian.back(m + c.sqrt() * (y + torch.atan(s * c.rsqrt()) * values[0]))
        if made:
            before, weights, short = made.pop()
            if short:  # that step once more, now that F is known at its end
                y = before + weights.integral(points, values)
        length = (1 + churn) * math.log(s / t) * float((c / (t**2 + c)).max())
        fresh = churn if length < CHURNED else 0.0
        del points[ORDER:], values[ORDER:]
        if fresh and normal is not None:
            kept = ((t**2 + c) / total) ** fresh
            y = kept.sqrt() * y + (1 - kept).sqrt() * normal()
        weights = _Weights.of(s, t, c, fresh)
        made.append((y, weights, length < SHORT))
        order = ORDER if length < SHORT else 2
        return gaussian.back(m + (t**2 + c).sqrt() * (y + weights.integral(points[:order], values[:order])))

    return step


@dataclass(frozen=True)
class _Weights:
    """Quadrature of a multistep's step.

    Attributes:
        along: nodes log u, shape (node,).
        angle: (1 + η) r_u^(η/2) dθ_u at each, shape (node, ...).
    """

    along: np.ndarray
    angle: Tensor

    @classmethod
    def of(cls, s: float, t: float, c: Tensor, churn: float) -> _Weights:
        nodes, weights = np.polynomial.legendre.leggauss(32)
        half = math.log(s / t) / 2
        along = math.log(s) - half * (1 + nodes)
        e = torch.as_tensor(along, device=c.device).exp().view(-1, *(1,) * c.ndim)
        # dθ = d(log s)/(s/√c + √c/s)
        angle = torch.as_tensor(half * weights, device=c.device).view_as(e) / (e * c.rsqrt() + c.sqrt() / e)
        if churn:
            angle = (1 + churn) * angle * ((t**2 + c) / (e.square() + c)) ** (churn / 2)
        return cls(along, angle)

    def integral(self, points: list[float], values: list[Tensor]) -> Tensor:
        """Σ_k F_k ∫ ℓ_k, for F known at some log s."""
        total = torch.zeros_like(values[0])
        for k, (point, value) in enumerate(zip(points, values, strict=True)):
            others = np.array([p for j, p in enumerate(points) if j != k])
            lagrange = np.prod((self.along[:, None] - others) / (point - others), axis=1)
            total += torch.tensordot(torch.as_tensor(lagrange, device=value.device), self.angle, 1) * value
        return total


def _heun(denoise: Denoiser) -> Step:
    def step(x: Tensor, s: float, t: float) -> Tensor:
        slope = (x - _denoised(denoise, x, s)) / s
        ahead = x + (t - s) * slope
        if t == 0:
            return ahead
        return x + (t - s) / 2 * (slope + (ahead - _denoised(denoise, ahead, t)) / t)

    return step


def _dpmpp(denoise: Denoiser) -> Step:
    """Exact where D is linear in log s between the steps."""
    before: list[tuple[Tensor, float]] = []  # D and log s of the last step

    def step(x: Tensor, s: float, t: float) -> Tensor:
        mean = _denoised(denoise, x, s)
        if t == 0:
            return mean
        log_s, h = math.log(s), math.log(s / t)
        target = mean
        if before:
            last, log_last = before.pop()
            target = mean + h / (2 * (log_last - log_s)) * (mean - last)
        before.append((mean, log_s))
        ratio = t / s
        return ratio * x + (1 - ratio) * target

    return step


def _denoised(denoise: Denoiser, x: Tensor, s: float) -> Tensor:
    return denoise(x, torch.tensor(s, dtype=torch.float64, device=x.device)).double()
