"""The order in which a cube is visited: blocks of consecutive networks shuffled, then networks within a window of them.

Reading networks in a random order is slow wherever a seek costs time. Here the order is random on two scales: blocks of
consecutive networks are permuted and laid end to end; that sequence is cut into windows of whole batches; networks are
permuted within each window. A window is read in a few contiguous pieces and is all that has to be at hand at a time.

Each rank takes a contiguous share of the permuted sequence, so that ranks see different networks, all of them together
up to a remainder of less than one per rank, and other ones in every epoch. The order is a function of seed, epoch and
sizes, and of nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Sampler

from neurosde.validation import check_count


class WindowedBatch(list[int]):
    """The networks of a batch, and of what is left of the window that it belongs to.

    Args:
        networks: positions of the batch's networks.
        window: positions of the networks of this batch and of the later ones of its window, ascending.
    """

    def __init__(self, networks: Sequence[int], window: np.ndarray) -> None:
        super().__init__(networks)
        self.window = window


@dataclass(frozen=True)
class Order:
    """What an order depends on, besides the epoch.

    Attributes:
        networks: number of networks.
        batch_size: networks per batch.
        block: consecutive networks that stay together until windows are shuffled.
        window: batches per window.
        shuffle: whether to permute anything.
        seed: seed of the permutations.
        rank: which share to visit.
        world_size: number of shares.
        drop_last: whether to leave out a last batch that is smaller than the others.
    """

    networks: int
    batch_size: int = 32
    block: int = 1
    window: int = 1
    shuffle: bool = False
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    drop_last: bool = False

    def __post_init__(self) -> None:
        for name in ("batch_size", "block", "window", "world_size"):
            check_count(getattr(self, name), name)
        check_count(self.seed, "seed", 0)
        check_count(self.rank, "rank", 0)
        if self.rank >= self.world_size:
            raise ValueError(f"rank must be below world_size = {self.world_size}; got {self.rank}.")
        if self.networks < self.world_size:
            raise ValueError(
                f"every rank must have at least one network; got {self.networks} for {self.world_size} ranks. "
                "Use fewer ranks."
            )
        if self.batches == 0:
            raise ValueError(
                f"drop_last needs at least one whole batch; got {self.share} networks for batches of "
                f"{self.batch_size}. Use a smaller batch_size."
            )

    @property
    def share(self) -> int:
        """Networks that a rank visits per epoch."""
        return self.networks // self.world_size

    @property
    def batches(self) -> int:
        """Batches per epoch."""
        return self.share // self.batch_size if self.drop_last else math.ceil(self.share / self.batch_size)

    def positions(self, epoch: int) -> np.ndarray:
        """Return the networks of this rank in the order of an epoch, shape (share,)."""
        sequence = np.arange(self.networks)
        mine = slice(self.rank * self.share, (self.rank + 1) * self.share)
        if not self.shuffle:
            return sequence[mine]
        generator = np.random.default_rng((self.seed, epoch))  # the same on every rank
        blocks = generator.permutation(math.ceil(self.networks / self.block))
        sequence = np.concatenate([sequence[block * self.block : (block + 1) * self.block] for block in blocks])[mine]
        generator = np.random.default_rng((self.seed, epoch, self.rank))
        step = self.window * self.batch_size
        for start in range(0, len(sequence), step):
            generator.shuffle(sequence[start : start + step])
        return sequence


class BlockShuffle(Sampler[list[int]]):
    """A torch batch sampler that visits networks in an `Order`.

    Args:
        order: the order.

    Attributes:
        epoch: the epoch that is visited next.
        start: the batch that it starts with; 0 again once it has started.
    """

    def __init__(self, order: Order) -> None:
        self.order = order
        self.epoch = 0
        self.start = 0

    def __len__(self) -> int:
        return self.order.batches

    def __iter__(self) -> Iterator[list[int]]:
        # torch makes more iterators than it uses: nothing happens before the first batch is asked for
        start, self.start = self.start, 0
        positions = self.order.positions(self.epoch)
        size, step = self.order.batch_size, self.order.window * self.order.batch_size
        window = positions[:0]
        for first in range(start * size, min(len(self) * size, len(positions)), size):
            if first % step == 0 or first == start * size:
                window = np.sort(positions[first : (first // step + 1) * step])
            yield WindowedBatch(positions[first : first + size].tolist(), window)
