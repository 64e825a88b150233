"""`neurosde benchmark simulate`: how fast networks are simulated and differentiated, beside other libraries.

Each task is run by every method in turn, round after round, so that a drift of the machine hits all alike. The floor of
a task is what its matrix products alone would take at the peak that torch reaches on a large square product in the same
run: 2 N² operations per network, trial and step, three times that with the gradient. tanh and noise are not in it.
"""

from __future__ import annotations

import gc
import json
import math
import os
import platform
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from tqdm import tqdm

from neurosde.datasets.build_dataset import DatasetConfig, build_dataset
from neurosde.evaluation.simulation_peers import BACKWARD, FORWARD, METHODS, PASSES, Case, TorchLoop
from neurosde.julia.locate import dotted, find_julia
from neurosde.options import from_options
from neurosde.provenance import global_attributes, whole_file
from neurosde.validation import check_count, check_positive

DT, TAU, GAIN = 0.1, 1.0, 1.5
CHECKED = 20  # times at which paths are compared: chaos amplifies rounding later on
TOLERANCE = 1e-3
SLOW, LEAST = 2.0, 3  # a method that takes more seconds than SLOW is run LEAST times
QUICK = 0.02  # seconds that one measurement lasts at least, by repeating the call
TIE = 1.3  # machines are too noisy to tell smaller ratios
LIBRARIES = ("torch", "torchsde", "torchdiffeq", "jax", "jaxlib", "diffrax", "numba", "numpy")
BLUE, GREY, RED = "#0072B2", "#999999", "#D55E00"  # Okabe and Ito's colour-blind-safe palette

# task, pass, what is compared with neurosde julia, the ratio that is wanted
REACH = (
    ("B", FORWARD, "torch-loop", 6.0),
    ("B", FORWARD, "torchsde", 12.0),
    ("B-noise", FORWARD, "torch-loop", 8.0),
    ("D", BACKWARD, "torch-loop", 4.0),
    ("D", BACKWARD, "torchsde", 7.0),
    ("D", BACKWARD, "torchsde-adjoint", 25.0),
    ("C", FORWARD, "torch-loop", 1.5),
    ("C", BACKWARD, "torch-loop", 1.7),
    ("A", FORWARD, "torchsde", 50.0),
)
BUILD_WANTED = 2.0


@dataclass(frozen=True)
class Task:
    """M networks × K trials of N neurons at T times, each network with its own W."""

    networks: int
    trials: int
    N: int
    T: int
    noise_std: float = 0.0

    def scaled(self, scale: float) -> Task:
        """Return the task with fewer or more networks; of a single network, trials."""
        which = "networks" if self.networks > 1 else "trials"
        return replace(self, **{which: max(1, round(scale * getattr(self, which)))})

    def flops(self, which: str) -> int:
        """Floating-point operations of the matrix products of a pass."""
        products = 1 if which == FORWARD else 3  # W φ(h); and Wᵀ λ and λ φ(h)ᵀ
        return products * 2 * self.N**2 * self.networks * self.trials * (self.T - 1)

    def __str__(self) -> str:
        noise = f", σ = {self.noise_std:g}" if self.noise_std else ""
        return f"{self.networks} × {self.trials}, N = {self.N}, T = {self.T}{noise}"


TASKS = {
    "A": Task(1, 1, 50, 100),
    "B": Task(1000, 10, 50, 100),
    "B-noise": Task(1000, 10, 50, 100, noise_std=0.1),
    "C": Task(1, 64, 1000, 200),
    "D": Task(256, 8, 100, 200),
}


