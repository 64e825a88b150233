"""The one shape every engine works on.

Users broadcast: weights (..., N, N) against states (..., N). Engines see networks × trials: the leading batch axes
along which the weights vary are the networks, the trailing ones along which they are shared are the trials, so that one
network's trials multiply its matrix in one product. The time step is folded in: with τ, dt and the drive convention
absorbed, one step is

    h[t+1] = a ∘ h[t] + Ŵ φ(h[t]) + Î[t] + σ ∘ dB[t].

Folding is plain tensor algebra, so gradients reach W, I and τ through it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from neurosde.activation import Activation
from neurosde.brownian import BrownianSeeds
from neurosde.philox import normals
from neurosde.rate_sde import RateSDE

TORCH_GRAIN = 2**15  # numbers up to which torch computes with one thread
NUMPY_DTYPES = (torch.float32, torch.float64)
TENSORS = ("state", "weights", "decay", "input", "noise_std", "increments")  # of a Problem


@dataclass(frozen=True)
class DrawnNoise:
    """Increments that an engine draws itself, see `neurosde.philox`.

    Attributes:
        keys: key of each network, int64 (M,).
        firsts: element that each network's first number is, int64 (M,).
        scale: √dt.
    """

    keys: Tensor
    firsts: Tensor
    scale: float


@dataclass(frozen=True)
class Problem:
    """A batch of Euler–Maruyama recursions: M networks × K trials × N neurons.

    Attributes:
        phi: the nonlinearity.
        steps: number of steps; the path has steps + 1 points.
        state: initial voltage, shape (M, K, N).
        weights: Ŵ = bW, shape (M, N, N), (post, pre).
        decay: a = 1 − dt/τ, shape (M or 1, 1, N or 1).
        input: Î = bI, shape (steps or 1, M or 1, K or 1, N or 1), or None.
        noise_std: σ, shape (M or 1, K or 1, N or 1).
        increments: Brownian increments, shape (steps, M, K, N), or None.
        noise: how to draw them, instead, for engines that do (`Engine.draws_noise`).
    """

    phi: Activation
    steps: int
    state: Tensor
    weights: Tensor
    decay: Tensor
    input: Tensor | None
    noise_std: Tensor
    increments: Tensor | None
    noise: DrawnNoise | None = None

    @property
    def noisy(self) -> bool:
        """Whether there are increments, given or to be drawn."""
        return self.increments is not None or self.noise is not None

    @property
    def requires_grad(self) -> bool:
        """Whether a gradient can be asked for."""
        return any(tensor is not None and tensor.requires_grad for tensor in (getattr(self, name) for name in TENSORS))

    def drawn(self) -> Problem:
        """The same problem with its increments drawn."""
        if self.noise is None:
            return self
        M, K, N = self.state.shape
        z = normals(
            self.noise.keys,
            self.steps,
            K * N,
            first=self.noise.firsts,
            dtype=self.state.dtype,
            device=self.state.device,
        )
        return replace(self, increments=z.view(self.steps, M, K, N).mul_(self.noise.scale), noise=None)

    def input_step(self, t: int) -> Tensor | None:
        """Î at step t, broadcasting to (M, K, N)."""
        if self.input is None:
            return None
        return self.input[t if len(self.input) > 1 else 0]

    def force(self, t: int) -> Tensor | None:
        """Î + σ dB at step t, broadcasting to (M, K, N), or None where there is neither."""
        current = self.input_step(t)
        if self.increments is None:
            return current
        noise = self.noise_std * self.increments[t]
        return noise if current is None else noise + current


def batch_shape(weights: Tensor, h0: Tensor) -> torch.Size:
    """Shape of the batch that weights and initial states make together.

    Raises:
        ValueError: they do not broadcast, or h0 has another number of neurons.
    """
    N = weights.shape[-1]
    if h0.ndim < 1 or h0.shape[-1] != N:
        raise ValueError(f"h0 must be (..., {N} neurons) as the weights are; got {tuple(h0.shape)}.")
    if weights.ndim == 2:
        return h0.shape[:-1]
    try:
        return torch.broadcast_shapes(weights.shape[:-2], h0.shape[:-1])
    except RuntimeError as error:
        raise ValueError(
            f"weights {tuple(weights.shape)} and h0 {tuple(h0.shape)} do not broadcast over their batch axes; for "
            "B networks x K trials pass weights (B, 1, N, N) and h0 (B, K, N)."
        ) from error


def build_problem(
    sde: RateSDE,
    h0: Tensor,
    batch: torch.Size,
    dt: float,
    steps: int,
    noise: Tensor | BrownianSeeds | None,
    *,
    start: float = 0.0,
) -> Problem:
    """Fold a rate network, an initial state and a grid into a `Problem`.

    Args:
        sde: the network.
        h0: initial voltage, shape (..., neuron).
        batch: their common batch, see `batch_shape`.
        dt: step.
        steps: number of steps.
        noise: Brownian increments, shape (steps, ..., neuron) with the batch of the problem, or the seeds to draw them
            from, or None.
        start: time of the first point, which a time-varying input is read from.

    Raises:
        ValueError: a shape does not broadcast to the batch, or tau varies over the trials of one network.
    """
    N = sde.num_neurons
    split = _network_axes(sde.weights.shape[:-2], batch)
    M, K = math.prod(batch[:split]), math.prod(batch[split:])

    drawn = None
    if isinstance(noise, BrownianSeeds):
        drawn = _drawn_noise(noise, batch, M, K * N, dt)
        noise = noise.increments((*batch, N), steps, dt, h0.dtype, h0.device) if drawn is None else None

    decay, gain = sde.euler_coefficients(dt)
    decay, gain = _fold(decay, batch, split, "tau"), _fold(gain, batch, split, "tau")
    if decay.shape[1] != 1:
        raise ValueError("tau must not vary over the trials of one network; expand the weights over the trials too.")
    weights = sde.weights
    if weights.ndim > 2:
        weights = weights.reshape(*_padded(weights.shape[:-2], batch)[:split], N, N)
        weights = weights.expand(*batch[:split], N, N).reshape(M, N, N)
    return Problem(
        phi=sde.phi,
        steps=steps,
        state=h0.expand(*batch, N).reshape(M, K, N),
        weights=_scaled(gain.mT, weights),
        decay=decay,
        input=_fold_input(sde, batch, split, gain, start, dt, steps),
        noise_std=_fold(sde.noise_std, batch, split, "noise_std"),
        increments=None if noise is None else noise.reshape(steps, M, K, N),
        noise=drawn,
    )


def _scaled(gain: Tensor, weights: Tensor) -> Tensor:
    """Multiply gain and weights; if torch would take several threads, let numpy do it with one.

    torch's threads go on spinning for milliseconds when they are done, on the cores where Julia's should begin.
    """
    if weights.numel() <= TORCH_GRAIN or weights.dtype not in NUMPY_DTYPES:
        return gain * weights
    on_cpu = gain.device.type == weights.device.type == "cpu"
    return _Scaled.apply(gain, weights) if on_cpu else gain * weights


def _product(a: Tensor, b: Tensor) -> Tensor:
    if torch.is_grad_enabled():  # in a backward that is to be differentiated again
        return a * b
    return torch.from_numpy(np.multiply(a.numpy(), b.numpy()))


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gain: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(gain, weights)
        return _product(gain, weights)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        gain, weights = ctx.saved_tensors
        needs_gain, needs_weights = ctx.needs_input_grad
        return (
            _product(grad, weights).sum_to_size(gain.shape) if needs_gain else None,
            _product(grad, gain).sum_to_size(weights.shape) if needs_weights else None,
        )


def _drawn_noise(seeds: BrownianSeeds, batch: torch.Size, M: int, per_network: int, dt: float) -> DrawnNoise | None:
    """Keys and first elements of the networks, or None where the seeds differ among one network's trials."""
    keys = torch.tensor(seeds.seeds, dtype=torch.int64)
    entries = 1 if seeds.shared else batch[0]  # each with a key
    if M % entries:
        return None
    each = M // entries  # networks under one key
    firsts = per_network * torch.arange(each)
    return DrawnNoise(keys.repeat_interleave(each), firsts.repeat(entries), dt**0.5)


