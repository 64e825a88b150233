"""The engine whose kernels are Julia's: `engine="julia"`.

Its work is to lay a `Problem` out in shared memory and to say where everything lies; the arithmetic and the random
numbers are the worker's. Paths come back as tensors on the shared memory itself.
"""

from __future__ import annotations

import ctypes
import math
import os
import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from neurosde.engines import ENGINES, Gradients, Work
from neurosde.julia import choice
from neurosde.julia.arena import Arena
from neurosde.julia.worker import OP_ADJOINT, OP_FORWARD, get_worker
from neurosde.problem import Problem

ACTIVATIONS = ("tanh", "sigmoid", "softplus", "relu", "linear")  # in the order of activation.jl
DTYPES = (torch.float32, torch.float64)
COPIED = 1 << 16  # bytes up to which a result is copied out: cheaper than keeping its block
MEMMOVE = 1 << 22  # bytes up to which one thread copies: torch's several go on spinning, where the worker should run
NONE = [-1, 0, 0, 0, 0]  # an empty field
ALIGNMENT = 64


class JuliaEngine:
    """Vector kernels in a worker process, on the CPU, in float32 and float64."""

    name = "julia"
    draws_noise = True
    differentiable = False

    def refusal(self, work: Work) -> str | None:
        """Return why such work cannot be done here, or None."""
        if os.name != "posix":
            return "needs Linux or macOS"
        if work.device.type != "cpu":
            return f"works on the CPU; got tensors on {work.device}"
        if work.dtype not in DTYPES:
            return f"takes float32 and float64; got {work.dtype}"
        if work.phi not in ACTIVATIONS:
            return f"has phi = {', '.join(ACTIVATIONS)}; got {work.phi!r}"
        if work.recorded:
            return 'has the discrete adjoint only; got adjoint="autograd"'
        return None

    def pays(self, work: Work, *, whole: bool) -> bool:
        """Return whether this engine is the quicker one, its start included, and does start."""
        return choice.julia_pays(work, whole=whole)

    def forward(self, problem: Problem, *, activity: bool, voltage: bool) -> tuple[Tensor | None, Tensor | None]:
        """See `Engine`."""
        p = problem
        M, K, N = p.state.shape
        T, dtype = p.steps + 1, p.state.dtype
        # Rates are read trial by trial (cubes, analysis), voltages time by time (torchsde's order).
        by_trial = activity
        shape = (M, K, T, N) if by_trial else (T, M, K, N)
        strides = (N, K * T * N, T * N) if by_trial else (M * K * N, K * N, N)
        size = math.prod(shape) * dtype.itemsize
        worker = get_worker()
        with worker.lock:
            layout = _Layout(worker.arena)
            paths: list[int] = []
            try:
                words = [OP_FORWARD, *_described(p, layout)]
                for wanted in (activity, voltage):
                    paths.append(worker.arena.allocate(size) if wanted else -1)
                    words += [paths[-1], *strides, 1] if wanted else NONE
                layout.write()
                worker.request(layout.resolved(words))
            except BaseException:
                for offset in paths:
                    if offset >= 0:
                        worker.arena.free(offset)
                raise
            finally:
                layout.free()
            x, h = (_result(worker.arena, at, shape, dtype) if at >= 0 else None for at in paths)
        if by_trial:
            return None if x is None else x.permute(2, 0, 1, 3), None if h is None else h.permute(2, 0, 1, 3)
        return x, h

    def vjp(
        self,
        problem: Problem,
        x: Tensor | None,
        h: Tensor | None,
        grad_x: Tensor | None,
        grad_h: Tensor | None,
        needs: frozenset[str],
    ) -> Gradients:
        """Discrete adjoint, see `Engine`."""
        p = problem
        if p.state.numel() == 0:
            return ENGINES["torch"].vjp(p.drawn(), x, h, grad_x, grad_h, needs)
        M, K, N = p.state.shape
        steps, dtype = p.steps, p.state.dtype
        parts = 1 if M >= 8 else min(max(K // 16, 1), 16 // M)  # whose sums are added up here
        shapes: dict[str, tuple[int, ...]] = {}
        if "state" in needs:
            shapes["state"] = (M, K, N)
        if "weights" in needs:
            shapes["weights"] = (parts, M, N, N)
        if "decay" in needs:
            shapes["decay"] = (parts, M, N)
        if "input" in needs and p.input is not None:
            shapes["input"] = (parts, p.input.shape[0], M, K if p.input.shape[2] > 1 else 1, N)
        if "noise_std" in needs and p.noisy:
            shapes["noise_std"] = (parts, M, K if p.noise_std.shape[1] > 1 else 1, N)
        if "increments" in needs:
            shapes["increments"] = (steps, M, K, N)
        worker = get_worker()
        with worker.lock:
            arena, found = worker.arena, dict.fromkeys(shapes, -1)
            layout = _Layout(arena)
            try:
                words = [OP_ADJOINT, *_described(p, layout)]
                for path in (x, None if x is not None and "decay" not in needs else h, grad_x, grad_h):
                    words += layout.path(path)
                for name, shape in shapes.items():
                    found[name] = arena.allocate(math.prod(shape) * dtype.itemsize)
                    if name in ("decay", "input", "noise_std"):  # the worker adds to these
                        arena.view(found[name], shape, dtype).zero_()
                words.append(parts)
                words += [found["state"], 0, K * N, N, 1] if "state" in found else NONE
                words.append(found.get("weights", -1))
                words += [found["decay"], M * N, N, 0, 1] if "decay" in found else NONE
                if "input" in found:
                    _, several, _, trials, _ = shapes["input"]
                    words += [
                        found["input"],
                        M * trials * N if several > 1 else 0,
                        trials * N,
                        N if trials > 1 else 0,
                        1,
                    ]
                    words.append(several * M * trials * N)
                else:
                    words += [*NONE, 0]
                if "noise_std" in found:
                    trials = shapes["noise_std"][2]
                    words += [found["noise_std"], M * trials * N, trials * N, N if trials > 1 else 0, 1]
                else:
                    words += NONE
                words += [found["increments"], M * K * N, K * N, N, 1] if "increments" in found else NONE
                layout.write()
                worker.request(layout.resolved(words))
            except BaseException:
                for offset in found.values():
                    if offset >= 0:
                        arena.free(offset)
                raise
            finally:
                layout.free()
            results = {name: _result(arena, found[name], shape, dtype) for name, shape in shapes.items()}

        def summed(name: str, like: Tensor | None) -> Tensor | None:
            if name not in results or like is None:
                return None
            total = results[name].squeeze(0) if parts == 1 else results[name].sum(0)
            if name == "decay":
                total = total.unsqueeze(1)
            return total if total.shape == like.shape else total.sum_to_size(like.shape)

        return Gradients(
            state=results.get("state"),
            weights=summed("weights", p.weights),
            decay=summed("decay", p.decay),
            input=summed("input", p.input),
            noise_std=summed("noise_std", p.noise_std),
            increments=results.get("increments"),
        )


class _Layout:
    """The inputs of one call in one block: collected first, then placed, copied and freed together.

    Until `write`, places count from the block's start and are coded as −2 − place; `resolved` makes them offsets.
    """

    def __init__(self, arena: Arena) -> None:
        self.arena = arena
        self.size = 0
        self.block = -1
        self.copies: list[tuple[int, Tensor]] = []

    def place(self, tensor: Tensor) -> int:
        """Return the place of a tensor's contiguous copy, or its own offset if it lies in the arena as it should be."""
        if tensor.is_contiguous():
            offset = self.arena.offset_of(tensor)
            if offset is not None:
                return offset
        place = self.size
        self.copies.append((place, tensor))
        size = tensor.numel() * tensor.element_size()
        self.size += (size + ALIGNMENT - 1) & -ALIGNMENT
        return -2 - place

    def field(self, tensor: Tensor | None) -> list[int]:
        """Words of a field (step, network, trial, neuron); axes of length 1 are repeated."""
        if tensor is None:
            return NONE
        a, b, c, n = tensor.shape
        return [
            self.place(tensor), b * c * n if a > 1 else 0, c * n if b > 1 else 0, n if c > 1 else 0, 1 if n > 1 else 0
        ]  # fmt: skip

    def path(self, tensor: Tensor | None) -> list[int]:
        """Words of a whole path (step, network, trial, neuron), which may be strided or expanded."""
        if tensor is None:
            return NONE
        stride = tensor.stride()
        offset = self.arena.offset_of(tensor)
        if offset is not None and stride[3] == 1:
            return [offset, *stride[:3], 1]
        # autograd expands a number over the path, say: copy what is there
        distinct = tensor[tuple(slice(0, 1) if s == 0 else slice(None) for s in stride)]
        words = self.field(distinct)
        if distinct.shape[3] == 1 and tensor.shape[3] == 1:
            words[4] = 1
        return words

    def write(self) -> None:
        """Allocate the block and copy everything into it."""
        if not self.size:
            return
        self.block = self.arena.allocate(self.size)
        for place, tensor in self.copies:
            size = tensor.numel() * tensor.element_size()
            if size <= MEMMOVE:
                source = tensor.contiguous()
                ctypes.memmove(self.arena.address + self.block + place, source.data_ptr(), size)
            else:
                self.arena.view(self.block + place, tensor.shape, tensor.dtype).copy_(tensor)

    def resolved(self, words: list[int]) -> list[int]:
        """Words with places turned into offsets."""
        return [self.block - 2 - word if word <= -2 else word for word in words]

    def free(self) -> None:
        """Give the block back."""
        if self.block >= 0:
            self.arena.free(self.block)
            self.block = -1


def _described(p: Problem, layout: _Layout) -> list[int]:
    """Words of a problem: sizes, weights, fields, noise."""
    M, K, N = p.state.shape
    noise = p.noise
    words = [p.state.dtype.itemsize, ACTIVATIONS.index(p.phi.name), M, K, N, p.steps, torch.get_num_threads()]
    words.append(layout.place(p.weights.detach()))
    words += [layout.place(p.state.detach()), 0, K * N, N, 1]
    words += layout.field(p.decay.detach().unsqueeze(0))
    words += layout.field(None if p.input is None else p.input.detach())
    words += layout.field(p.noise_std.detach().unsqueeze(0))
    words += NONE if p.increments is None else [layout.place(p.increments.detach()), M * K * N, K * N, N, 1]
    if noise is None:
        words += [-1, -1, _bits(1.0)]
    else:
        words += [layout.place(noise.keys), layout.place(noise.firsts), _bits(noise.scale)]
    return words


def _result(arena: Arena, offset: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return a block as a tensor, copied if it is small."""
    size = math.prod(shape) * dtype.itemsize
    if size > COPIED:
        return arena.tensor(offset, shape, dtype)
    result = torch.empty(shape, dtype=dtype)
    ctypes.memmove(result.data_ptr(), arena.address + offset, size)
    arena.free(offset)
    return result


def _bits(number: float) -> int:
    return struct.unpack("<q", struct.pack("<d", number))[0]
