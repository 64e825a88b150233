"""Classifier two-sample test: can a classifier that has seen some draws of both laws tell further ones apart?

The classifier, a small perceptron or a random forest, is trained on four fifths of the draws and asked about the last
fifth, five times over. An accuracy of ½ says that it found no difference; two normal laws of unit variance whose means
are δ apart allow Φ(δ/2) at best. A forest finds other differences than a perceptron does, and neither is the better one
in general: where both are at ½ there is less reason to doubt that the laws are one.

References:
    Revisiting classifier two-sample tests (Lopez-Paz, Oquab, 2017), https://arxiv.org/abs/1610.06545
    Random forests (Breiman, 2001), https://doi.org/10.1023/A:1010933404324
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from neurosde.evaluation.perceptrons import HELD_BACK, Perceptrons, train_perceptrons

FOLDS = 5
TREES = 100
LEAF = 5  # draws that a leaf of a tree holds at least

Classifier = Literal["mlp", "forest"]


@dataclass(frozen=True)
class TwoSampleTest:
    """What a classifier two-sample test found.

    Attributes:
        accuracy: share of the draws that were told right by a classifier that had not seen them; ½: no difference.
        standard_error: binomial standard error of the accuracy.
    """

    accuracy: float
    standard_error: float


def c2st(first: np.ndarray, second: np.ndarray, *, seed: int = 0, classifier: Classifier = "mlp") -> TwoSampleTest:
    """Test whether two samples are of one law, by five-fold cross-validation.

    Args:
        first: one sample, shape (draw, feature). Features are standardised here.
        second: the other, of as many draws.
        seed: of folds, initial weights and batches, or of folds and trees.
        classifier: "mlp", the perceptron, or "forest", a random forest of scikit-learn.

    Raises:
        ValueError: unknown classifier, the shapes differ, there are fewer than two draws for each fold, or values are
            not finite.
    """
    if classifier not in get_args(Classifier):
        raise ValueError(f"classifier must be one of {get_args(Classifier)}; got {classifier!r}.")
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
    standardised = centred / np.where(varies, spread, np.inf)
    if classifier == "forest":
        right = _told_right_by_forest(standardised, seed)
    else:
        labels = torch.arange(2).repeat_interleave(len(first)).float()
        features = torch.from_numpy(standardised).float()
        right = _told_right(features, labels, torch.Generator().manual_seed(seed)).double().numpy()
    accuracy = float(right.mean())
    return TwoSampleTest(accuracy, math.sqrt(accuracy * (1 - accuracy) / len(right)))


def _told_right_by_forest(features: np.ndarray, seed: int) -> np.ndarray:
    """Say which draws, of the first sample and then of the second, are told right; a tied vote is half right."""
    from sklearn.ensemble import RandomForestClassifier  # here: it takes longer to import than the rest of this module
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    labels = np.repeat([0, 1], len(features) // 2)
    forest = RandomForestClassifier(TREES, min_samples_leaf=LEAF, random_state=seed)
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    votes = cross_val_predict(forest, features, labels, cv=folds, method="predict_proba")[:, 1]
    return np.where(votes == 0.5, 0.5, (votes > 0.5) == (labels == 1))


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
    network = Perceptrons(FOLDS, features.shape[1], generator)
    train_perceptrons(network, features, labels, torch.stack(train), torch.stack(held), generator)
    with torch.no_grad():
        logits = network(features.expand(FOLDS, *features.shape))  # every fold's classifier on every draw
    return (logits.gather(0, fold[None])[0] > 0) == (labels > 0)