def _padded(shape: torch.Size, batch: torch.Size) -> tuple[int, ...]:
    return (1,) * (len(batch) - len(shape)) + tuple(shape)


def _network_axes(weights_batch: torch.Size, batch: torch.Size) -> int:
    """Number of leading batch axes that count as networks: up to the last one along which the weights vary."""
    varies = [axis for axis, size in enumerate(_padded(weights_batch, batch)) if size != 1]
    return varies[-1] + 1 if varies else 0


def _fold(value: Tensor, batch: torch.Size, split: int, name: str) -> Tensor:
    """Reshape what broadcasts to (*batch, N) into (M or 1, K or 1, N or 1), expanding only where it varies."""
    if value.ndim < 2:
        return value.view(1, 1, -1)
    if value.ndim - 1 > len(batch):
        raise ValueError(
            f"{name} {tuple(value.shape)} has more axes than the batch {tuple(batch)} x neurons; expand h0 first."
        )
    shape = _padded(value.shape[:-1], batch)
    if any(size not in (1, full) for size, full in zip(shape, batch, strict=True)):
        raise ValueError(f"{name} {tuple(value.shape)} does not broadcast to (*{tuple(batch)}, neuron).")
    value = value.reshape(*shape, value.shape[-1])
    networks = batch[:split] if any(size != 1 for size in shape[:split]) else shape[:split]
    trials = batch[split:] if any(size != 1 for size in shape[split:]) else shape[split:]
    value = value.expand(*networks, *trials, value.shape[-1])
    return value.reshape(math.prod(networks), math.prod(trials), value.shape[-1])


def _fold_input(
    sde: RateSDE, batch: torch.Size, split: int, gain: Tensor, start: float, dt: float, steps: int
) -> Tensor | None:
    if sde.input is None or not steps:
        return None
    if sde.input_dt is None:
        return (gain * _fold(sde.input, batch, split, "input")).unsqueeze(0)
    held = sde.input[..., [sde.input_index(start + k * dt) for k in range(steps)], :]
    folded = _fold(held.flatten(-2), batch, split, "input")  # time rides along with the neurons
    return gain * folded.unflatten(-1, held.shape[-2:]).movedim(2, 0)
