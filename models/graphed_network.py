"""A pair network in training whose passes are replayed as CUDA graphs.

A step of training is a thousand and more small kernels, and a GPU waits for the CPU to launch them. The kernels of one
shape are always the same: they are recorded once, forward and backward, and launched as a whole from then on.

References:
    Accelerating PyTorch with CUDA graphs (Nguyen, Carilli, Eryilmaz, Singh, Lin, Gimelshein, Desmaison, Yang, 2021),
    https://pytorch.org/blog/accelerating-pytorch-with-cuda-graphs/
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from neurosde.models.denoiser import PairNetwork, PairNetworkConfig
from neurosde.models.knowledge import Knowledge
from neurosde.models.spectral import Spectrum

_KNOWLEDGE = tuple(item.name for item in fields(Knowledge))
_SPECTRUM = tuple(item.name for item in fields(Spectrum))


class GraphedNetwork:
    """What `evaluate_network` takes for a network; its gradients go to the network's own parameters.

    Graphs share their memory, which is safe as long as a backward pass follows each forward pass before the next one.
    Off a GPU, under autocast, in evaluation, and of matrices so large that activations are computed twice, it is the
    network itself. On an H200, `deep` and 200 000 weights a step, both passes take 18 to 27 ms in place of 40 to 57.

    Args:
        network: the pair network.
    """

    def __init__(self, network: PairNetwork) -> None:
        self.network = network
        self._graphs: dict[tuple[int, ...], Callable[..., tuple[Tensor, ...]]] = {}
        self._pool: Any = None

    @property
    def config(self) -> PairNetworkConfig:
        """Sizes of the network."""
        return self.network.config

    def parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of the network."""
        return self.network.parameters()

    def split(self, z: Tensor) -> Spectrum | None:
        """Return what `PairNetwork.split` does."""
        return self.network.split(z)

    def answer(
        self,
        z: Tensor,
        u: Tensor,
        log_sigma: Tensor,
        family: Tensor,
        knowledge: Knowledge | None,
        split: Spectrum | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return what `PairNetwork.answer` does; replayed, its products are in TF32."""
        replayed = z.is_cuda and self.network.training and torch.is_grad_enabled() and not torch.is_autocast_enabled()
        if not replayed or z.shape[-1] > self.network.checkpoint_above:
            return self.network.answer(z, u, log_sigma, family, knowledge, split)
        known = () if knowledge is None else tuple(getattr(knowledge, name) for name in _KNOWLEDGE)
        parts = () if split is None else tuple(getattr(split, name) for name in _SPECTRUM)
        inputs = tuple(each.contiguous() for each in (z, u, log_sigma, family, *known, *parts))
        key = (*z.shape, len(known))
        if key not in self._graphs:
            self._graphs[key] = self._record(inputs, len(known))
        found = self._graphs[key](*inputs)
        return found[0], None if knowledge is None else found[1]

    def _record(self, inputs: tuple[Tensor, ...], known: int) -> Callable[..., tuple[Tensor, ...]]:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        some = tuple(each.clone() for each in inputs)
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")  # TF32: rounding below the scatter of a batch's gradient
        try:
            recorded: Any = torch.cuda.make_graphed_callables(_Flat(self.network, known), some, pool=self._pool)
            return recorded
        finally:
            torch.set_float32_matmul_precision(precision)


class _Flat(nn.Module):
    """The network as a function of tensors alone, the first `known` of the last ones what is known of recordings."""

    def __init__(self, network: PairNetwork, known: int) -> None:
        super().__init__()
        self.network, self.known = network, known

    def forward(self, z: Tensor, u: Tensor, log_sigma: Tensor, family: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        known, parts = rest[: self.known], rest[self.known :]
        F, families = self.network.answer(
            z, u, log_sigma, family, Knowledge(*known) if known else None, Spectrum(*parts) if parts else None
        )
        return (F,) if families is None else (F, families)
