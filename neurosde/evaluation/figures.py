"""Figures of an evaluation."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

from neurosde.evaluation import figure_texts
from neurosde.evaluation.calibration import LEVELS
from neurosde.evaluation.figure_texts import most_variable
from neurosde.evaluation.page import Picture, picture
from neurosde.evaluation.proportions import binomial_band

if TYPE_CHECKING:
    from neurosde.evaluation.evaluate import Evaluation

BLUE, RED, GREY = "#2166ac", "#b2182b", "#808080"


def pictures(evaluation: Evaluation) -> dict[str, Picture]:
    """Draw all figures that the evaluation has data for, with a caption and a text of what is to be seen in each."""
    e = evaluation
    drawn = {
        "weights": (weights(e), _WEIGHTS, figure_texts.weights(e)),
        "spectrum": (spectrum(e), _SPECTRUM, figure_texts.spectrum(e)),
    }
    if e.truth is not None:
        drawn["recovery"] = (true_against_inferred(e), _RECOVERY, figure_texts.true_against_inferred(e))
        drawn["coverage"] = (coverage_curve(e), _COVERAGE, figure_texts.coverage_curve(e))
    drawn["traces"] = (traces(e), _TRACES, figure_texts.traces(e))
    return {name: picture(name, *parts) for name, parts in drawn.items()}


_WEIGHTS = (
    "Weights from presynaptic (column) to postsynaptic (row) neurons: the truth where it is known, the posterior mean, "
    "and the posterior standard deviation."
)
_SPECTRUM = "Eigenvalues of the posterior mean, of draws, and of the truth. A shrunken mean has a smaller spectrum."
_RECOVERY = "Posterior mean against truth for every weight; bars span the central 90 % interval."
_COVERAGE = (
    "Share of true weights inside the central interval against its nominal level; the band holds 95 % of what as many "
    "independent weights would show."
)
_TRACES = "Recorded rates of a few neurons in the first trial, and the same trial simulated from posterior draws."


def weights(e: Evaluation) -> Figure:
    """Heat maps of W: truth, mean and standard deviation, on one colour scale for the first two."""
    draws = e.tree["posterior"]["weights"].isel(chain=0).to_numpy()
    panels = [] if e.truth is None else [("truth", e.truth)]
    panels.append(("posterior mean", draws.mean(0)))
    limit = float(np.quantile(np.abs(np.stack([values for _, values in panels])), 0.995)) or 1.0
    figure = Figure(figsize=(3.6 * (len(panels) + 1), 3.4), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, len(panels) + 1))
    for axis, (title, values) in zip(axes, panels, strict=False):
        axis.imshow(values, cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
        axis.set(title=title, xlabel="presynaptic", ylabel="postsynaptic")
    figure.colorbar(axes[0].images[0], ax=axes[: len(panels)], shrink=0.8, label="weight")
    spread = axes[-1].imshow(draws.std(0, ddof=1), cmap="viridis", vmin=0, interpolation="nearest")
    axes[-1].set(title="posterior sd", xlabel="presynaptic", ylabel="postsynaptic")
    figure.colorbar(spread, ax=axes[-1], shrink=0.8, label="standard deviation")
    return figure


def spectrum(e: Evaluation) -> Figure:
    """Eigenvalues in the complex plane."""
    draws = e.tree["posterior"]["weights"].isel(chain=0).to_numpy()
    figure = Figure(figsize=(4.6, 4.2), layout="constrained")
    axis = figure.subplots()
    sampled = np.linalg.eigvals(draws[:16]).ravel()
    axis.plot(sampled.real, sampled.imag, ".", color=GREY, markersize=2, alpha=0.5, label="posterior draws")
    mean = np.linalg.eigvals(draws.mean(0))
    axis.plot(mean.real, mean.imag, "o", color=BLUE, markersize=4, label="posterior mean")
    if e.truth is not None:
        true = np.linalg.eigvals(e.truth)
        axis.plot(true.real, true.imag, "x", color=RED, markersize=5, label="truth")
    axis.axvline(1, color="k", linewidth=0.6, linestyle=":")
    axis.set(xlabel="Re λ", ylabel="Im λ", aspect="equal", title="eigenvalues of W")
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return figure


def true_against_inferred(e: Evaluation) -> Figure:
    """Scatter of true against inferred weights with 90 % intervals for some."""
    assert e.truth is not None
    draws = e.tree["posterior"]["weights"].isel(chain=0).to_numpy()
    mean = draws.mean(0)
    low, high = np.quantile(draws, (0.05, 0.95), axis=0, method="weibull")  # as coverage is counted
    figure = Figure(figsize=(4.6, 4.2), layout="constrained")
    axis = figure.subplots()
    shown = np.random.default_rng(0).permutation(mean.size)[:300]
    true, flat = e.truth.ravel(), mean.ravel()
    axis.vlines(true[shown], low.ravel()[shown], high.ravel()[shown], color=GREY, linewidth=0.5, alpha=0.5)
    axis.plot(true, flat, ".", color=BLUE, markersize=3, alpha=0.6)
    ends = np.array([min(true.min(), flat.min()), max(true.max(), flat.max())])
    axis.plot(ends, ends, color="k", linewidth=0.8)
    axis.set(xlabel="true weight", ylabel="posterior mean, 90 % interval", title="true against inferred")
    return figure


def coverage_curve(e: Evaluation) -> Figure:
    """Empirical against nominal coverage."""
    assert e.truth is not None and e.coverage is not None
    figure = Figure(figsize=(4.6, 4.2), layout="constrained")
    axis = figure.subplots()
    axis.fill_between(LEVELS, *binomial_band(LEVELS, e.truth.size), color=GREY, alpha=0.3, linewidth=0)
    axis.plot([0, 1], [0, 1], color="k", linewidth=0.8)
    axis.plot(LEVELS, e.coverage, "o-", color=BLUE, markersize=3)
    learnt = e.calibration["contraction"]
    axis.set(
        xlabel="nominal level",
        ylabel="coverage",
        title="calibration" + ("" if np.isnan(learnt) else f" (contraction {learnt:.2f})"),
        aspect="equal",
    )
    return figure


def traces(e: Evaluation) -> Figure:
    """Recorded and simulated rates of the four most variable neurons."""
    observed = e.tree["observed_data"].dataset["activity"].isel(trial=0)
    predicted = e.tree["posterior_predictive"]["activity"].isel(chain=0, trial=0)
    busiest = most_variable(observed)
    figure = Figure(figsize=(7.2, 1.4 * len(busiest) + 0.6), layout="constrained")
    axes = np.atleast_1d(figure.subplots(len(busiest), 1, sharex=True))
    time = observed["time"].to_numpy()
    for axis, neuron in zip(axes, busiest, strict=True):
        for one in predicted.isel(neuron=neuron).to_numpy()[:5]:
            axis.plot(time, one, color=GREY, linewidth=0.7, alpha=0.8)
        axis.plot(time, observed.isel(neuron=neuron), color=BLUE, linewidth=1.2)
        axis.set(ylabel=f"neuron {neuron}", ylim=(-1.05, 1.05))
    simulated = " and simulated from draws (grey)" if len(predicted["draw"]) else ""
    axes[0].set_title(f"recorded (blue){simulated}", fontsize=10)
    axes[-1].set_xlabel("time")
    return figure
