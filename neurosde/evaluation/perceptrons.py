"""Small perceptrons that tell two classes apart, many of them trained side by side, each stopped in time."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

HIDDEN = 64
BATCH = 128
STEPS = 600
CHECK_EVERY = 20  # steps
PROGRESS = 1e-3  # of the cross-entropy, which is log 2 for a coin
PATIENCE = 5
HELD_BACK = 8  # one in so many training rows says when to stop


class Perceptrons(nn.Module):
    """Perceptrons of two hidden layers, side by side: (classifier, row, feature) → logits (classifier, row).

    Args:
        count: number of classifiers.
        features: number of features.
        generator: of the initial weights.
    """

    def __init__(self, count: int, features: int, generator: torch.Generator) -> None:
        super().__init__()
        sizes = (features, HIDDEN, HIDDEN, 1)
        self.weights = nn.ParameterList(
            torch.randn(count, a, b, generator=generator) / math.sqrt(a) for a, b in zip(sizes, sizes[1:], strict=False)
        )
        self.biases = nn.ParameterList(torch.zeros(count, 1, b) for b in sizes[1:])

    def forward(self, x: Tensor) -> Tensor:
        """Logits of every classifier, shape (classifier, row)."""
        for k, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.baddbmm(bias, x, weight)
            if k < len(self.weights) - 1:
                x = torch.nn.functional.silu(x)
        return x.squeeze(-1)


def train_perceptrons(
    network: Perceptrons,
    features: Tensor,
    labels: Tensor,
    train: Tensor,
    held: Tensor,
    generator: torch.Generator,
    *,
    decay: float = 1.0,
    patience: int = PATIENCE,
) -> None:
    """Train all together; each keeps the weights with which it did best on what was held back for that.

    Args:
        network: the classifiers.
        features: shape (row, feature).
        labels: 0 or 1, shape (row,), or (classifier, row) where they differ.
        train: rows that each is trained on, shape (classifier, of them).
        held: rows that say when to stop, shape (classifier, of them).
        generator: of the batches.
        decay: AdamW's weight decay. A strong one keeps a classifier of few draws from learning them by heart, and lets
            differences in spread, at which a perceptron starts without a slope, be learnt late or never.
        patience: checks without progress in any classifier after which all stop.
    """
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=decay, fused=True)
    best = torch.full((len(train),), torch.inf)
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
            if since == patience:
                break
        chosen = torch.randint(train.shape[1], (BATCH,), generator=generator)
        optimizer.zero_grad()
        _loss(network, features, labels, train[:, chosen]).sum().backward()
        optimizer.step()
    with torch.no_grad():
        for old, parameter in zip(kept, network.parameters(), strict=True):
            parameter.copy_(old)


def _loss(network: Perceptrons, features: Tensor, labels: Tensor, rows: Tensor) -> Tensor:
    """Cross-entropy of each classifier, shape (classifier,), on rows (classifier, row)."""
    wanted = labels[rows] if labels.ndim == 1 else labels.gather(1, rows)
    return binary_cross_entropy_with_logits(network(features[rows]), wanted, reduction="none").mean(1)
