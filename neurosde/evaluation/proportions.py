"""Where shares of counted things lie: intervals that are of the binomial law, and so stay between 0 and 1."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import binom

from neurosde.validation import check_count


def binomial_band(chances: ArrayLike, count: int, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Where the share of `count` independent events that happen lies with the probability `level`.

    As counts are whole numbers the probability is at least `level`, with at most (1 − level)/2 on either side.

    Args:
        chances: probability of each event, between 0 and 1, of any shape.
        count: number of the events.
        level: probability of the interval.

    Returns:
        Lower and upper end, of the shape of `chances`, between 0 and 1.

    Raises:
        ValueError: chances that are no probabilities, no events, or a level that is not between 0 and 1.
    """
    chances = np.asarray(chances, dtype=float)
    check_count(count, "count")
    if not bool(((chances >= 0) & (chances <= 1)).all()):
        raise ValueError(f"chances must be probabilities, between 0 and 1; got {chances.min():g} … {chances.max():g}.")
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1; got {level}.")
    low, high = np.asarray(binom.ppf([[(1 - level) / 2], [(1 + level) / 2]], count, chances.ravel())) / count
    return low.reshape(chances.shape), high.reshape(chances.shape)
