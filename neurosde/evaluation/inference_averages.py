"""Averages of a measure over tasks and networks, with intervals, of a cube of `neurosde benchmark inference`.

Tasks are a fixed design and networks are drawn, other ones in each task: of K tasks with n_t networks each, the mean is
m = Σ_t m_t / K, its variance Σ_t s_t²/n_t / K², and its interval that of Student's law with Satterthwaite's degrees of
freedom, (Σ v_t)² / Σ v_t²/(n_t − 1), v_t = s_t²/n_t. How much tasks differ from each other is no part of it. Where a
task has a value of one network alone its spread is not known, and there is no interval.

References:
    An approximate distribution of estimates of variance components (Satterthwaite, 1946),
    https://doi.org/10.2307/3002019
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import xarray as xr
from scipy.stats import t as student

LEVEL = 0.95
ALL = "all"


@dataclass(frozen=True)
class Averages:
    """Means of a measure, a row for each method and a column for each set of tasks.

    Attributes:
        mean: over tasks and networks, of the tasks in which the method has a value; NaN if there is none.
        half: half of the 95 % interval; NaN if there is no spread to tell it from.
        tasks: number of tasks that went into the mean.
        possible: number of tasks in which any method has a value.
    """

    mean: pd.DataFrame
    half: pd.DataFrame
    tasks: pd.DataFrame
    possible: dict[str, int]

    @property
    def complete(self) -> pd.DataFrame:
        """Whether a mean is over all tasks that it could be over: others are of fewer, perhaps easier ones."""
        return (self.tasks == pd.Series(self.possible)) & (self.tasks > 0)


def averages(values: xr.DataArray, sets: Mapping[str, Sequence[int]], titles: Sequence[str]) -> Averages:
    """Average a measure over sets of tasks.

    Args:
        values: of `measures.values_of`.
        sets: positions of the tasks of each set.
        titles: of the methods, in the order of the cube.
    """
    mean, variance, freedom = _of_tasks(values)
    columns: dict[str, list[np.ndarray]] = {}
    possible: dict[str, int] = {}
    for name, chosen in sets.items():
        m, v, f = (one[list(chosen)] for one in (mean, variance, freedom))
        there = np.isfinite(m)
        count = there.sum(0)
        v = np.where(there, v, 0.0)
        with np.errstate(invalid="ignore", divide="ignore"):
            average = np.where(there, m, 0.0).sum(0) / count
            degrees = v.sum(0) ** 2 / np.where(f > 0, v**2 / np.maximum(f, 1), 0.0).sum(0)
            half = student.ppf((1 + LEVEL) / 2, degrees) * np.sqrt(v.sum(0)) / count
        columns[name] = [average, half, count]
        possible[name] = int(there.any(1).sum())
    frames = [
        pd.DataFrame({name: parts[k] for name, parts in columns.items()}, pd.Index(titles, name="method"))
        for k in range(3)
    ]
    return Averages(frames[0], frames[1], frames[2], possible)


def by_ensemble(results: xr.Dataset) -> dict[str, list[int]]:
    """Positions of the tasks of each ensemble, in the order of the cube, and of all if there are several ensembles."""
    names = [str(name) for name in results["ensemble"].values]
    sets = {name: [k for k, one in enumerate(names) if one == name] for name in dict.fromkeys(names)}
    return sets | ({ALL: list(range(len(names)))} if len(sets) > 1 else {})


def _of_tasks(values: xr.DataArray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean over networks, variance of that mean, and its degrees of freedom, each (task, method)."""
    data = values.to_numpy().astype(np.float64)
    data = data.reshape(*data.shape[:2], -1)
    there = np.isfinite(data)
    count = there.sum(-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(there, data, 0.0).sum(-1) / count
        square = np.where(there, data - mean[..., None], 0.0) ** 2
        variance = square.sum(-1) / (count - 1) / count
    # What is the same for all networks was measured once and has no spread; that of one network is not known.
    spread = (count > 1) & (np.ptp(np.where(there, data, mean[..., None]), axis=-1) > 0)
    alone = np.where(count == 1, np.nan, 0.0)
    return mean, np.where(spread, variance, alone), np.where(spread, count - 1, 0)
