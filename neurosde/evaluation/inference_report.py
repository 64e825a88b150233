"""Tables, figures and the page of `neurosde benchmark inference`."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from scipy.stats import t as student

from neurosde.evaluation.calibration import coverage_error, coverage_error_of_exact, holm
from neurosde.evaluation.inference_methods import METHODS
from neurosde.evaluation.inference_metrics import METRICS, RANKS
from neurosde.evaluation.page import Picture, Section, picture, write_page
from neurosde.evaluation.page_table import Table
from neurosde.evaluation.rank_calibration import uniformity

GROUPS = {
    "Recovery": (
        "relative_error", "correlation", "r2", "edge_auc", "sign_accuracy", "eigenvalue_error", "singular_value_error"
    ),
    "Posterior": ("energy_score", "crps", "log_score", "coverage_90", "contraction"),
    "Exact posterior": (
        "to_exact", "sd_ratio", "least_variance", "largest_variance", "kl", "kl_floor", "c2st_mlp", "c2st_forest",
        "c2st_ratio"
    ),
    "Prediction": ("held_out", "misfit", "lyapunov_error", "fixed_point_distance"),
    "Cost": ("seconds", "memory"),
}  # fmt: skip
SHOWN = ("relative_error", "edge_auc", "energy_score", "coverage_90", "contraction", "held_out", "seconds")
_LEVEL = 0.95


def means(results: xr.Dataset, metrics: Sequence[str]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Mean over networks, and half of its 95 % interval by Student's law; rows are (task, method)."""
    chosen = results["results"].sel({"metric": list(metrics)})
    count = chosen.notnull().sum("network")
    error = chosen.std("network", ddof=1) / np.sqrt(count)
    factor = xr.apply_ufunc(lambda n: student.ppf((1 + _LEVEL) / 2, np.maximum(n - 1, 1)), count)
    titles = [METHODS[str(name)] for name in results["method"].values]
    index = pd.MultiIndex.from_product([results["task"].values, titles], names=["task", "method"])

    def frame(values: xr.DataArray) -> pd.DataFrame:
        flat = values.transpose("task", "method", "metric").to_numpy().reshape(len(index), len(metrics))
        return pd.DataFrame(flat, index=index, columns=list(metrics))

    return frame(chosen.mean("network")), frame(factor * error)


def calibration_table(results: xr.Dataset) -> pd.DataFrame:
    """Of each method with draws, over all tasks: uniformity of ranks, error of expected coverage, and L-C2ST."""
    draws, rows = _draws(results), {}
    for name in results["method"].values:
        one = results["results"].sel({"method": name})
        of_truth = one.sel({"metric": list(RANKS)}).transpose("metric", ...).to_numpy().reshape(len(RANKS), -1)
        known = np.isfinite(of_truth).all(0)
        if known.any():
            # TARP counts draws nearer to a point than the truth is: a share of draws, as ranks are.
            credibility = one.sel({"metric": "credibility"}).to_numpy().ravel()[known]
            p = holm(uniformity(np.rint(of_truth[:, known] * draws).astype(int), draws)).min()
            rows[METHODS[str(name)]] = {
                "p": float(p),
                "tarp": coverage_error(credibility),
                "tarp_exact": coverage_error_of_exact(int(known.sum()), draws),
                "local": float(results["local_c2st_overall_p"].sel({"method": name})),
                "networks": int(known.sum()),
            }
    columns = ["p", "tarp", "tarp_exact", "local", "networks"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns).rename_axis("method")


