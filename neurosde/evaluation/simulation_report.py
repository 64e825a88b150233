"""What `neurosde benchmark simulate` says: a table of times, a table of goals, a figure, and what it all ran on."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from neurosde.evaluation.figures import BLUE, GREY, RED
from neurosde.evaluation.simulation_peers import BACKWARD, FORWARD
from neurosde.evaluation.simulation_tasks import DT, GAIN, METHODS, TAU
from neurosde.evaluation.timing import hardware

BEST_TORCH = ("torch-loop", "torch-compile", "neurosde-torch")  # the best form of torch is the quickest of these

# task, pass, methods of which the quickest is compared with neurosde julia, how many times longer it is to take
QUICKER = (
    ("B", FORWARD, BEST_TORCH, 6.0),
    ("B", FORWARD, ("torchsde",), 12.0),
    ("B-noise", FORWARD, ("torch-loop",), 8.0),
    ("D", BACKWARD, ("torch-loop",), 4.0),
    ("D", BACKWARD, ("torchsde",), 7.0),
    ("D", BACKWARD, ("torchsde-adjoint",), 25.0),
    ("C", FORWARD, BEST_TORCH, 1.5),
    ("C", BACKWARD, BEST_TORCH, 1.7),
    ("A", FORWARD, ("torchsde",), 50.0),
)
# task, pass, how many times longer than the floor neurosde julia is to take at most
NEAR_FLOOR = (
    ("B", FORWARD, 1.6),
    ("B-noise", FORWARD, 1.6),
    ("D", BACKWARD, 1.6),
    ("C", FORWARD, 1.15),
    ("C", BACKWARD, 1.15),
)
SECONDS_A = 60e-6  # neurosde julia's time of task A, forward
BUILD = 2.0  # build-dataset's time over that of writing as many bytes
TIE = 1.3  # machines are too noisy to tell smaller ratios
WRONG = 1e-3  # relative error of a gradient that is worth saying


def report(data: xr.Dataset) -> str:
    """All that the command prints: both tables, what was left out, the machine."""
    lines = [times_table(data), "", goals_table(data), ""]
    build, raw = data["build_dataset"].median("build").to_numpy()
    if np.isfinite(build):
        lines.append(f"build-dataset, task B: {build:.2f} s; its bytes as one fsynced file: {raw:.2f} s")
    if bool((data["results"].median("repeat") < data["floor"]).any()):
        lines.append("some are below the floor: the machine was too busy for its peak to be measured; run again")
    worst = zip(data["method_name"].values, data["gradient_error"].max("task").to_numpy(), strict=True)
    wrong = [f"{name} {value:.1%}" for name, value in worst if value > WRONG]
    if wrong:
        lines.append("dL/dW off from back-propagation by up to: " + ", ".join(wrong))
    cells = _cells(data)
    for reason, places in json.loads(data.attrs["left_out"]).items():
        lines.append(f"left out: {reason} [{'everywhere' if len(places) == len(cells) else ', '.join(places)}]")
    sizes = zip(data["task"].values, data["task_size"].values, strict=True)
    lines.append(f"networks × trials {'; '.join(f'{name}: {size}' for name, size in sizes)}")
    peak = f"peak {float(data['peak']):.0f} GFLOP/s, load average {data.attrs['load_average']:.1f} before the run"
    lines.append(f"dt = {DT}, τ = {TAU:g}, g = {GAIN}; {peak}")
    lines.append(hardware(data.attrs))
    return "\n".join(lines)


def times_table(data: xr.Dataset) -> str:
    """Median times in ms with their quartiles, the floor, and how near to it the quickest comes, in markdown."""
    cells = _cells(data)
    lines = ["| ms, median (quartiles) | " + " | ".join(f"{task} {which}" for task, which in cells) + " |"]
    lines.append("|---" * (len(cells) + 1) + "|")
    for method, name in zip(data["method"].values, data["method_name"].values, strict=True):
        row = []
        for task, which in cells:
            values = _milliseconds(data, task, which, method)
            low, middle, high = np.quantile(values, (0.25, 0.5, 0.75)) if len(values) else (math.nan,) * 3
            row.append(f"{_plain(middle)} ({_plain(low)}–{_plain(high)})" if len(values) else "–")
        lines.append(f"| {name} | " + " | ".join(row) + " |")
    floors = [1e3 * float(data["floor"].sel({"task": task, "pass": which})) for task, which in cells]
    quickest = [_quickest(data, task, which, data["method"].values)[1] for task, which in cells]
    lines.append("| floor (matrix products) | " + " | ".join(_plain(floor) for floor in floors) + " |")
    ratios = [_plain(best / floor) for best, floor in zip(quickest, floors, strict=True)]
    lines.append("| quickest, × floor | " + " | ".join(ratios) + " |")
    return "\n".join(lines)


def goals_table(data: xr.Dataset) -> str:
    """What is wanted of the Julia engine, of engine="auto" and of build-dataset, beside what was found, in markdown."""
    lines = ["| | found | wanted | |", "|---" * 4 + "|"]

    def add(what: str, found: float, bound: str, wanted: float, unit: str = "") -> None:
        met = "–" if math.isnan(found) else "yes" if (found >= wanted if bound == "≥" else found <= wanted) else "no"
        lines.append(f"| {what} | {_plain(found)}{unit} | {bound} {wanted:g}{unit} | {met} |")

    for task, which, methods, wanted in QUICKER:
        if (task, which) in _cells(data):
            method, other = _quickest(data, task, which, methods)
            name = METHODS[method][0] + (" (best torch form)" if len(methods) > 1 else "")
            ours = _quickest(data, task, which, ("neurosde-julia",))[1]
            add(f"{task} {which}: {name} ÷ neurosde julia", other / ours, "≥", wanted)
    for task, which, wanted in NEAR_FLOOR:
        if (task, which) in _cells(data):
            floor = 1e3 * float(data["floor"].sel({"task": task, "pass": which}))
            ours = _quickest(data, task, which, ("neurosde-julia",))[1]
            add(f"{task} {which}: neurosde julia ÷ floor (stretch)", ours / floor, "≤", wanted)
    if ("A", FORWARD) in _cells(data):
        ours = _quickest(data, "A", FORWARD, ("neurosde-julia",))[1]
        add(f"A {FORWARD}: neurosde julia (stretch)", 1e3 * ours, "≤", 1e6 * SECONDS_A, " µs")
    for task, which in _cells(data):
        method, best = _quickest(data, task, which, ("neurosde-julia", "neurosde-torch"))
        auto = _quickest(data, task, which, ("neurosde-auto",))[1]
        add(f"{task} {which}: neurosde auto ÷ {METHODS[method][0]} (quicker engine)", auto / best, "≤", TIE)
    build, raw = data["build_dataset"].median("build").to_numpy()
    add("build-dataset ÷ writing its bytes", build / raw, "≤", BUILD)
    return "\n".join(lines)


def times_figure(data: xr.Dataset) -> Figure:
    """Draw the median times of each task and pass as bars on a log scale, with the floor as a line."""
    cells = _cells(data)
    columns = min(2, len(cells))
    rows = math.ceil(len(cells) / columns)
    methods = max(len(_measured(data, task, which)) for task, which in cells)
    figure = Figure(figsize=(12, rows * (0.26 * methods + 0.5) + 0.8), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, (task, which) in zip(axes, cells, strict=False):
        _draw_bars(axis, data, task, which)
    for axis in axes[len(cells) :]:
        axis.remove()
    figure.supxlabel("time, ms; bars: medians, lines: quartiles", fontsize=10)
    return figure


def _draw_bars(axis: Axes, data: xr.Dataset, task: str, which: str) -> None:
    times = _measured(data, task, which)
    order = sorted(times, key=lambda method: times[method])
    floor = 1e3 * float(data["floor"].sel({"task": task, "pass": which}))
    axis.set_title(f"{task} ({data['task_size'].sel(task=task).item()}), {which}", fontsize=10, loc="left")
    if order:
        quantiles = [np.quantile(_milliseconds(data, task, which, method), (0.25, 0.5, 0.75)) for method in order]
        low, middle, high = np.transpose(quantiles)
        colours = [BLUE if method.startswith("neurosde") else GREY for method in order]
        axis.barh(range(len(order)), middle, color=colours, xerr=(middle - low, high - middle), height=0.75)
        for row, value in enumerate(middle):
            axis.text(1.1 * high[row], row, _plain(value), fontsize=8, va="center")
        axis.set(ylim=(len(order) - 0.4, -0.6), xlim=(min(floor, middle.min()) / 2, high.max() * 2))
    axis.axvline(floor, color=RED, linewidth=1.5)
    patch = {"facecolor": "white", "edgecolor": "none", "pad": 1}
    place: dict[str, Any] = {"xytext": (4, 2), "textcoords": "offset points", "xycoords": ("data", "axes fraction")}
    axis.annotate("floor", (floor, 0), color=RED, fontsize=8, va="bottom", bbox=patch, **place)
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_yticks(range(len(order)), [METHODS[method][0] for method in order], fontsize=9)
    for label, method in zip(axis.get_yticklabels(), order, strict=True):
        if method.startswith("neurosde"):
            label.set(color=BLUE, fontweight="bold")
    axis.spines[["top", "right"]].set_visible(False)


def _cells(data: xr.Dataset) -> list[tuple[str, str]]:
    """Tasks and passes that were to be run."""
    run = data["floor"].notnull()
    return [(t, p) for t in data["task"].values for p in data["pass"].values if run.sel({"task": t, "pass": p})]


def _milliseconds(data: xr.Dataset, task: str, which: str, method: str) -> np.ndarray:
    """All measurements there are."""
    if method not in data["method"]:
        return np.empty(0)
    values = 1e3 * data["results"].sel({"task": task, "pass": which, "method": method}).to_numpy()
    return values[np.isfinite(values)]


def _measured(data: xr.Dataset, task: str, which: str, methods: Iterable[str] = tuple(METHODS)) -> dict[str, float]:
    """Median time in ms of each method that was measured."""
    values = {str(method): _milliseconds(data, task, which, method) for method in methods}
    return {method: float(np.median(found)) for method, found in values.items() if len(found)}


def _quickest(data: xr.Dataset, task: str, which: str, methods: Iterable[str]) -> tuple[str, float]:
    """The quickest method and its median time in ms; the first one and NaN if none was measured."""
    found = _measured(data, task, which, methods)
    return min(found.items(), key=lambda item: item[1]) if found else (next(iter(methods)), math.nan)


def _plain(value: float) -> str:
    """Three digits, without an exponent."""
    return "–" if math.isnan(value) else f"{value:.0f}" if value >= 100 else f"{value:.3g}"
