"""Tables, figures and the page of `neurosde benchmark inference`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from scipy.stats import t as student

from neurosde.evaluation.calibration import coverage_error, coverage_error_of_exact, holm
from neurosde.evaluation.inference_averages import ALL, Averages, averages, by_ensemble
from neurosde.evaluation.inference_methods import METHODS
from neurosde.evaluation.inference_metrics import METRICS, RANKS
from neurosde.evaluation.measures import Measure, measures, values_of
from neurosde.evaluation.page import Fold, Section, write_page
from neurosde.evaluation.page_table import Table
from neurosde.evaluation.rank_calibration import uniformity

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
    """Write the page, and its figures beside it: a summary, then each group of measures, then each task, folded.

    Returns:
        Path of the page.
    """
    from neurosde.evaluation import inference_figures as figures  # here, since matplotlib is slow to import

    names = [str(name) for name in results["method"].values]
    titles = {name: METHODS[name] for name in names}
    known = {name: one for name, one in measures(results).items() if one.group != "Calibration"}
    groups: dict[str, list[Measure]] = {}
    for one in known.values():
        groups.setdefault(one.group, []).append(one)
    sets, axes = by_ensemble(results), figures.axes_of(results)
    found = {
        name: averages(values_of(results, name), sets, list(titles.values())) for name in known
    }  # of each measure, by ensemble
    chief = [_averaged(members[0], found[members[0].name]) for members in groups.values()]
    overview = (figures.errors(found["relative_error"]),) if "relative_error" in found else ()
    sections = [Section("Summary", _SUMMARY, tuple(chief), overview)]
    for group, members in groups.items():
        drawn = [
            figures.against_axes(results, one, list(titles.values()), axes)
            for one in members
            if axes and one.name in _DRAWN
        ]
        folds = [Fold(f"The numbers of this figure: {table.caption}", tables=(table,)) for _, table in drawn]
        folds += [Fold(_capital(one.title), tables=(_averaged(one, found[one.name]),)) for one in members[1:]]
        about = (_ABOUT[group],) if group in _ABOUT else ()
        sections.append(Section(group, about, (), tuple(shown for shown, _ in drawn), tuple(folds)))
    calibration = calibration_table(results)
    if len(calibration):
        table = Table(
            "Calibration over all tasks together", calibration,
            titles={"p": "p of uniform ranks, after Holm", "tarp": "error of expected coverage (TARP)",
                    "tarp_exact": "95 % of exact posteriors stay below", "local": "p of L-C2ST"}, digits=2,
        )  # fmt: skip
        curves = figures.calibration(results, titles)
        sections.append(Section("Calibration", (_ABOUT["Calibration"],), (table,), (curves,) if curves else ()))
    sections.append(Section("Task by task", (_TASKS,), folds=tuple(task_folds(results, list(known.values())))))
    count = results.sizes
    summary = f"Tasks: {count['task']}. Methods: {count['method']}. Networks of each task: {count['network']}."
    return write_page(folder, "Which wiring: methods beside each other", sections, {"results.nc": results.attrs},
                      summary=summary)  # fmt: skip


def task_folds(results: xr.Dataset, shown: Sequence[Measure]) -> list[Fold]:
    """A fold for each ensemble and in it one for each task, with a table for each group of measures."""
    titles = [METHODS[str(name)] for name in results["method"].values]
    names = [str(task) for task in results["task"].values]
    found = {
        one.name: averages(values_of(results, one.name), {name: [k] for k, name in enumerate(names)}, titles)
        for one in shown
    }
    sets = {name: chosen for name, chosen in by_ensemble(results).items() if name != ALL}
    folds = []
    for ensemble, chosen in sets.items():
        inner = []
        for name in (names[k] for k in chosen):
            tables = []
            for group in dict.fromkeys(one.group for one in shown):
                members = [one for one in shown if one.group == group and found[one.name].possible[name]]
                if members:
                    tables.append(_of_task(f"{group}, {name}", members, found, name))
            inner.append(Fold(name, _hint(found, name), tables=tuple(tables)))
        count = f"{len(chosen)} task{'s' if len(chosen) > 1 else ''}"
        folds.append(Fold(ensemble, count, folds=tuple(inner), open=len(names) <= _FEW))
    return folds


def _of_task(caption: str, members: Sequence[Measure], found: Mapping[str, Averages], task: str) -> Table:
    mean = pd.DataFrame({one.name: found[one.name].mean[task] for one in members}).dropna(how="all")
    half = pd.DataFrame({one.name: found[one.name].half[task] for one in members}).loc[mean.index]
    return Table(
        caption, mean, {one.name: one.sense for one in members}, {one.name: one.title for one in members},
        interval=_INTERVAL if half.notna().to_numpy().any() else "", digits=3,
        half=half if half.notna().to_numpy().any() else None, plain=True,
    )  # fmt: skip


def _hint(found: Mapping[str, Averages], task: str) -> str:
    """The best method of a task."""
    if "relative_error" not in found or not found["relative_error"].possible[task]:
        return ""
    mean = found["relative_error"].mean[task]
    return f"least relative error {mean.min():.2f}, {mean.index.to_list()[int(mean.argmin())]}"


def _averaged(measure: Measure, found: Averages) -> Table:
    """A measure by ensemble; means over fewer tasks than there are say so, and are not compared."""
    rows = found.mean.notna().any(axis=1)
    columns = [name for name, count in found.possible.items() if count]
    data, half = found.mean.loc[rows, columns], found.half.loc[rows, columns]
    complete = found.complete.loc[rows, columns]
    values, there = data.to_numpy(), found.tasks.loc[rows, columns].to_numpy()
    shown = data.astype(object)
    for method, name in zip(*np.nonzero(~complete.to_numpy() & data.notna().to_numpy()), strict=True):
        of = f"{there[method, name]}/{found.possible[columns[name]]}"
        shown.iat[method, name] = f"{values[method, name]:#.3g} ({of})"
    spread = half.where(complete)
    return Table(
        f"{_capital(measure.title)}: mean over tasks and networks", shown, {name: measure.sense for name in columns},
        interval=_INTERVAL if spread.notna().to_numpy().any() else "", digits=3,
        half=spread if spread.notna().to_numpy().any() else None,
    )  # fmt: skip


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


_FEW = 20  # tasks that are listed from the start
_DRAWN = ("relative_error", "energy_score", "seconds")
_INTERVAL = "half of the 95 % interval of the mean over networks"
_SUMMARY = (
    "One measure of each group, by ensemble, averaged over all tasks of it; further measures, each task by itself and "
    "how it was made follow. All methods see the same networks, so that differences between them are surer than the "
    "intervals of either.",
    "A mean over fewer tasks than others have, since the method diverged in the rest, is not compared with theirs; of "
    "how many tasks it is stands in brackets.",
)
_TASKS = (
    "Open an ensemble, then a task: all measures of it, means over its networks, after ± half of their 95 % interval. "
    "The best of a column, as the tables above say which values are better, is in bold, on a coloured ground; a dash "
    "stands where there is no value."
)
_ABOUT = {
    "Recovery": "Errors of a point estimate of W, for a posterior its mean. Guessing zero has the relative error 1.",
    "Posterior": "How well draws tell where W is. Coverage alone says little: the prior covers as announced, too; so "
    "read it beside contraction, the share of the prior's variance that is gone.",
    "Exact posterior": "Beside the posterior that is told ensemble and gain, where it is known. Of a method that is "
    "not told them, distance is what that costs. A divergence is to be read beside that of as many exact draws, and a "
    "classifier has only that many to learn from: it finds gross differences.",
    "Prediction": "A trial that no method has seen; whether residuals look like noise, by the largest of the scores of "
    "which infer warns beyond 5; activity that is simulated anew, the largest Lyapunov exponent and the fixed points "
    "of draws, or of the estimate of a method without draws. The likelihood is that of the mean of densities over "
    "draws: of few draws it is lower than of all, and should not be compared with that of an estimate.",
    "Cost": "Of one network, on the machine named below; training of the trained posterior is not counted, that of "
    "sbi's methods is.",
    "Calibration": "Of a calibrated posterior the truth is one more draw where networks are drawn from its prior. The "
    "gain of a task is one of many that methods allow, and they are not told it: over few tasks of one gain ranks "
    "cannot be uniform, and neurosde benchmark posterior is the test of that.",
}


def _draws(results: xr.Dataset) -> int:
    return int(json.loads(results.attrs["config"])["draws"])


def _cell(mean: Any, half: Any, name: str) -> str:
    if not math.isfinite(mean):
        return ""
    digits = 3 if name != "seconds" else 2
    return f"{mean:.{digits}g}" if name == "seconds" or not math.isfinite(half) else f"{mean:.3f} ± {half:.3f}"
