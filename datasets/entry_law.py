"""The law of the entries of matrices of an ensemble, once gain and structure are known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class EntryLaw:
    """Law of the entries of matrices whose gain and structure are known: independent, W_ij = mean + scale · b · z.

    z is standard normal, or its absolute value where entries are one-sided; b is 1 with probability `density`, else 0.

    Attributes:
        mean: shape (matrix, post, pre), or what broadcasts to it.
        scale: its sign is that of one-sided entries; shape (matrix, post, pre), or what broadcasts to it.
        density: shape (matrix,), or (1,).
        one_sided: shape (matrix,), or (1,); such entries have density 1.
        gains: lowest and highest gain, over that of the matrix, where gains are uniform between them: scales are in
            proportion to the gain. Twice 1 where there is but one. Shape (matrix, 2), or (1, 2).
    """

    mean: Tensor
    scale: Tensor
    density: Tensor
    one_sided: Tensor
    gains: Tensor

    @classmethod
    def of(
        cls, scale: Tensor, *, mean: Tensor | None = None, density: float = 1.0, one_sided: bool = False
    ) -> EntryLaw:
        """Return the law of entries of one kind; by default normal about 0."""
        return cls(
            torch.zeros_like(scale) if mean is None else mean,
            scale,
            torch.tensor([density], dtype=torch.float64, device=scale.device),
            torch.tensor([one_sided], device=scale.device),
            torch.ones(1, 2, dtype=torch.float64, device=scale.device),
        )

    def expand(self, count: int, N: int) -> EntryLaw:
        """Return it for each entry of so many matrices, without copies."""
        shape = (count, N, N)
        each = self.density.expand(count), self.one_sided.expand(count), self.gains.expand(count, 2)
        return EntryLaw(self.mean.expand(shape), self.scale.expand(shape), *each)

    def scaled(self, factor: Tensor | float) -> EntryLaw:
        """Return the law of the matrices times a positive factor, shape () or (matrix, 1, 1)."""
        return replace(self, mean=self.mean * factor, scale=self.scale * factor)

    def of_gains(self, low: Tensor, high: Tensor) -> EntryLaw:
        """Return the law of matrices whose gains were between `low` and `high` times their own, shape (matrix,)."""
        return replace(self, gains=torch.stack([low, high], -1))

    def __getitem__(self, index: Any) -> EntryLaw:
        """Return that of some of the matrices."""
        return EntryLaw(*(getattr(self, item.name)[index] for item in fields(self)))

    @classmethod
    def cat(cls, laws: Sequence[EntryLaw]) -> EntryLaw:
        """Return the laws of several sets of matrices of one size, one after the other."""
        return cls(*(torch.cat([getattr(law, item.name) for law in laws]) for item in fields(cls)))