def markdown_tables(results: xr.Dataset) -> str:
    """Means of the chief metrics with their 95 % intervals, a table for each task; then calibration."""
    mean, half = means(results, SHOWN)
    parts = []
    for task in map(str, results["task"].values):
        head = ["method", *(METRICS[name][0] for name in SHOWN)]
        lines = [task, "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        of_task, spread = (frame.xs(task, level="task") for frame in (mean, half))
        for method in of_task.index:
            cells = [_cell(of_task.at[method, name], spread.at[method, name], name) for name in SHOWN]
            lines.append(f"| {method} | {' | '.join(cells)} |")
        parts.append("\n".join(lines))
    table = calibration_table(results)
    head = ["method", "p", "TARP (95 % of exact ones)", "L-C2ST, p", "networks"]
    lines = ["Calibration over all tasks", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, row in table.iterrows():
        tarp, local = f"{row.tarp:.3f} ({row.tarp_exact:.3f})", f"{row.local:.2g}" if row.local == row.local else ""
        lines.append(f"| {name} | {row.p:.2g} | {tarp} | {local} | {row.networks:.0f} |")
    return "\n\n".join([*parts, "\n".join(lines)])


def write_inference_report(results: xr.Dataset, folder: Path) -> Path:
    """Write the page, and its figures beside it.

    Returns:
        Path of the page.
    """
    sections = []
    for title, metrics in GROUPS.items():
        mean, half = means(results, metrics)
        present = [name for name in metrics if mean[name].notna().any()]
        if not present:
            continue
        tables = []
        for task in map(str, results["task"].values):
            of_task, spread = (pd.DataFrame(frame.xs(task, level="task")[present]) for frame in (mean, half))
            of_task = of_task.dropna(how="all")
            spread = spread.reindex(of_task.index)
            tables.append(
                Table(
                    f"{title}, {task}: means over networks",
                    of_task,
                    senses={name: METRICS[name][1] for name in present},
                    titles={name: METRICS[name][0] for name in present},
                    low=of_task - spread,
                    high=of_task + spread,
                    interval="95 % interval of the mean over networks",
                    digits=3,
                )
            )
        pictures: tuple[Picture, ...] = (_errors(results),) if title == "Recovery" else ()
        sections.append(Section(title, (_ABOUT[title],), tuple(tables), pictures))
    calibration = calibration_table(results)
    if len(calibration):
        table = Table(
            "Calibration over all tasks together", calibration,
            titles={"p": "p of uniform ranks, after Holm", "tarp": "error of expected coverage (TARP)",
                    "tarp_exact": "95 % of exact posteriors stay below", "local": "p of L-C2ST"}, digits=2,
        )  # fmt: skip
        sections.append(Section("Calibration", (_ABOUT["Calibration"],), (table,)))
    count = results.sizes
    summary = f"Tasks: {count['task']}. Methods: {count['method']}. Networks of each task: {count['network']}."
    return write_page(folder, "Which wiring: methods beside each other", sections, {"results.nc": results.attrs},
                      summary=summary)  # fmt: skip


_ABOUT = {
    "Recovery": "Errors of a point estimate of W, for a posterior its mean. Guessing zero has the relative error 1.",
    "Posterior": "How well draws tell where W is. Coverage alone says little: the prior covers as announced, too; so "
    "read it beside contraction, the share of the prior's variance that is gone.",
    "Exact posterior": "Beside the posterior that is told ensemble and gain, where it is known. Of a method that is "
    "not told them, distance is what that costs. A divergence is to be read beside that of as many exact draws, and a "
    "classifier has only that many to learn from: it finds gross differences.",
    "Prediction": "A trial that no method has seen; whether residuals look like noise, by the largest of the scores of "
    "which infer warns beyond 5; the largest Lyapunov exponent and the fixed points of draws, or of the estimate of a "
    "method without draws.",
    "Cost": "Of one network, on the machine named below; training of the trained posterior is not counted, that of "
    "sbi's methods is.",
    "Calibration": "Of a calibrated posterior the truth is one more draw where networks are drawn from its prior. The "
    "gain of a task is one of many that methods allow, and they are not told it: over few tasks of one gain ranks "
    "cannot be uniform, and neurosde benchmark posterior is the test of that.",
}


def _errors(results: xr.Dataset) -> Picture:
    from matplotlib.figure import Figure  # here, since matplotlib is slow to import

    mean, half = means(results, ("relative_error",))
    tasks = [str(task) for task in results["task"].values]
    methods = [METHODS[str(name)] for name in results["method"].values]
    figure = Figure(figsize=(9, 1.2 + 0.32 * len(methods)), layout="constrained")
    axes = figure.subplots()
    for k, task in enumerate(tasks):
        values = mean["relative_error"].loc[task].reindex(methods)
        spread = half["relative_error"].loc[task].reindex(methods)
        height = np.arange(len(methods)) + 0.6 * (k / max(1, len(tasks) - 1) - 0.5)
        axes.errorbar(values, height, xerr=spread, fmt="o", markersize=4, label=task, color=f"C{k % 10}")
    axes.axvline(1, color="0.6", linewidth=1)
    axes.set(xscale="log", xlabel="relative error |Ŵ − W|/|W|", yticks=range(len(methods)), yticklabels=methods)
    axes.set_xticks([0.2, 0.5, 1, 2, 5], ["0.2", "0.5", "1", "2", "5"])
    axes.set_xticks([], minor=True)
    axes.invert_yaxis()
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1))
    finite = mean["relative_error"].dropna()
    known = [task for task in tasks if task in finite.index.get_level_values("task")]
    best = "; ".join(f"{task}: {finite.loc[task].idxmin()}, {finite.loc[task].min():.2f}" for task in known)
    return picture("errors", figure, "Relative errors with 95 % intervals, by method and task.",
                   f"Least error of each task: {best}.")  # fmt: skip


def _draws(results: xr.Dataset) -> int:
    return int(json.loads(results.attrs["config"])["draws"])


def _cell(mean: Any, half: Any, name: str) -> str:
    if not math.isfinite(mean):
        return ""
    digits = 3 if name != "seconds" else 2
    return f"{mean:.{digits}g}" if name == "seconds" or not math.isfinite(half) else f"{mean:.3f} ± {half:.3f}"
