"""Classifier two-sample test: can a classifier that has seen some draws of both laws tell further ones apart?

The classifier is a small perceptron, trained on four fifths of the draws and asked about the last fifth, five times
over. An accuracy of ½ says that it found no difference; two normal laws of unit variance whose means are δ apart allow
Φ(δ/2) at best.

References:
    Revisiting classifier two-sample tests (Lopez-Paz, Oquab, 2017), https://arxiv.org/abs/1610.06545
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

HIDDEN = 64
FOLDS = 5
BATCH = 128
STEPS = 600
CHECK_EVERY = 20  # steps
PROGRESS = 1e-3  # of the cross-entropy, which is log 2 for a coin
PATIENCE = 5  # checks without progress in any fold
HELD_BACK = 8  # one in so many training rows says when to stop


@dataclass(frozen=True)
class TwoSampleTest:
    """What a classifier two-sample test found.

    Attributes:
        accuracy: share of the draws that were told right by a classifier that had not seen them; ½: no difference.
        standard_error: binomial standard error of the accuracy.
    """

    accuracy: float
    standard_error: float


def c2st(first: np.ndarray, second: np.ndarray, *, seed: int = 0) -> TwoSampleTest:
    """Test whether two samples are of one law, by five-fold cross-validation.

    Args:
        first: one sample, shape (draw, feature). Features are standardised here.
        second: the other, of as many draws.
        seed: of folds, initial weights and batches.

    Raises:
        ValueError: the shapes differ, there are fewer than two draws for each fold, or values are not finite.
    """
    first, second = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if first.shape != second.shape or first.ndim != 2 or first.shape[1] == 0:
        raise ValueError(f"both samples must be (draw, feature) of one shape; got {first.shape} and {second.shape}.")
    if len(first) < 2 * FOLDS:
        raise ValueError(f"samples must have at least {2 * FOLDS} draws for {FOLDS} folds; got {len(first)}.")
    both = np.concatenate([first, second])
    if not np.isfinite(both).all():
        raise ValueError("samples must be finite; got NaN or infinite values. Leave those draws out.")
    centred = both - both.mean(0)
    spread = centred.std(0)
    varies = spread > 1e-9 * np.abs(both).max(0)
    features = torch.from_numpy(centred / np.where(varies, spread, np.inf)).float()
    labels = torch.arange(2).repeat_interleave(len(first)).float()
    right = _told_right(features, labels, torch.Generator().manual_seed(seed))
    accuracy = float(right.double().mean())
    return TwoSampleTest(accuracy, math.sqrt(accuracy * (1 - accuracy) / len(right)))


def _told_right(features: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    """Say which draws are told right by the classifier of the folds that they are not in."""
    half = len(labels) // 2
    # Both classes are spread evenly over the folds: what a fold has too much of, its training set has too little of.
    fold = torch.cat([torch.randperm(half, generator=generator) % FOLDS for _ in range(2)])
    rows_per_class = (FOLDS - 1) * (half // FOLDS)  # as many in every fold
    kept_back = max(1, rows_per_class // HELD_BACK)
    train, held = [], []
    for k in range(FOLDS):
        others = [torch.nonzero((fold != k) & (labels == label)).flatten() for label in (0, 1)]
        shuffled = [rows[torch.randperm(len(rows), generator=generator)] for rows in others]
        mixed = torch.stack([rows[:rows_per_class] for rows in shuffled], dim=1)  # (row, class)
        held.append(mixed[:kept_back].flatten())
        train.append(mixed[kept_back:].flatten())
    network = _Perceptrons(features.shape[1], generator)
    _train(network, features, labels, torch.stack(train), torch.stack(held), generator)
    with torch.no_grad():
        logits = network(features.expand(FOLDS, *features.shape))  # every fold's classifier on every draw
    return (logits.gather(0, fold[None])[0] > 0) == (labels > 0)


class _Perceptrons(nn.Module):
    """One perceptron of two hidden layers for each fold, side by side: (fold, row, feature) → logits (fold, row)."""

    def __init__(self, features: int, generator: torch.Generator) -> None:
        super().__init__()
        sizes = (features, HIDDEN, HIDDEN, 1)
        self.weights = nn.ParameterList(
            torch.randn(FOLDS, a, b, generator=generator) / math.sqrt(a) for a, b in zip(sizes, sizes[1:], strict=False)
        )
        self.biases = nn.ParameterList(torch.zeros(FOLDS, 1, b) for b in sizes[1:])

    def forward(self, x: Tensor) -> Tensor:
        for k, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.baddbmm(bias, x, weight)
            if k < len(self.weights) - 1:
                x = torch.nn.functional.silu(x)
        return x.squeeze(-1)


def _train(
    network: _Perceptrons, features: Tensor, labels: Tensor, train: Tensor, held: Tensor, generator: torch.Generator
) -> None:
    """Train all folds together; each keeps the weights with which it did best on what was held back for that."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=1.0, fused=True)
    best = torch.full((FOLDS,), torch.inf)
    kept = [parameter.detach().clone() for parameter in network.parameters()]
    since = 0
    for step in range(STEPS):
        if step % CHECK_EVERY == 0:
            with torch.no_grad():
                loss = _loss(network, features, labels, held)
                better = loss < best - PROGRESS
                best = torch.where(better, loss, best)
                for old, parameter in zip(kept, network.parameters(), strict=True):
                    old[better] = parameter[better]
            since = 0 if better.any() else since + 1
            if since == PATIENCE:
                break
        chosen = torch.randint(train.shape[1], (BATCH,), generator=generator)
        optimizer.zero_grad()
        _loss(network, features, labels, train[:, chosen]).sum().backward()
        optimizer.step()
    with torch.no_grad():
        for old, parameter in zip(kept, network.parameters(), strict=True):
            parameter.copy_(old)


def _loss(network: _Perceptrons, features: Tensor, labels: Tensor, rows: Tensor) -> Tensor:
    """Cross-entropy of each fold, shape (fold,), on rows (fold, row)."""
    return binary_cross_entropy_with_logits(network(features[rows]), labels[rows], reduction="none").mean(1)
