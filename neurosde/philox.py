"""Standard normals that are a function of (key, step, element): the noise of every engine.

A counter-based generator is a bijection of a counter under a key, without a state: any number of a stream can be had
without those before it, so a path depends neither on the engine that asks, nor on its threads, its device, its chunks,
or on how many steps are drawn. Only rounding depends on the dtype.

The bijection is Philox4x32. From the counter words c0 … c3 and the key words k0, k1 one round makes, with a = M0·c0 and
b = M1·c2 (64-bit products of 32-bit words),

    c0, c1, c2, c3 ← hi(b) ⊕ c1 ⊕ k0,  lo(b),  hi(a) ⊕ c3 ⊕ k1,  lo(a),        k0, k1 ← k0 + W0,  k1 + W1  (mod 2³²).

Seven rounds are the fewest that pass BigCrush (table 2 of the paper).

The normal z[t, e] of step t and element e (the flattened index over batch × neuron) under a 64-bit key, low word first:
with e = 64 q + 16 p + l (p < 4, l < 16) the counter is c0, c1 = low and high word of 16 q + l, c2 = t mod 2³², c3 = 0;
from its output x0 … x3

    p = 0: r(x0) cos θ(x1)    p = 1: r(x0) sin θ(x1)    p = 2: r(x2) cos θ(x3)    p = 3: r(x2) sin θ(x3)
    r(x) = √(−2 log u),  u = (⌊x/2⌋ + ½) 2⁻³¹,      θ(x) = π s 2⁻³¹,  s = x as a signed 32-bit integer

(Box–Muller). One call serves four elements, and 16 neighbouring calls, which a vector unit makes at once, serve 64
neighbouring elements. ⌊x/2⌋ becomes a float before ½ is added, so that |z| reaches √(64 log 2) = 6.66 in float32 too.

References:
    Parallel random numbers: as easy as 1, 2, 3 (Salmon, Moraes, Dror, Shaw, 2011),
    https://doi.org/10.1145/2063384.2063405
    A note on the generation of random normal deviates (Box, Muller, 1958), https://doi.org/10.1214/aoms/1177706645
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

ROUNDS = 7
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
WEYL = 0x9E3779B9, 0xBB67AE85
WORD = 0xFFFFFFFF
LANES = 16
GROUP = 4 * LANES  # elements that one Philox call per lane serves

# Philox calls in one chunk of work, and in one step of it, measured: the buffers stay in a core's cache, what is worked
# out once for all steps costs little where there is one step, and a GPU is filled.
CALLS, CALLS_PER_STEP = 32768, 4096
CALLS_ON_DEVICE = 1 << 22

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox4x32(counter: Words, key: tuple[Tensor | int, Tensor | int], rounds: int = ROUNDS) -> Words:
    """Encrypt counters: one call of Philox4x32 for each.

    Args:
        counter: c0 … c3, int64 tensors that hold 32-bit words and broadcast against each other and the key.
        key: k0, k1, 32-bit words, ints or int64 tensors.
        rounds: number of rounds.

    Returns:
        The output words x0 … x3, 0 … 2³² − 1 in int64.

    References:
        Parallel random numbers: as easy as 1, 2, 3 (Salmon, Moraes, Dror, Shaw, 2011),
        https://doi.org/10.1145/2063384.2063405
    """
    words = counter
    for r in range(rounds):
        words = _round(words, _round_key(key, r))
    return words


def _round_key(key: tuple[Any, Any], r: int) -> tuple[Any, Any]:
    return (key[0] + r * WEYL[0]) & WORD, (key[1] + r * WEYL[1]) & WORD


def _round(words: tuple[Any, Any, Any, Any], key: tuple[Any, Any]) -> tuple[Any, Any, Any, Any]:
    """One round on int64 tensors (a product keeps its bit pattern, its shift a sign) or uint64 arrays of numpy."""
    c0, c1, c2, c3 = words
    a, b = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
    return ((b >> 32) & WORD) ^ (c1 ^ key[0]), b & WORD, ((a >> 32) & WORD) ^ (c3 ^ key[1]), a & WORD


def normals(
    keys: Int64[Tensor, " networks"],
    steps: int,
    count: int,
    *,
    first: int | Int64[Tensor, " networks"] = 0,
    start: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Float[Tensor, "steps networks count"]:
    """Return z[start + t, first[m] + i] under keys[m] for every step t, network m and element i.

    Args:
        keys: one 64-bit pattern per network.
        steps: number of steps.
        count: number of elements of each network.
        first: index of each network's first element, any number ≥ 0.
        start: index of the first step.
        dtype: of the result. float16 and bfloat16 are rounded from float32.
        device: where to draw.

    Raises:
        ValueError: keys are not one-dimensional int64, a count or an index is negative, or first fits no keys.
        TypeError: dtype is not a real floating type.
    """
    if keys.ndim != 1 or keys.dtype != torch.int64:
        raise ValueError(f"keys must be int64 of shape (networks,); got {keys.dtype}, {tuple(keys.shape)}.")
    if not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating type; got {dtype}.")
    firsts = first.tolist() if isinstance(first, Tensor) else [first] * len(keys)
    if not isinstance(firsts, list) or len(firsts) != len(keys):
        raise ValueError(f"first must be one index, or one for each of the {len(keys)} keys.")
    if min(steps, count, start, *firsts) < 0:
        raise ValueError(f"steps, count, first and start must not be negative; got {steps}, {count}, {first}, {start}.")
    out = torch.empty(steps, len(keys), count, dtype=dtype, device=device)
    if out.numel() == 0:
        return out
    groups = -(-(max(f % GROUP for f in firsts) + count) // GROUP)
    on_cpu = out.device.type == "cpu"
    calls, calls_per_step = (CALLS, CALLS_PER_STEP) if on_cpu else (CALLS_ON_DEVICE, CALLS_ON_DEVICE)
    width = min(groups, calls_per_step // LANES)  # groups in one chunk
    networks = min(len(keys), calls_per_step // (width * LANES))  # in one chunk; more than one only with all groups
    height = min(steps, calls // (networks * width * LANES))
    buffers = _Buffers(out, 2 * height * networks * width * LANES)
    key_list = keys.tolist()
    for m in range(0, len(keys), networks):
        some = slice(m, m + networks)
        for q in range(0, groups, width):
            lanes = min(width, groups - q) * LANES
            block = _Block(buffers, key_list[some], [LANES * (f // GROUP + q) for f in firsts[some]], lanes)
            for t in range(0, steps, height):
                drawn = block.draw(start + t, min(height, steps - t))
                _place(drawn, out[t : t + height, some], [f % GROUP - q * GROUP for f in firsts[some]])
    return out


def _place(drawn: Tensor, out: Tensor, offsets: list[int]) -> None:
    """Copy number i + offset of each network's `drawn` to element i of its `out`, wherever both are."""
    available, count = drawn.shape[-1], out.shape[-1]
    if len(set(offsets)) == 1:
        begin, end = max(0, -offsets[0]), min(count, available - offsets[0])
        if begin < end:
            out[..., begin:end] = drawn[..., begin + offsets[0] : end + offsets[0]]
    else:  # networks that share a chunk have all their groups in it
        begins = torch.tensor([m * available + offset for m, offset in enumerate(offsets)], device=out.device)
        index = begins[:, None] + torch.arange(count, device=out.device)
        out[:] = drawn.flatten(1).index_select(1, index.flatten()).view(out.shape)