@dataclass(frozen=True)
class SimulationBenchmark:
    """What to run, how often, and where the data go."""

    tasks: tuple[str, ...] = field(default=tuple(TASKS), metadata={"help": "tasks"})
    methods: tuple[str, ...] = field(default=tuple(METHODS), metadata={"help": "methods"})
    repeats: int = field(default=7, metadata={"help": "measurements per task, pass and method"})
    budget: float = field(default=60.0, metadata={"help": "seconds per task and pass, beyond which repeats are cut"})
    threads: int | None = field(default=None, metadata={"help": "threads (default torch's); jax takes all cores"})
    scale: float = field(default=1.0, metadata={"help": "share of networks or trials, for a quick look"})
    dataset: bool = field(default=True, metadata={"help": "also time build-dataset against writing its bytes"})
    seed: int = field(default=0, metadata={"help": "seed"})
    out: Path = field(default=Path("results/simulate.nc"), metadata={"help": "data; the figure lies beside it"})

    def __post_init__(self) -> None:
        for given, known, name in ((self.tasks, TASKS, "tasks"), (self.methods, METHODS, "methods")):
            unknown = [item for item in given if item not in known]
            if unknown or not given:
                raise ValueError(f"{name} must be some of {', '.join(known)}; got {', '.join(unknown) or 'none'}.")
        check_count(self.repeats, "repeats")
        check_count(self.seed, "seed", 0)
        check_positive(self.budget, "budget")
        check_positive(self.scale, "scale")
        if self.threads is not None:
            check_count(self.threads, "threads")


def simulation_benchmark(config: SimulationBenchmark, save: Callable[[xr.Dataset], None] | None = None) -> xr.Dataset:
    """Run the benchmark.

    Args:
        config: what to run.
        save: called with the data after each task and pass, so that an interrupted run keeps what it has.

    Returns:
        results (task, pass, method, repeat) in seconds, NaN where there is none, floor (task, pass), peak, errors of
        paths and gradients against the torch loop (task, method), and build_dataset (what, repeat).
    """
    save = save or (lambda data: None)
    with _prepared(config.threads):
        data = _empty(config)
        left_out: dict[str, list[str]] = {}
        with tqdm(total=len(config.tasks) * len(PASSES) + config.dataset, unit="pass", disable=None) as progress:
            for name in config.tasks:
                _measure_peak(config, data)
                for which in _measure_task(config, name, data, left_out):
                    progress.set_postfix_str(f"{name} {which}")
                    progress.update()
                    _measure_peak(config, data)
                    data.attrs["left_out"] = json.dumps(left_out, ensure_ascii=False)
                    save(data)
            if config.dataset:
                _measure_build(config, data)
                progress.update()
                save(data)
    return data


def measured_peak(size: int, repeats: int = 5) -> float:
    """Return the best rate of a square float32 matrix product, in GFLOP/s."""
    a, b = torch.randn(2, size, size)
    out = torch.empty(size, size)
    seconds = [_timed(lambda: torch.mm(a, b, out=out), 1) for _ in range(repeats + 1)]
    return 2e-9 * size**3 / min(seconds[1:])


def _measure_peak(config: SimulationBenchmark, data: xr.Dataset) -> None:
    """Keep the best peak of the run, since others may use the machine too, and the floors that follow from it."""
    peak = max(float(data["peak"]), measured_peak(2048 if config.scale >= 1 else 512))
    data["peak"].values[...] = peak
    for name in config.tasks:
        for which in PASSES:
            data["floor"].loc[name, which] = TASKS[name].scaled(config.scale).flops(which) / (1e9 * peak)


