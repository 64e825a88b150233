"""Guidance: denoisers made of denoisers, so that every sampler works with every guidance."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from neurosde.models.edm import Denoiser
from neurosde.validation import check_positive


@dataclass(frozen=True)
class ClassifierFreeGuidance:
    """D_w = D_uncond + w (D_cond − D_uncond).

    w = 0 is the prior and w = 1 the posterior. Any other w samples neither: w > 1 is sharper than the posterior and not
    calibrated, w < 1 (but for 0) lies between the prior and the posterior and is of neither.

    Args:
        conditional: denoiser given the recording.
        unconditional: denoiser of the prior.
        weight: w.
        interval: noise levels (low, high) between which the guidance acts; w is 1 outside.

    Raises:
        ValueError: a negative or infinite w, or an interval whose ends are not in order.

    References:
        Classifier-free diffusion guidance (Ho, Salimans, 2022), https://arxiv.org/abs/2207.12598
        Applying guidance in a limited interval improves sample and distribution quality in diffusion models
        (Kynkäänniemi, Aittala, Karras, Laine, Aila, Lehtinen, 2024), https://arxiv.org/abs/2404.07724
    """

    conditional: Denoiser
    unconditional: Denoiser
    weight: float = 1.0
    interval: tuple[float, float] = (0.0, math.inf)

    def __post_init__(self) -> None:
        check_positive(self.weight, "weight", zero_ok=True)
        low, high = self.interval
        if not 0 <= low < high:
            raise ValueError(f"interval must be two noise levels, the lower one first; got {self.interval}.")

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Return the guided mean, see `Denoiser`."""
        low, high = self.interval
        if self.weight == 1 or not low <= float(torch.as_tensor(sigma).max()) <= high:
            return self.conditional(x, sigma)
        prior = self.unconditional(x, sigma)
        return prior if self.weight == 0 else prior + self.weight * (self.conditional(x, sigma) - prior)


@dataclass(frozen=True)
class RescaledDenoiser:
    """A denoiser of matrices in another unit: what it calls J is x times `ratio`.

    Args:
        denoise: the denoiser.
        ratio: its x over the x given here, shape () or (...).
    """

    denoise: Denoiser
    ratio: Tensor | float

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Return the mean in the unit of x, see `Denoiser`."""
        ratio = torch.as_tensor(self.ratio, dtype=torch.float64, device=x.device)
        wide = ratio[..., None, None]
        return self.denoise(x * wide, torch.as_tensor(sigma, device=x.device) * ratio) / wide


@dataclass(frozen=True)
class ChosenDenoiser:
    """One denoiser for some matrices of a batch, another one for the others.

    Args:
        first: of those that are chosen.
        second: of the others.
        chosen: of the noise levels of matrices, shape (...), which are, of the same shape.
    """

    first: Denoiser
    second: Denoiser
    chosen: Callable[[Tensor], Tensor]

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Return the mean, see `Denoiser`; of a denoiser that none is for nothing is asked."""
        levels = torch.as_tensor(sigma, dtype=torch.float64, device=x.device).expand(x.shape[:-2])
        chosen = self.chosen(levels).expand(levels.shape)
        if bool(chosen.all()):
            return self.first(x, sigma)
        if not bool(chosen.any()):
            return self.second(x, sigma)
        return torch.where(chosen[..., None, None], self.first(x, sigma), self.second(x, sigma))