def _numpy_works_on(device: torch.device) -> bool:
    return device.type == "cpu"


class _Buffers:
    """Memory that all chunks of a draw are made in.

    Words are int64 tensors. On a CPU they are worked on as uint64 arrays of numpy, whose loops are faster than torch's
    for int64, and sooner started.
    """

    def __init__(self, out: Tensor, size: int) -> None:
        self.device = out.device
        self.numpy = _numpy_works_on(out.device)
        self.ops: Any = np if self.numpy else torch
        real = out.dtype if out.dtype.itemsize > 2 else torch.float32
        self.integers = [torch.empty(size, dtype=torch.int64, device=out.device) for _ in range(3)]
        self.reals = [torch.empty(size, dtype=real, device=out.device) for _ in range(3)]
        self.drawn = torch.empty(2 * size, dtype=real, device=out.device)
        self.half_unit = torch.tensor(2.0**-32, dtype=real, device=out.device)

    def view(self, words: Tensor) -> Any:
        """The same words as `ops` take them."""
        return words.numpy().view(np.uint64) if self.numpy else words

    def key_schedule(self, keys: list[int]) -> Any:
        """Key words of every round as `ops` take them, shape (rounds, 2, len(keys), 1)."""
        words = np.array(keys, dtype=np.int64)[:, None] >> np.array([[[0]], [[32]]]) & WORD
        rounds = np.arange(ROUNDS)[:, None, None, None] * np.array(WEYL)[:, None, None]
        return self.view(torch.from_numpy((words + rounds) & WORD).to(self.device))

    def words(self, values: list[int]) -> Any:
        """64-bit patterns as `ops` take them, shape (len(values), 1)."""
        return self.view(torch.tensor(values, dtype=torch.int64, device=self.device)[:, None])

    def count(self, start: int, stop: int) -> Any:
        """The words start … stop − 1 as `ops` take them."""
        return self.view(torch.arange(start, stop, device=self.device))


