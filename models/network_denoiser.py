"""A pair network as the denoiser that samplers take."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from neurosde.models.denoiser import PairNetwork
from neurosde.models.edm import Evidence, fold

# Matrix entries given to the network at a time: what fits a CPU's caches, or a small GPU.
_CHUNK = {"cpu": 10_000, "cuda": 2_000_000}


class NetworkDenoiser:
    """E[J | J_s] by a pair network, in the interface of `neurosde.models.edm.Denoiser`.

    Args:
        network: the pair network.
        family: 1 + index of the ensemble, 0 where it is open.
    """

    def __init__(self, network: PairNetwork, family: int = 0) -> None:
        self.network = network
        self.family = family

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Return E[J | J_s = x], shape (..., post, pre), float64."""
        N = x.shape[-1]
        matrices = x.reshape(-1, N, N)
        levels = torch.as_tensor(sigma, dtype=torch.float64, device=x.device).expand(x.shape[:-2]).reshape(-1)
        size = max(1, _CHUNK.get(x.device.type, _CHUNK["cpu"]) // N**2)
        try:
            parts = [self._some(*some) for some in zip(matrices.split(size), levels.split(size), strict=True)]
        except torch.OutOfMemoryError as error:
            raise MemoryError(f"the GPU is too small for matrices of {N} x {N}; sample on the CPU instead.") from error
        return torch.cat(parts).view(x.shape)

    def _some(self, x: Tensor, sigma: Tensor) -> Tensor:
        folded = fold(x, sigma, Evidence.none(x.shape[-1], x.device))
        family = torch.full((len(x),), self.family, device=x.device)
        F = evaluate_network(self.network, folded, sigma, family)
        return folded.posterior_mean + folded.scaled(F)


def evaluate_network(network: torch.nn.Module, folded: Any, sigma: Tensor, family: Tensor | None) -> Tensor:
    """F for what has been folded, float64: the network itself computes in its own dtype."""
    dtype = next(network.parameters()).dtype
    z, u = folded.network_input.to(dtype), folded.whitened_mean.to(dtype)
    return network(z, u, sigma.log().to(dtype), family).double()
