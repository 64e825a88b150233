"""Figures of the page of `neurosde benchmark inference`."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.figure import Figure
from scipy.stats import kstwo

from neurosde.evaluation.figures import BLUE, GREY, RED
from neurosde.evaluation.inference_averages import Averages, averages
from neurosde.evaluation.inference_metrics import RANKS
from neurosde.evaluation.measures import Measure, values_of
from neurosde.evaluation.page import Picture, picture
from neurosde.evaluation.page_table import Table

AXES = {
    "neurons": "N", "times": "times of a trial", "trials": "trials", "gain": "gain", "noise_std": "noise σ",
    "observed": "fraction recorded",
}  # fmt: skip
_MARKERS = "osD^vP*X<>dhp8H4"
_LEVEL = 0.95


def errors(found: Averages) -> Picture:
    """Relative errors of each method, a row of points for each set of tasks."""
    methods, columns = list(found.mean.index), list(found.mean.columns)
    figure = Figure(figsize=(9, 1.2 + 0.34 * len(methods)), layout="constrained")
    axes = figure.subplots()
    for k, name in enumerate(columns):
        height = np.arange(len(methods)) + 0.6 * (k / max(1, len(columns) - 1) - 0.5)
        axes.errorbar(
            found.mean[name], height, xerr=found.half[name].fillna(0), fmt=_MARKERS[k % len(_MARKERS)], markersize=4,
            label=name, color=f"C{k % 10}",
        )  # fmt: skip
    axes.axvline(1, color="0.6", linewidth=1)
    axes.set(xlabel="relative error |Ŵ − W|/|W|", yticks=range(len(methods)), yticklabels=methods)
    log_scale(axes, "x", found.mean.to_numpy())
    axes.invert_yaxis()
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
    whole = found.mean.where(found.complete)
    best = "; ".join(f"{name}: {whole[name].idxmin()}, {whole[name].min():.2f}" for name in columns
                     if whole[name].notna().any())  # fmt: skip
    return picture("errors", figure, "Relative errors with 95 % intervals, by method and ensemble. At the line an "
                   "estimate is as far off as none.", f"Least error of each ensemble: {best}.")  # fmt: skip


def axes_of(results: xr.Dataset) -> dict[str, dict[float, list[int]]]:
    """Tasks by which the effect of one coordinate is seen: of each value the same ones but for that.

    Returns:
        Of each coordinate with more than one value, of each of its values the positions of tasks for which there are
        others that differ in this coordinate alone, one for each of its values.
    """
    there = [name for name in ("ensemble", *AXES) if name in results.coords]
    found: dict[str, dict[float, list[int]]] = {}
    for axis in (name for name in AXES if name in there):
        values = sorted({float(value) for value in results[axis].values})
        alike: dict[tuple[str, ...], dict[float, int]] = {}
        for k in range(results.sizes["task"]):
            rest = tuple(str(results[name].values[k]) for name in there if name != axis)
            alike.setdefault(rest, {})[float(results[axis].values[k])] = k
        whole = [group for group in alike.values() if len(group) == len(values)]
        if len(values) > 1 and whole:
            found[axis] = {value: [group[value] for group in whole] for value in values}
    return found


def against_axes(
    results: xr.Dataset, measure: Measure, titles: Sequence[str], axes: Mapping[str, Mapping[float, Sequence[int]]]
) -> tuple[Picture, Table]:
    """A measure against each coordinate of `axes_of`, averaged over the rest, as a figure and in numbers."""
    values = values_of(results, measure.name)
    found = {
        axis: averages(values, {f"{value:g}": chosen for value, chosen in sets.items()}, titles)
        for axis, sets in axes.items()
    }
    columns = min(3, len(axes))
    rows = math.ceil(len(axes) / columns)
    figure = Figure(figsize=(10, 3.1 * rows + 0.9), layout="constrained")
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
    for axis in panels[len(axes) :]:
        axis.remove()
    for panel, (axis, one) in zip(panels, found.items(), strict=False):
        at = np.array([float(value) for value in one.mean.columns])
        for k, method in enumerate(titles):
            if bool(one.complete.loc[method].all()):
                panel.errorbar(
                    at, one.mean.loc[method], yerr=one.half.loc[method].fillna(0), color=f"C{k % 10}",
                    marker=_MARKERS[k % len(_MARKERS)], markersize=4, linewidth=1, label=method, capsize=2,
                    linestyle="-" if k < 10 else "--",
                )  # fmt: skip
        panel.set(xlabel=AXES[axis])
        if at.min() > 0 and at.max() / at.min() > 4:
            panel.set_xscale("log")
        panel.set_xticks(at, [f"{value:g}" for value in at])
        panel.set_xticks([], minor=True)
    shown = np.concatenate([one.mean.where(one.complete).to_numpy().ravel() for one in found.values()])
    for k in range(rows):
        panels[k * columns].set_ylabel(measure.title)
    log_scale(panels[0], "y", shown)
    handles = {label: handle for panel in panels[: len(axes)]
               for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)}  # fmt: skip
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    name = f"{measure.name}_by_axis"
    caption = (
        f"{_capital(measure.title)} against each property of a task with 95 % intervals, averaged over all others. A "
        "method that has no value for some task is left out."
    )
    return picture(name, figure, caption, _said(found, measure)), _numbers(found, measure)


def calibration(results: xr.Dataset, titles: Mapping[str, str]) -> Picture | None:
    """Distribution functions of ranks and of TARP's credibility, less their level; None if no method has draws."""
    draws = int(json.loads(results.attrs["config"])["draws"])
    levels = np.arange(1, draws + 1) / (draws + 1)
    curves: dict[str, tuple[np.ndarray, np.ndarray, int]] = {}
    for name, title in titles.items():
        one = results["results"].sel({"method": name})
        shares = one.sel({"metric": [*RANKS, "credibility"]}).transpose("metric", ...).to_numpy()
        shares = shares.reshape(len(RANKS) + 1, -1)
        shares = shares[:, np.isfinite(shares).all(0)]
        if shares.size:
            below = np.stack([(np.rint(shares * draws) < k).mean(1) for k in range(1, draws + 1)], 1) - levels
            curves[title] = below[:-1], below[-1], shares.shape[1]
    if not curves:
        return None
    columns = min(3, len(curves))
    rows = math.ceil(len(curves) / columns)
    figure = Figure(figsize=(max(3.0 * columns, 5.0), 2.2 * rows + 0.7), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for panel in panels[len(curves) :]:
        panel.remove()
    said = []
    for panel, (title, (of_ranks, of_tarp, count)) in zip(panels, curves.items(), strict=False):
        half = float(kstwo.ppf(_LEVEL, count))
        panel.fill_between([0, 1], -half, half, color=GREY, alpha=0.25, linewidth=0)
        panel.axhline(0, color="k", linewidth=0.6)
        panel.plot(levels, of_ranks.T, color=BLUE, linewidth=0.9, alpha=0.8)
        panel.plot(levels, of_tarp, color=RED, linewidth=1.3)
        panel.set_title(title, fontsize=8)
        worst, tarp = np.abs(of_ranks).max(), np.abs(of_tarp).max()
        said.append(f"{title}: ranks off by at most {worst:.2f}, TARP by {tarp:.2f}, band {half:.2f}")
    figure.supxlabel("level", fontsize=9)
    figure.supylabel("share of networks below − level", fontsize=9)
    caption = (
        "Calibration, all tasks together: of each of eight features of W the distribution function of the truth's rank "
        "among draws (blue), and that of TARP's credibility (red), less what they are for calibrated posteriors. In "
        "the grey band (Kolmogorov's) a whole curve of independent networks stays with probability 95 %, or more, as "
        "ranks are whole numbers."
    )
    return picture("calibration", figure, caption, f"{'; '.join(said)}.")


def _said(found: Mapping[str, Averages], measure: Measure) -> str:
    """The best method at both ends of each axis."""
    said = []
    for axis, one in found.items():
        whole = one.mean.where(one.complete)
        for value in (whole.columns[0], whole.columns[-1]):
            column = whole[value].dropna()
            if len(column):
                best = column.idxmax() if measure.sense == "higher" else column.idxmin()
                said.append(f"{AXES[axis]} {value}: {best}, {column.loc[str(best)]:.3g}")
    what = "Greatest" if measure.sense == "higher" else "Least"
    return f"{what} {measure.title}: {'; '.join(said)}. All numbers are in the table that follows."


def _numbers(found: Mapping[str, Averages], measure: Measure) -> Table:
    """All that the figure shows."""
    label = {axis: [f"{AXES[axis]} {value}" for value in one.mean.columns] for axis, one in found.items()}

    def joined(frames: Iterable[tuple[str, pd.DataFrame]]) -> pd.DataFrame:
        return pd.concat([frame.set_axis(label[axis], axis=1) for axis, frame in frames], axis=1)

    mean = joined((axis, one.mean) for axis, one in found.items()).dropna(how="all")
    half = joined((axis, one.half) for axis, one in found.items()).loc[mean.index]
    return Table(
        f"{_capital(measure.title)} by property of the task", mean, {str(name): measure.sense for name in mean},
        interval="half of the 95 % interval", digits=3, half=half,
    )  # fmt: skip


def log_scale(axes: Any, which: str, values: np.ndarray) -> None:
    """A logarithmic scale with plain numbers where all values are positive and far apart."""
    finite = values[np.isfinite(values)]
    if not len(finite) or finite.min() <= 0 or finite.max() / finite.min() < 3:
        return
    {"x": axes.set_xscale, "y": axes.set_yscale}[which]("log")
    ticks = [a * 10.0**k for k in range(-6, 7) for a in (1, 2, 5)]
    wide = finite.max() / finite.min() > 200
    kept = [t for t in ticks if finite.min() / 1.5 < t < finite.max() * 1.5 and (not wide or f"{t:e}"[0] == "1")]
    set_ticks = {"x": axes.set_xticks, "y": axes.set_yticks}[which]
    set_ticks(kept, [f"{tick:g}" for tick in kept])
    set_ticks([], minor=True)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