def _measure_task(
    config: SimulationBenchmark, name: str, data: xr.Dataset, left_out: dict[str, list[str]]
) -> Iterator[str]:
    """Fill the task's results in; yields after each pass."""
    task = TASKS[name].scaled(config.scale)
    sizes = (task.networks, task.trials, task.N, task.T, task.noise_std)
    case = Case.draw(*sizes, dt=DT, tau=TAU, g=GAIN, seed=config.seed)
    loop = TorchLoop(case)
    expected = {FORWARD: loop.path(loop.forward())[:CHECKED].clone(), BACKWARD: loop.backward()[0].clone()}
    simulators = {}

    def skip(method: str, where: str, error: Exception | str) -> None:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        left_out.setdefault(f"{method}: {reason}", []).append(where)

    for method in config.methods:
        try:
            simulators[method] = METHODS[method][1](case)
        except Exception as error:  # a peer may fail in any way: it says how, and the others go on
            for which in PASSES:
                skip(method, f"{name} {which}", error)
    for which in PASSES:
        runs: dict[str, tuple[Callable[[], Any], float]] = {}
        for method, simulator in simulators.items():
            if which not in simulator.passes or (case.noise_std > 0 and not simulator.noise):
                continue
            call = simulator.forward if which == FORWARD else simulator.backward
            try:
                result = call()
                if which == FORWARD:
                    off = _path_error(case, simulator.path(result), expected[which])
                    data["path_error"].loc[name, method] = off
                elif case.noise_std == 0:
                    off = _relative(simulator.weights_gradient(result), expected[which])
                    data["gradient_error"].loc[name, method] = off
                del result
                seconds = _timed(call, 1)
            except Exception as error:
                skip(method, f"{name} {which}", error)
                continue
            if LEAST * seconds > config.budget:
                skip(method, f"{name} {which}", f"{LEAST} calls of {seconds:.1f} s are beyond the budget")
                continue
            runs[method] = (call, seconds)
        for method, taken in _rounds(runs, config).items():
            data["results"].loc[name, which, method][: len(taken)] = taken
        yield which


