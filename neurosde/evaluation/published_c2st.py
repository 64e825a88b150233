"""The classifier two-sample test as sbibm's published figures were made with it, for the table beside them.

`neurosde.evaluation.c2st` is the test of all other tables: its perceptron is of one size, decays its weights and stops
in time, which is quicker, and finds less with many draws. Here all is as it was published: two hidden layers of ten
units for each dimension, rectified linear, Adam at scikit-learn's defaults until the training loss falls no more,
10 000 epochs at most; five folds of shuffled rows, seed 1; accuracies averaged over folds. Standardising, an option
there, takes mean and standard deviation of the first sample alone. Accuracies of the two tests are not to be compared
with each other. Of 20 000 rows it takes a second in two dimensions and two minutes in ten, on one core of a server:
there the training loss falls for long after the classifier has learnt all there is.

References:
    Benchmarking simulation-based inference (Lueckmann, Boelts, Greenberg, Gonçalves, Macke, 2021),
    https://arxiv.org/abs/2101.04653
    sbibm, sbibm/metrics/c2st.py, https://github.com/sbi-benchmark/sbibm
"""

from __future__ import annotations

import numpy as np

FOLDS = 5
UNITS = 10  # of each hidden layer, for each dimension
EPOCHS = 10_000  # at most
SEED = 1


def published_c2st(reference: np.ndarray, draws: np.ndarray, *, standardise: bool) -> float:
    """Accuracy of sbibm's classifier between two samples; ½: no difference was found.

    Args:
        reference: draws of the reference posterior, shape (draw, feature).
        draws: those that are tested, shape (draw, feature).
        standardise: subtract the mean of the reference from both, and divide both by its standard deviation.

    Raises:
        ValueError: the shapes differ, there are fewer draws than folds, values are not finite, or a feature of the
            reference that is to be standardised does not vary.
    """
    from sklearn.model_selection import KFold, cross_val_score  # here: it takes longer to import than all of this
    from sklearn.neural_network import MLPClassifier

    if reference.ndim != 2 or reference.shape[1] == 0 or reference.shape != draws.shape:
        raise ValueError(f"both samples must be (draw, feature) of one shape; got {reference.shape} and {draws.shape}.")
    if len(reference) < FOLDS:
        raise ValueError(f"samples must have at least {FOLDS} draws, one for each fold; got {len(reference)}.")
    if not (np.isfinite(reference).all() and np.isfinite(draws).all()):
        raise ValueError("samples must be finite; got NaN or infinite values. Leave those draws out.")
    if standardise:
        mean, spread = reference.mean(0), reference.std(0, ddof=1)
        if not spread.all():
            raise ValueError(f"features {np.flatnonzero(spread == 0).tolist()} of the reference do not vary.")
        reference, draws = (reference - mean) / spread, (draws - mean) / spread
    rows = np.concatenate([reference, draws]).astype(np.float32)  # as there
    labels = np.repeat([0.0, 1.0], len(reference))
    hidden = UNITS * rows.shape[1]
    classifier = MLPClassifier((hidden, hidden), max_iter=EPOCHS, random_state=SEED)
    folds = KFold(FOLDS, shuffle=True, random_state=SEED)
    return float(cross_val_score(classifier, rows, labels, cv=folds, scoring="accuracy").mean())
