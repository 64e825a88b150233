"""A pair network whose passes are replayed as CUDA graphs.

A pass is a thousand small kernels, and a GPU waits for the CPU to launch them. The kernels of one shape are always the
same: they are recorded once, in training forward and backward, and launched as a whole from then on.

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
PASSES_BEFORE = 2  # of a shape, without gradients, until it is recorded: they warm the libraries up
LARGEST = 1_000_000  # entries of the matrices whose passes without gradients are recorded: more keep a GPU busy
SHAPES = 4  # recorded at a time, without gradients, unless more are asked for


class GraphedNetwork:
    """What `evaluate_network` takes for a network; its gradients go to the network's own parameters.

    Graphs share their memory, which is safe as long as a backward pass follows each forward pass before the next one,
    and is kept as long as this object is. Off the current GPU, under autocast, with gradients out of training, of
    matrices so large that a GPU is busy with them or that activations are computed twice, and without gradients in the
    first two passes of a shape, it is the network itself. On an H200, `deep` and 200 000 weights a step, both passes of
    training take 18 to 27 ms in place of 40 to 57.

    Args:
        network: the pair network, which keeps its device and dtype.
        shapes: how many shapes of passes without gradients are kept recorded.
    """

    def __init__(self, network: PairNetwork, shapes: int = SHAPES) -> None:
        self.network = network
        self._shapes = shapes
        self._graphs: dict[tuple[int, ...], Callable[..., tuple[Tensor, ...]]] = {}
        self._pool: Any = None
        self._passes: dict[tuple[int, ...], int] = {}
        self._replays: dict[tuple[int, ...], Replay] = {}

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
        """Return what `PairNetwork.answer` does; in training, replayed, its products are in TF32."""
        if torch.is_grad_enabled():
            replayed = self.network.training and z.shape[-1] <= self.network.checkpoint_above
        else:
            replayed = z.numel() <= LARGEST
        here = z.is_cuda and z.device.index == torch.cuda.current_device()
        if not replayed or not here or torch.is_autocast_enabled():
            return self.network.answer(z, u, log_sigma, family, knowledge, split)
        known = () if knowledge is None else tuple(getattr(knowledge, name) for name in _KNOWLEDGE)
        parts = () if split is None else tuple(getattr(split, name) for name in _SPECTRUM)
        inputs = tuple(each.contiguous() for each in (z, u, log_sigma, family, *known, *parts))
        key = (*z.shape, len(known))
        if not torch.is_grad_enabled():
            found = self._replayed(key, inputs, len(known))
        else:
            if key not in self._graphs:
                self._graphs[key] = self._record(inputs, len(known))
            found = self._graphs[key](*inputs)
        return found[0], None if knowledge is None else found[1]

    def _replayed(self, key: tuple[int, ...], inputs: tuple[Tensor, ...], known: int) -> tuple[Tensor, ...]:
        """A pass without gradients: as it is at first, then recorded."""
        replay = self._replays.get(key)
        if replay is None:
            flat = _Flat(self.network, known)
            self._passes[key] = self._passes.get(key, 0) + 1
            if self._passes[key] <= PASSES_BEFORE:
                return flat(*inputs)
            if len(self._replays) == self._shapes:
                self._passes.pop(oldest := next(iter(self._replays)))
                del self._replays[oldest]
            try:
                replay = self._replays[key] = Replay(flat, inputs)
            except torch.OutOfMemoryError:  # what is recorded keeps memory that a pass could do with
                self._replays.clear()
                self._passes.clear()
                return flat(*inputs)
        return replay(inputs)

    def _record(self, inputs: tuple[Tensor, ...], known: int) -> Callable[..., tuple[Tensor, ...]]:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        some = tuple(each.clone() for each in inputs)
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")  # TF32: rounding below the scatter of a batch's gradient
        # Shapes are recorded on streams of their own, and the parameters' nodes are those of the first one: on purpose,
        # and torch would warn of it in backward passes, this one's and those to come.
        torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)
        try:
            recorded: Any = torch.cuda.make_graphed_callables(_Flat(self.network, known), some, pool=self._pool)
            return recorded
        finally:
            torch.set_float32_matmul_precision(precision)


class Replay:
    """A function without gradients, recorded: inputs are copied to where it finds them, results from where it has them.

    Its memory is its own, so that those of other shapes can come and go.

    Args:
        function: of tensors, to a tuple of them, whose kernels are the same each time; it may not wait for the GPU.
        inputs: on the current GPU.
    """

    def __init__(self, function: Callable[..., tuple[Tensor, ...]], inputs: tuple[Tensor, ...]) -> None:
        self._inputs = tuple(each.clone() for each in inputs)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=torch.cuda.Stream(self._inputs[0].device)):
            self._found = function(*self._inputs)

    def __call__(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return what the function makes of inputs of the shapes that were recorded."""
        for mine, given in zip(self._inputs, inputs, strict=True):
            mine.copy_(given)
        self._graph.replay()
        return tuple(each.clone() for each in self._found)


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
