"""What is to be seen in each figure of an evaluation, in numbers, for those who cannot see it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from neurosde.evaluation.calibration import LEVELS

if TYPE_CHECKING:
    from neurosde.evaluation.evaluate import Evaluation


def most_variable(observed: xr.DataArray, count: int = 4) -> np.ndarray:
    """Return the neurons of a trial (time, neuron) whose rates vary most, at most `count` of them."""
    return np.argsort(-observed.std("time").to_numpy())[:count]


def weights(e: Evaluation) -> str:
    """Ranges of the three heat maps."""
    draws = _draws(e)
    mean, sd = draws.mean(0), draws.std(0, ddof=1)
    said = [f"Heat maps of {mean.shape[0]} by {mean.shape[1]} weights."]
    if e.truth is not None:
        said.append(f"True weights run from {e.truth.min():.3g} to {e.truth.max():.3g}.")
    said.append(f"Posterior means run from {mean.min():.3g} to {mean.max():.3g}.")
    said.append(
        f"Posterior standard deviations run from {sd.min():.3g} to {sd.max():.3g}; their median is {np.median(sd):.3g}."
    )
    return " ".join(said)


def spectrum(e: Evaluation) -> str:
    """Spectral radii, and how many eigenvalues lie beyond 1."""
    draws = _draws(e)
    radii = np.abs(np.linalg.eigvals(draws)).max(-1)
    low, high = np.quantile(radii, (0.05, 0.95))
    said = ["Eigenvalues in the complex plane.", _radius("the posterior mean", draws.mean(0))]
    said.append(f"Of draws the largest absolute value lies between {low:.3g} and {high:.3g}, for 90 % of them.")
    if e.truth is not None:
        said.append(_radius("the truth", e.truth))
    return " ".join(said)


def true_against_inferred(e: Evaluation) -> str:
    """Slope, correlation and coverage of the scatter."""
    assert e.truth is not None
    draws = _draws(e)
    mean, truth = draws.mean(0).ravel(), e.truth.ravel()
    low, high = np.quantile(draws, (0.05, 0.95), axis=0, method="weibull")  # as coverage is counted
    inside = int(((low <= e.truth) & (e.truth <= high)).sum())
    slope, offset = np.polyfit(truth, mean, 1) if truth.std() > 0 else (np.nan, np.nan)
    return (
        f"Scatter of {truth.size} posterior means against true weights, about the line of slope {slope:.3g} and offset "
        f"{offset:.3g}; on the diagonal they would be right. The root mean square distance from it is "
        f"{np.sqrt(np.mean((mean - truth) ** 2)):.3g}. {inside} of {truth.size} intervals hold the true weight."
    )


def coverage_curve(e: Evaluation) -> str:
    """Coverage at three levels, and where it is furthest off."""
    assert e.coverage is not None
    off = e.coverage - LEVELS
    worst = int(np.argmax(np.abs(off)))
    at = [f"{e.coverage[np.isclose(LEVELS, level)][0]:.3g} at {level:g}" for level in (0.1, 0.5, 0.9)]
    return (
        f"Coverage against nominal level: {', '.join(at)}. It is furthest from the diagonal at {LEVELS[worst]:g}, by "
        f"{off[worst]:+.3g}."
    )


def traces(e: Evaluation) -> str:
    """Which neurons are shown, how much they vary, and how far simulated rates are from recorded ones."""
    observed = e.tree["observed_data"].dataset["activity"].isel(trial=0)
    predicted = e.tree["posterior_predictive"].dataset["activity"].isel(chain=0, trial=0)
    said = [f"Rates over {observed.sizes['time']} times."]
    for neuron in most_variable(observed):
        one = observed.isel(neuron=neuron).to_numpy()
        line = f"Neuron {neuron} is recorded between {one.min():.2f} and {one.max():.2f}"
        if predicted.sizes["draw"]:
            apart = predicted.isel(neuron=neuron).to_numpy() - one
            line += f", simulated rates are {np.sqrt(np.mean(apart**2)):.2f} away (root mean square)"
        said.append(line + ".")
    return " ".join(said)


def _draws(e: Evaluation) -> np.ndarray:
    return e.tree["posterior"]["weights"].isel(chain=0).to_numpy()


def _radius(whose: str, W: np.ndarray) -> str:
    eigenvalues = np.linalg.eigvals(W)
    beyond = int((eigenvalues.real > 1).sum())
    return (
        f"Of {whose} the largest absolute value is {np.abs(eigenvalues).max():.3g}, and {beyond} of {len(eigenvalues)} "
        "real parts exceed 1."
    )
