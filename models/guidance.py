"""Guidance: denoisers made of denoisers, so that every sampler works with every guidance."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from neurosde.models.edm import Denoiser


@dataclass(frozen=True)
class ClassifierFreeGuidance:
    """D_w = D_uncond + w (D_cond − D_uncond).

    w = 0 is the prior and w = 1 the posterior. Any other w samples neither: w > 1 is sharper than the posterior and not
    calibrated.

    Args:
        conditional: denoiser given the recording.
        unconditional: denoiser of the prior.
        weight: w.

    References:
        Classifier-free diffusion guidance (Ho, Salimans, 2022), https://arxiv.org/abs/2207.12598
    """

    conditional: Denoiser
    unconditional: Denoiser
    weight: float = 1.0

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Return the guided mean, see `Denoiser`."""
        if self.weight == 1:
            return self.conditional(x, sigma)
        prior = self.unconditional(x, sigma)
        return prior if self.weight == 0 else prior + self.weight * (self.conditional(x, sigma) - prior)
