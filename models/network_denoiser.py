"""A pair network as the denoiser that samplers take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neurosde.datasets.ensembles import Gaussian
from neurosde.models.denoiser import PairNetwork
from neurosde.models.edm import Evidence, Folded, fold
from neurosde.models.graphed_network import GraphedNetwork
from neurosde.models.knowledge import knowledge_of

GAUSSIAN = Gaussian.name
# Matrix entries given to the network at a time: what fits a CPU's caches, or a small GPU.
_CHUNK = {"cpu": 20_000, "cuda": 2_000_000}


@dataclass(frozen=True)
class Told:
    """What a network is told of each of a batch of matrices, beside the noise level.

    Attributes:
        family: 1 + index of the ensemble, 0 where it is not told, shape (batch,).
        gain: gain s₀√N that the unit of J stands for, shape (batch,); of no use to a network of a prior.
        gain_known: whether the weights are known to have this gain, shape (batch,).
    """

    family: Tensor
    gain: Tensor
    gain_known: Tensor

    @classmethod
    def of(
        cls, count: int, family: int = 0, gain: Tensor | float = 1.0, gain_known: bool = False, device: Any = None
    ) -> Told:
        """Tell of `count` matrices one family, and one gain or one each."""
        return cls(
            torch.full((count,), family, device=device),
            torch.as_tensor(gain, dtype=torch.float64, device=device).expand(count),
            torch.full((count,), gain_known, device=device),
        )

    def __getitem__(self, index: Any) -> Told:
        """Return what is told of some of them."""
        return Told(self.family[index], self.gain[index], self.gain_known[index])


class NetworkDenoiser:
    """E[J | J_s] by a pair network, in the interface of `neurosde.models.edm.Denoiser`.

    Args:
        network: the pair network.
        family: 1 + index of the ensemble, 0 where it is open.
        evidence: what recordings say, in J units, of all matrices or of each, for a network that is conditioned on it.
        gain: gain s₀√N that the unit of J stands for, of all matrices, or of each of the last dimensions of the batch.
        gain_known: whether the weights are known to have this gain.
    """

    def __init__(
        self,
        network: PairNetwork | GraphedNetwork,
        family: int = 0,
        evidence: Evidence | None = None,
        gain: Tensor | float = 1.0,
        gain_known: bool = False,
    ) -> None:
        self.network = network
        self.family = family
        self.evidence = evidence
        self.gain = gain
        self.gain_known = gain_known

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Return E[J | J_s = x], shape (..., post, pre), float64."""
        return self._evaluate(x, sigma)[0]

    def log_families(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Return log p(ensemble | J_s = x) of a network that is conditioned on recordings, shape (..., family)."""
        return self._evaluate(x, sigma)[1]

    def _evaluate(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        N, device, batch = x.shape[-1], x.device, x.shape[:-2]
        matrices = x.reshape(-1, N, N)
        levels = torch.as_tensor(sigma, dtype=torch.float64, device=device).expand(batch).reshape(-1)
        evidence = (self.evidence or Evidence.none(N, device)).expand(batch).flat()
        gain = torch.as_tensor(self.gain, dtype=torch.float64, device=device).expand(batch).reshape(-1)
        told = Told.of(len(matrices), self.family, gain, self.gain_known, device)
        size = max(1, _CHUNK.get(device.type, _CHUNK["cpu"]) // N**2)
        found, families = [], []
        try:
            for start in range(0, len(matrices), size):
                some = slice(start, start + size)
                folded = fold(matrices[some], levels[some], evidence[some])
                F, family = evaluate_network(self.network, folded, levels[some], told[some])
                found.append(folded.posterior_mean + folded.scaled(F))
                families.append(family)
        except torch.OutOfMemoryError as error:
            raise MemoryError(f"the GPU is too small for matrices of {N} x {N}; sample on the CPU instead.") from error
        return torch.cat(found).view(x.shape), torch.cat(families).view(*batch, -1)


def evaluate_network(
    network: PairNetwork | GraphedNetwork, folded: Folded, sigma: Tensor, told: Told
) -> tuple[Tensor, Tensor]:
    """F for what has been folded, and log p(family): the network itself computes in its own dtype.

    Where the weights are known to be iid Gaussian of a known gain nothing is lacking: F = 0, whatever the network says.

    Returns:
        F (batch, post, pre), float64, and log p(family) (batch, family), of no columns for a network of a prior.
    """
    dtype = next(network.parameters()).dtype
    z, u = folded.network_input.to(dtype), folded.whitened_mean.to(dtype)
    known = knowledge_of(folded, sigma, told.gain, told.gain_known, dtype) if network.config.recordings else None
    F, families = network.answer(z, u, sigma.log().to(dtype), told.family, known, network.split(z))
    if known is None or families is None:
        return F.double(), F.new_zeros(len(F), 0)
    if GAUSSIAN in network.config.families:
        settled = told.gain_known & (told.family == 1 + network.config.families.index(GAUSSIAN))
        F = F.masked_fill(settled[:, None, None], 0.0)
    return F.double(), families.double()