def _path_error(case: Case, path: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative error of the first times, or, with noise, of the standard deviation of the first step's noise.

    Raises:
        ValueError: the path is another one.
    """
    if case.noise_std == 0:
        error, allowed = _relative(path[:CHECKED], expected), TOLERANCE
    else:
        drift = torch.baddbmm(-case.h0, case.h0.tanh(), case.weights.mT) / case.tau
        noise = (path[1] - case.h0 - case.dt * drift) / math.sqrt(case.dt)
        error = abs(float(noise.std()) / case.noise_std - 1)
        allowed = 5 / math.sqrt(2 * noise.numel())  # standard errors of an estimated standard deviation
    if not error <= allowed:
        raise ValueError(f"its path is off by {error:.1e}, and only {allowed:.1e} is allowed.")
    return error


def _relative(value: torch.Tensor, expected: torch.Tensor) -> float:
    return float((value - expected).norm() / expected.norm())


def _rounds(runs: dict[str, tuple[Callable[[], Any], float]], config: SimulationBenchmark) -> dict[str, list[float]]:
    """Time all methods in turn, round after round; slow ones, and all once the budget is spent, LEAST times."""
    taken: dict[str, list[float]] = {method: [] for method in runs}
    start = time.perf_counter()
    for repeat in range(config.repeats):
        for method, (call, seconds) in runs.items():
            spent = time.perf_counter() - start > config.budget
            if repeat < LEAST or not (spent or seconds > SLOW):
                taken[method].append(_timed(call, min(1000, max(1, round(QUICK / seconds)))))
    return taken


def _timed(call: Callable[[], Any], calls: int) -> float:
    """Seconds per call; garbage is collected before, the last output freed after."""
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        for _ in range(calls - 1):
            call()
        kept = call()
        seconds = (time.perf_counter() - start) / calls
    finally:
        gc.enable()
    del kept
    return seconds


def _measure_build(config: SimulationBenchmark, data: xr.Dataset) -> None:
    """Time build_dataset, and writing the bytes of its cube as one file in the same folder."""
    task = TASKS["B"].scaled(config.scale)
    config.out.parent.mkdir(parents=True, exist_ok=True)
    for repeat in range(min(LEAST, config.repeats)):
        with tempfile.TemporaryDirectory(dir=config.out.parent) as folder:
            dataset = DatasetConfig(
                Path(folder, "dataset"), task.networks, task.N, task.trials, task.T, DT, TAU, seed=config.seed
            )
            data["build_dataset"].loc["build_dataset", repeat] = _timed(partial(build_dataset, dataset), 1)
            contents = dataset.path.read_bytes()

            data["build_dataset"].loc["raw write", repeat] = _timed(partial(_write, Path(folder, "raw"), contents), 1)


def _write(path: Path, contents: bytes) -> None:
    with open(path, "wb") as handle:
        handle.write(contents)
        handle.flush()
        os.fsync(handle.fileno())


def _empty(config: SimulationBenchmark) -> xr.Dataset:
    coords: dict[str, list[Any]] = {
        "task": list(config.tasks),
        "pass": list(PASSES),
        "method": list(config.methods),
        "repeat": list(range(config.repeats)),
        "what": ["build_dataset", "raw write"],
    }

    def missing(dims: tuple[str, ...], long_name: str, units: str) -> Any:
        return dims, np.full([len(coords[dim]) for dim in dims], np.nan), {"long_name": long_name, "units": units}

    data = xr.Dataset(
        {
            "results": missing(("task", "pass", "method", "repeat"), "time of one simulation", "s"),
            "floor": missing(("task", "pass"), "matrix products alone, at the measured peak", "s"),
            "peak": ((), 0.0, {"long_name": "best rate of a square float32 matrix product", "units": "GFLOP/s"}),
            "path_error": missing(("task", "method"), f"relative error of the first {CHECKED} times", "1"),
            "gradient_error": missing(("task", "method"), "relative error of the gradient of W, sigma = 0", "1"),
            "build_dataset": missing(("what", "repeat"), "time of a dataset of task B, and of its bytes", "s"),
        },
        coords=coords,
    )
    data["method_name"] = ("method", [METHODS[method][0] for method in config.methods])
    data["task_size"] = ("task", [str(TASKS[task].scaled(config.scale)) for task in config.tasks])
    summary = "Seconds per simulation (float32), every method in turn; floor: matrix products alone, no tanh, no noise."
    data.attrs = global_attributes("Speed of simulation", summary, config, config.seed) | machine()
    data.attrs["left_out"] = "{}"
    return data


@contextmanager
def _prepared(threads: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    gc.collect()
    gc.freeze()  # what is there already need not be gone through before every measurement
    try:
        yield
    finally:
        gc.unfreeze()
        torch.set_num_threads(before)


def machine() -> dict[str, Any]:
    """Processor, threads and versions."""
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    found: dict[str, Any] = {
        "cpu_model": f"{model} ({torch.backends.cpu.get_cpu_capability()})",
        "cpu_count": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else math.nan,  # before the run
        "python_version": platform.python_version(),
    }
    for library in LIBRARIES:
        try:
            found[f"{library}_version"] = metadata.version(library)
        except metadata.PackageNotFoundError:
            found[f"{library}_version"] = "not installed"
    try:
        found["julia_version"] = dotted(find_julia().version)
    except RuntimeError:
        found["julia_version"] = "not installed"
    return found


def _median(data: xr.Dataset, task: str, which: str, method: str) -> float:
    """Median time in seconds, NaN where there is none."""
    if task not in data["task"] or method not in data["method"]:
        return math.nan
    values = data["results"].sel({"task": task, "pass": which, "method": method}).to_numpy()
    return float(np.nanmedian(values)) if np.isfinite(values).any() else math.nan


def _duration(seconds: float) -> str:
    """Milliseconds or microseconds, or a dash."""
    if math.isnan(seconds):
        return "–"
    return f"{1e6 * seconds:.3g} µs" if seconds < 1e-3 else f"{_plain(1e3 * seconds)} ms"


def _plain(value: float) -> str:
    """Three digits, without an exponent."""
    return "–" if math.isnan(value) else f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def times_table(data: xr.Dataset) -> str:
    """Median times in ms with their quartiles, the floor, and how near to it the quickest comes, in markdown."""
    cells = [(str(task), str(which)) for task in data["task"].values for which in data["pass"].values]
    lines = ["| ms, median (quartiles) | " + " | ".join(f"{task} {which}" for task, which in cells) + " |"]
    lines.append("|---" * (len(cells) + 1) + "|")
    for method, name in zip(data["method"].values, data["method_name"].values, strict=True):
        row = []
        for task, which in cells:
            values = 1e3 * data["results"].sel({"task": task, "pass": which, "method": method}).to_numpy()
            values = values[np.isfinite(values)]
            low, middle, high = np.quantile(values, (0.25, 0.5, 0.75)) if len(values) else (math.nan,) * 3
            row.append(f"{_plain(middle)} ({_plain(low)}–{_plain(high)})" if len(values) else "–")
        lines.append(f"| {name} | " + " | ".join(row) + " |")
    floors = [float(data["floor"].sel({"task": task, "pass": which})) for task, which in cells]
    quickest = [_quickest(data, task, which)[1] for task, which in cells]
    lines.append("| floor (matrix products) | " + " | ".join(_plain(1e3 * floor) for floor in floors) + " |")
    ratios = [_plain(best / floor) for best, floor in zip(quickest, floors, strict=True)]
    lines.append("| quickest, × floor | " + " | ".join(ratios) + " |")
    return "\n".join(lines)


def reach_table(data: xr.Dataset) -> str:
    """How many times quicker the Julia engine is than others, against what is wanted, in markdown."""
    lines = ["| | others ÷ neurosde julia | wanted | neurosde julia | × floor | auto is the quickest engine |"]
    lines.append("|---" * 6 + "|")
    for task, which, method, wanted in REACH:
        if task not in data["task"]:
            continue
        ours = _median(data, task, which, "neurosde-julia")
        ratio, floor = (
            _median(data, task, which, method) / ours,
            float(data["floor"].sel({"task": task, "pass": which})),
        )
        lines.append(
            f"| {task} {which}: {METHODS[method][0]} | {_plain(ratio)} | {wanted:g} | {_duration(ours)} "
            f"| {_plain(ours / floor)} | {_auto(data, task, which)} |"
        )
    return "\n".join(lines)


def _quickest(data: xr.Dataset, task: str, which: str, methods: tuple[str, ...] = tuple(METHODS)) -> tuple[str, float]:
    medians = {method: _median(data, task, which, method) for method in methods}
    measured = {method: value for method, value in medians.items() if not math.isnan(value)}
    return min(measured.items(), key=lambda item: item[1]) if measured else ("", math.nan)


def _auto(data: xr.Dataset, task: str, which: str) -> str:
    auto = _median(data, task, which, "neurosde-auto")
    best, seconds = _quickest(data, task, which, ("neurosde-julia", "neurosde-torch"))
    if math.isnan(auto) or not best:
        return "–"
    return f"{'yes' if auto <= TIE * seconds else 'no'} ({METHODS[best][0]} × {auto / seconds:.2f})"


def report(data: xr.Dataset) -> str:
    """All that the command prints: both tables, the dataset, what was left out, the machine."""
    lines = [times_table(data), "", reach_table(data), ""]
    build, raw = data["build_dataset"].median("repeat").to_numpy()
    if np.isfinite(build):
        ratio = f"{build / raw:.2f}× (wanted: at most {BUILD_WANTED:g}×)"
        lines.append(f"build-dataset, task B: {build:.2f} s; its bytes as one fsynced file: {raw:.2f} s; {ratio}")
    if bool((data["results"].median("repeat") < data["floor"]).any()):
        lines.append("some are below the floor: the machine was too busy for its peak to be measured; run again")
    worst = zip(data["method_name"].values, data["gradient_error"].max("task").to_numpy(), strict=True)
    wrong = [f"{name} {value:.1%}" for name, value in worst if value > TOLERANCE]
    if wrong:
        lines.append("dL/dW off from back-propagation by up to: " + ", ".join(wrong))
    for reason, places in json.loads(data.attrs["left_out"]).items():
        everywhere = len(places) == data["task"].size * data["pass"].size
        lines.append(f"left out: {reason} [{'everywhere' if everywhere else ', '.join(places)}]")
    sizes = "; ".join(
        f"{name}: {size}" for name, size in zip(data["task"].values, data["task_size"].values, strict=True)
    )
    versions = ", ".join(f"{name} {data.attrs[f'{name}_version']}" for name in ("python", *LIBRARIES, "julia"))
    lines.append(f"networks × trials {sizes}; dt = {DT}, τ = {TAU:g}, g = {GAIN}")
    hardware = f"{data.attrs['cpu_model']}, {data.attrs['threads']} threads, peak {float(data['peak']):.0f} GFLOP/s"
    lines.append(f"{hardware}, load average {data.attrs['load_average']:.1f} before the run; {versions}")
    return "\n".join(lines)


def times_figure(data: xr.Dataset) -> Figure:
    """Draw the median times of each task and pass as bars on a log scale, with the floor as a line."""
    tasks = [str(task) for task in data["task"].values if sum(_measured(data, task, which) for which in PASSES)]
    heights = [max(_measured(data, task, which) for which in PASSES) + 1.6 for task in tasks]
    figure = Figure(figsize=(12, 0.26 * sum(heights) + 0.8), layout="constrained")
    axes = figure.subplots(len(tasks), len(PASSES), squeeze=False, height_ratios=heights)
    for row, task in enumerate(tasks):
        for axis, which in zip(axes[row], PASSES, strict=True):
            _draw_bars(axis, data, task, which)
    figure.supxlabel("time, ms; bars: medians, lines: quartiles", fontsize=10)
    return figure


def _measured(data: xr.Dataset, task: str, which: str) -> int:
    return sum(not math.isnan(_median(data, task, which, str(method))) for method in data["method"].values)


def _draw_bars(axis: Any, data: xr.Dataset, task: str, which: str) -> None:
    times = {str(m): _median(data, task, which, str(m)) for m in data["method"].values}
    order = sorted((m for m in times if not math.isnan(times[m])), key=lambda m: times[m])
    floor = 1e3 * float(data["floor"].sel({"task": task, "pass": which}))
    size = str(data["task_size"].sel(task=task).values)
    axis.set_title(f"{task} ({size}), {which}", fontsize=10, loc="left")
    if order:
        values = 1e3 * data["results"].sel({"task": task, "pass": which, "method": order}).to_numpy()
        low, middle, high = np.nanquantile(values, (0.25, 0.5, 0.75), axis=1)
        colours = [BLUE if m.startswith("neurosde") else GREY for m in order]
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
    axis.set_yticks(range(len(order)), [METHODS[m][0] for m in order], fontsize=9)
    for label, method in zip(axis.get_yticklabels(), order, strict=True):
        if method.startswith("neurosde"):
            label.set(color=BLUE, fontweight="bold")
    axis.spines[["top", "right"]].set_visible(False)


def run(options: Namespace) -> int:
    """Run the benchmark, print its tables, write its data and its figure."""
    config = from_options(SimulationBenchmark, options)
    measured: list[xr.Dataset] = []

    def save(data: xr.Dataset) -> None:
        with whole_file(config.out) as temporary:
            data.to_netcdf(temporary, engine="netcdf4")
        measured[:] = [data]

    status = 0
    try:
        simulation_benchmark(config, save)
    except KeyboardInterrupt:
        if not measured:
            raise
        print("interrupted: this is what was measured until then\n")
        status = 130
    print(report(measured[0]))
    picture = config.out.with_suffix(".png")
    with whole_file(picture) as temporary:
        times_figure(measured[0]).savefig(temporary, dpi=150, format="png")
    print(f"Data: {config.out}, figure: {picture}")
    return status