class _Block:
    """Networks × lanes whose normals are drawn a few steps at a time.

    The first round and the products of the second have one part that depends on the step and one that depends on the
    element; the latter, `from_element`, is worked out here.
    """

    def __init__(self, buffers: _Buffers, keys: list[int], first: list[int], lanes: int) -> None:
        self.buffers, self.networks, self.lanes = buffers, len(keys), lanes
        key = buffers.key_schedule(keys)
        calls = buffers.words(first) + buffers.count(0, lanes)
        self.high = key[0][0]
        if max(first) + lanes > WORD:
            self.high = ((calls >> 32) & WORD) ^ self.high
        _, _, c2, c3 = _round((calls & WORD, 0, 0, 0), (0, key[0][1]))
        c0, c1, _, _ = _round((0, 0, c2, 0), key[1])
        self.from_element = c0, c1 ^ key[2][0], c3
        self.from_step = key[1][1], key[2][1]
        self.keys = key[3:, :, None]  # (rounds, 2, 1, networks, 1)
        if len(keys) > 1:  # spelt out for every lane, so that loops over them are long
            self.keys = self.keys | buffers.count(0, lanes) & 0

    def draw(self, start: int, steps: int) -> Tensor:
        """Normals of the steps from `start` on, shape (steps, networks, 4 lanes), valid until the next draw."""
        b, ops = self.buffers, self.buffers.ops
        shape = (2, steps, self.networks, self.lanes)
        size = math.prod(shape)
        words = [buffer[:size].view(shape) for buffer in b.integers]
        c, product, other = (b.view(w) for w in words)

        time = b.count(start, start + steps)[:, None, None] & WORD
        c0, c1, _, _ = _round((0, self.high, time, 0), (0, 0))
        _, _, c2, c3 = _round((c0, 0, 0, 0), (0, self.from_step[0]))
        ops.bitwise_xor(self.from_element[0], c1, out=c[0])
        ops.bitwise_xor(self.from_element[2], c2, out=c[1])
        c1, c3 = self.from_element[1], c3 ^ self.from_step[1]
        for r in range(2, ROUNDS):
            ops.multiply(c[0], MULTIPLIERS[0], out=product[1])
            ops.multiply(c[1], MULTIPLIERS[1], out=product[0])
            ops.bitwise_right_shift(product, 32, out=c)
            if r == 2:
                ops.bitwise_xor(c[0], c1, out=c[0])
                ops.bitwise_xor(c[1], c3, out=c[1])
            else:
                ops.bitwise_xor(c, other, out=c)
                ops.bitwise_xor(c, self.keys[r - 3], out=c)
            ops.bitwise_and(c, WORD if r < ROUNDS - 1 else WORD - 1, out=c)
            product, other = other, product
        ops.bitwise_left_shift(other, 32, out=other)  # x1, x3 times 2³², signed; c holds x0, x2 but for their last bits

        radius, angle, sine = (buffer[:size].view(shape) for buffer in b.reals)
        radius.copy_(words[0])
        torch.add(b.half_unit, radius, alpha=2.0**-32, out=radius).log_().mul_(-2).sqrt_()
        angle.copy_(words[2 - ROUNDS % 2]).mul_(math.pi * 2.0**-63)
        torch.sin(angle, out=sine)
        waves = angle.cos_().mul_(radius), sine.mul_(radius)
        rows = [wave[pair].view(-1, LANES) for pair in range(2) for wave in waves]  # p = 0 … 3
        drawn = b.drawn[: 2 * size].view(-1, GROUP)
        return torch.cat(rows, 1, out=drawn).view(steps, self.networks, -1)
