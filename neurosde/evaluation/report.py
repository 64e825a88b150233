"""The report of an evaluation: one page with every table and figure inside it, and the figures as PNG beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import xarray as xr
from scipy.stats import chi2

from neurosde.evaluation.page import Section, write_page
from neurosde.evaluation.page_table import Table
from neurosde.evaluation.proportions import binomial_band
from neurosde.evaluation.recovery import SENSES

if TYPE_CHECKING:
    from neurosde.evaluation.evaluate import Evaluation

_MEANINGS = {
    "contraction": "1 − posterior variance / that of a Gaussian prior of the recording's gain: 1 has learnt everything",
    "mean_error": "of the mean of the draws, against the exact posterior's",
    "mean_error_floor": "the same for exact draws, from their number alone",
    "whitened_variance": "variance of the draws, in units of the exact posterior's",
    "coverage_50": "share of the true weights in the central 50 % interval",
    "coverage_90": "share of the true weights in the central 90 % interval",
    "truth_chi2": "squared distance of the truth from the mean, in units of what is expected",
    "truth_p": "p-value of that distance, two-sided",
}


def write_report(evaluation: Evaluation, folder: str | Path, results: Mapping[str, Any]) -> Path:
    """Write `report.html` and the figures into a folder.

    Args:
        evaluation: what is reported.
        folder: where to.
        results: global attributes of the results, which say how the evaluation was made.

    Returns:
        Path of the report.

    Raises:
        OSError: the folder cannot be written, or the disk is full.
    """
    from neurosde.evaluation.figures import pictures  # here, since matplotlib is slow to import

    e, shown = evaluation, pictures(evaluation)
    attributes = {str(name): value for name, value in e.tree.attrs.items()}
    of_weights = tuple(shown[name] for name in ("recovery", "weights", "spectrum") if name in shown)
    sections = [
        Section("Weights" if e.recovery is None else "Recovery of W", _about_recovery(e), _recovery(e), of_weights)
    ]
    sections.append(
        Section(
            "Calibration",
            (
                "Coverage says little alone: the prior covers as announced too. Read it beside contraction"
                + (", and the distance to the exact posterior." if "mean_error" in e.calibration else "."),
            ),
            (_calibration(e),),
            tuple(shown[name] for name in ("coverage",) if name in shown),
        )
    )
    sections.append(Section("Posterior-predictive checks", _about_predictive(e), _predictive(e), (shown["traces"],)))
    if "refinement" in e.tree:
        about = ("Draws were moved to the posterior of a trained prior; R-hat near 1 says that they went everywhere.",)
        sections.append(
            Section("Refinement", about, (_scalars(e.tree["refinement"].dataset, "How draws were refined"),))
        )
    constants = _scalars(e.tree["constant_data"].dataset, "Constants of the posterior")
    sections.append(Section("What it rests on", (), (constants,)))
    made: dict[str, Mapping[str, Any]] = {"The posterior": attributes, "This evaluation": results}
    return write_page(
        folder, attributes["title"], sections, made, summary=attributes["summary"], notes=attributes["notes"]
    )


def _about_recovery(e: Evaluation) -> tuple[str, ...]:
    if e.recovery is None:
        return ("The true weights are not known here; give them with --truth to measure how near the posterior is.",)
    return (
        "Errors are relative to the true weights: guessing zero has an error of 1. The posterior stands first, then "
        "what it has to be compared with.",
    )


def _recovery(e: Evaluation) -> tuple[Table, ...]:
    if e.recovery is None:
        return ()
    return (Table("Estimates of W against the true weights", e.recovery, SENSES),)


def _calibration(e: Evaluation) -> Table:
    data = pd.DataFrame(
        {"value": e.calibration, "meaning": {name: _MEANINGS[name] for name in e.calibration}}
    ).rename_axis("quantity")
    data.index = data.index.str.replace("_", " ")
    draws, N, _ = e.tree["posterior"]["weights"].isel(chain=0).shape
    widest = (draws - 1) / (draws + 1)  # what the interval between the least and the largest of exact draws covers
    within = {
        "whitened variance": _mean_square_band(draws * N * N),
        "coverage 50": binomial_band(min(0.5, widest), N * N),
        "coverage 90": binomial_band(min(0.9, widest), N * N),
        "truth chi2": _mean_square_band(N * N),
    }  # of N² independent weights of a right posterior
    ends = np.array([within.get(name, (math.nan, math.nan)) for name in data.index]).T
    low, high = (pd.DataFrame({"value": end}, data.index) for end in ends)
    known = bool(np.isfinite(ends).any())
    return Table(
        "How sure the posterior is, and whether it should be",
        data,
        low=low if known else None,
        high=high if known else None,
        interval="where 95 % of right posteriors would lie, were their weights independent" if known else "",
    )


def _mean_square_band(count: int) -> tuple[float, float]:
    """Where the mean square of so many standard normals lies with a probability of 95 %."""
    low, high = chi2.interval(0.95, count)
    return float(low) / count, float(high) / count


def _about_predictive(e: Evaluation) -> tuple[str, ...]:
    if e.predictive is None:
        return ("No activity was simulated from draws, so that nothing can be compared with the recording.",)
    return (
        "Would these weights have produced activity like the recorded one? A small p says that the model misses "
        "something; a large one is no evidence that W is right.",
    )


def _predictive(e: Evaluation) -> tuple[Table, ...]:
    if e.predictive is None:
        return ()
    titles = {"predicted": "predicted (mean)", "sd": "predicted (standard deviation)", "p": "p, two-sided"}
    return (Table("Statistics of recorded and of simulated activity", e.predictive, titles=titles),)


def _scalars(group: xr.Dataset, caption: str) -> Table:
    """The numbers of a group of the posterior file, with what the file says of them."""
    there = {str(name): one for name, one in group.data_vars.items() if one.ndim == 0}
    data = pd.DataFrame(
        {
            "value": {name: float(one) for name, one in there.items()},
            "unit": {name: str(one.attrs["units"]) for name, one in there.items()},
            "meaning": {name: str(one.attrs["long_name"]) for name, one in there.items()},
        }
    )
    data.index = data.index.str.replace("_", " ")
    return Table(caption, data.rename_axis("quantity"), digits=6)
