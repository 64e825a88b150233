"""The density that a denoiser's probability flow gives a matrix.

In the coordinates of `neurosde.models.samplers`, along the eigenvectors of Λ, the flow is dy/dθ = −F, with y standard
normal at σ_max. Followed backwards from W it gives

    log p(W) = log N(y(θ_max); 0, 1) − ∫ tr(∂F/∂y) dθ − Σ ½ log c,

exactly where F = 0. Begun at a noise level s instead of 0, it gives the density of W + s ε. Heun's method follows y and
the trapezoid rule the trace: second order in the steps. The trace is exact, or Hutchinson's estimate from random signs,
without bias.

References:
    Score-based generative modeling through stochastic differential equations (Song, Sohl-Dickstein, Kingma, Kumar,
    Ermon, Poole, 2021), section 4.3, https://arxiv.org/abs/2011.13456
    A stochastic estimator of the trace of the influence matrix for Laplacian smoothing splines (Hutchinson, 1989),
    https://doi.org/10.1080/03610918908812806
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from tqdm import tqdm

from neurosde.brownian import as_generator
from neurosde.models.edm import Denoiser, Evidence, noise_levels
from neurosde.models.samplers import Gaussian
from neurosde.validation import check_count, check_positive

STEPS = 64


def flow_log_density(
    denoise: Denoiser,
    x: Tensor,
    *,
    sigmas: Tensor | None = None,
    prior_variance: float = 1.0,
    evidence: Evidence | None = None,
    resolution: float = 0.0,
    probes: int | None = 8,
    generator: int | torch.Generator | None = None,
    progress: bool = False,
) -> Tensor:
    """Log density of matrices under the law whose denoiser is given.

    Args:
        denoise: E[W | W_s], differentiable in W_s.
        x: matrices W, shape (..., post, pre).
        sigmas: noise levels, falling, the last one 0; by default 64 from 80.
        prior_variance: v, see `neurosde.models.sample`.
        evidence: what recordings say that `denoise` is conditioned on, if it is.
        resolution: noise level s of the law of W + s ε whose density is given, 0 for that of W.
        probes: number of random signs that each trace is estimated from; None computes it, at the cost of an evaluation
            for each entry.
        generator: seed or generator of the signs, on the device of x.
        progress: show a progress bar, on a terminal.

    Returns:
        log p(W), shape (...), float64.

    Raises:
        ValueError: fewer than one probe, or a resolution that is not below the largest noise level.
    """
    if probes is not None:
        check_count(probes, "probes")
    source = as_generator(generator, x.device)
    levels = (noise_levels(STEPS) if sigmas is None else sigmas).tolist()
    if check_positive(resolution, "resolution", zero_ok=True) >= levels[0]:
        raise ValueError(f"resolution must be below the largest noise level {levels[0]:g}; got {resolution}.")
    gaussian = Gaussian(prior_variance, evidence)
    c = torch.as_tensor(gaussian.variances, dtype=torch.float64, device=x.device)
    batch, (rows, columns) = x.shape[:-2], x.shape[-2:]
    wide = torch.ones(rows, columns, dtype=torch.float64, device=x.device)

    def angle(s: float) -> Tensor:
        return torch.atan(s * c.rsqrt()) * wide

    def slope(y: Tensor, s: float) -> Tensor:
        total = s**2 + c
        at = gaussian.back(gaussian.mean + total.sqrt() * y)
        mean = denoise(at, torch.tensor(s, dtype=torch.float64, device=x.device)).double()
        along = gaussian.along(mean) - gaussian.mean
        return (along - c / total.sqrt() * y) * (total / c).sqrt() / s

    def slope_and_trace(y: Tensor, s: float, turned: Tensor) -> tuple[Tensor, Tensor]:
        """F and Σ ∂F/∂y dθ."""
        with torch.enable_grad():
            y = y.detach().requires_grad_(True)
            F = slope(y, s)
            if probes is None:
                signs = torch.eye(rows * columns, dtype=y.dtype, device=y.device).view(-1, rows, columns)
                signs = signs.view(-1, *(1,) * len(batch), rows, columns).expand(-1, *batch, -1, -1)
            else:
                signs = torch.randint(2, (probes, *y.shape), generator=source, device=y.device).to(y) * 2 - 1
            found = torch.zeros(batch, dtype=y.dtype, device=y.device)
            for one in signs:
                (pulled,) = torch.autograd.grad(F, y, one * turned, retain_graph=True)
                found = found + (pulled * one).sum((-1, -2))
        return F.detach(), found / (1 if probes is None else probes)

    spread = (c + resolution**2) * wide
    y = (gaussian.along(x.double()) - gaussian.mean) / spread.sqrt()
    if resolution:
        rising = [resolution, *(s for s in levels[::-1] if s > resolution)]
        lost = y.new_zeros(batch)
    else:
        rising = levels[-2::-1]
        first = angle(rising[0])
        F, trace = slope_and_trace(y, rising[0], first)  # up to the first level F stays what it is there
        y, lost = y - F * first, trace
    for s, t in tqdm(list(zip(rising[:-1], rising[1:], strict=True)), unit="step", disable=None if progress else True):
        turned = angle(t) - angle(s)
        F, trace = slope_and_trace(y, s, turned)
        ahead, after = slope_and_trace(y - F * turned, t, turned)
        y, lost = y - 0.5 * (F + ahead) * turned, lost + 0.5 * (trace + after)
    normal = -0.5 * y.square().sum((-1, -2)) - 0.5 * rows * columns * math.log(2 * math.pi)
    return normal - lost - 0.5 * spread.log().sum((-1, -2))
