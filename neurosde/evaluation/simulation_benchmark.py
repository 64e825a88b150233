"""`neurosde benchmark simulate`: how fast networks are simulated and differentiated, beside other libraries.

Each task is run by every method in turn, round after round, so that a drift of the machine hits all alike. The floor of
a task is what its matrix products alone would take at the peak that torch reaches on a large square product in the same
run: 2 N² operations per network, trial and step, three times that with the gradient. tanh and noise are not in it.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from tqdm import tqdm

from neurosde.datasets.build_dataset import DatasetConfig, build_dataset
from neurosde.engines import EngineName
from neurosde.evaluation.simulation_peers import FORWARD, PASSES, Case, Method, TorchLoop
from neurosde.evaluation.simulation_report import report, times_figure
from neurosde.evaluation.simulation_tasks import DT, METHODS, TAU, SimulationBenchmark
from neurosde.evaluation.timing import machine, measured_peak, seconds_per_call, torch_threads
from neurosde.julia.locate import julia_available
from neurosde.options import from_options
from neurosde.provenance import global_attributes, whole_file

CHECKED = 20  # times at which paths are compared: chaos amplifies rounding later on
TOLERANCE = 1e-3  # relative error of those times
SLOW, LEAST = 2.0, 3  # a method that takes more seconds than SLOW is run LEAST times
QUICK = 0.02  # seconds that one measurement lasts at least, by repeating the call
BUILDS = 5  # datasets built, since the speed of disks varies

Runs = dict[str, tuple[Callable[[], Any], float]]  # method → call, its seconds


def simulation_benchmark(config: SimulationBenchmark) -> Iterator[xr.Dataset]:
    """Run the benchmark; yields the data, as far as they go, after each task and pass and after the datasets.

    They are results (task, pass, method, repeat) in seconds, NaN where there is none, floor (task, pass), peak, errors
    of paths and gradients against the torch loop (task, method), and build_dataset (what, repeat).
    """
    with torch_threads(config.threads):
        data = _empty(config)
        left_out: dict[str, list[str]] = {}
        total = len(config.cells()) + config.dataset
        with tqdm(total=total, unit="pass", disable=None) as progress:
            for name in config.tasks:
                _measure_peak(config, data)
                for which in _measure_task(config, name, data, left_out):
                    progress.set_postfix_str(f"{name} {which}")
                    progress.update()
                    _measure_peak(config, data)
                    data.attrs["left_out"] = json.dumps(left_out, ensure_ascii=False)
                    yield data
            if config.dataset:
                _measure_build(config, data)
                progress.update()
                yield data


def _measure_peak(config: SimulationBenchmark, data: xr.Dataset) -> None:
    """Keep the best peak of the run, since others may use the machine too, and the floors that follow from it."""
    peak = max(float(data["peak"]), measured_peak(2048 if config.scale >= 1 else 512))
    data["peak"].values[...] = peak
    for name, which in config.cells():
        data["floor"].loc[name, which] = config.task(name).flops(which) / (1e9 * peak)


def _measure_task(
    config: SimulationBenchmark, name: str, data: xr.Dataset, left_out: dict[str, list[str]]
) -> Iterator[str]:
    """Fill the task's results in; yields after each pass."""
    case = config.task(name).case(config.seed)
    passes = [which for task, which in config.cells() if task == name]
    simulators: dict[str, Method] = {}

    def leave_out(method: str, where: list[str], error: Exception | str) -> None:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        left_out.setdefault(f"{method}: {reason}", []).extend(f"{name} {which}" for which in where)

    for method in config.methods:
        try:
            simulators[method] = METHODS[method][1](case)
        except Exception as error:  # a peer may fail in any way: it says how, and the others go on
            leave_out(method, passes, error)
    loop = TorchLoop(case)
    for which in passes:
        expected = loop.path(loop.forward()) if which == FORWARD else loop.backward()[0]
        variable = "path_error" if which == FORWARD else "gradient_error"
        runs: Runs = {}
        for method, simulator in simulators.items():
            if which not in simulator.passes or (case.noise_std > 0 and not simulator.noise):
                continue
            call = simulator.forward if which == FORWARD else simulator.backward
            try:
                data[variable].loc[name, method] = _error(simulator, which, call(), expected)
                seconds = seconds_per_call(call)  # now that it is compiled
                if LEAST * seconds > config.budget:
                    raise ValueError(f"{LEAST} calls of {seconds:.1f} s are beyond the budget")
            except Exception as error:
                leave_out(method, [which], error)
            else:
                runs[method] = (call, seconds)
        for method, taken in _rounds(runs, config).items():
            data["results"].loc[name, which, method][: len(taken)] = taken
        yield which


def _error(simulator: Method, which: str, result: Any, expected: torch.Tensor) -> float:
    """Relative error of the first times of a path, or of the gradient of W; NaN for a gradient with noise.

    Of a noisy path it is the error of the standard deviation of the first step's noise.

    Raises:
        ValueError: the path is another one. Continuous adjoints give another gradient, which the report says.
    """
    case = simulator.case
    if which != FORWARD:
        return _relative(simulator.weights_gradient(result), expected) if case.noise_std == 0 else math.nan
    path = simulator.path(result)
    if case.noise_std == 0:
        error, allowed = _relative(path[:CHECKED], expected[:CHECKED]), TOLERANCE
    else:
        noise = _first_noise(case, path)
        error = abs(float(noise.std()) / case.noise_std - 1)
        allowed = 5 / math.sqrt(2 * noise.numel())  # standard errors of an estimated standard deviation
    if not error <= allowed:
        raise ValueError(f"its path is off by {error:.1e}, and only {allowed:.1e} is allowed.")
    return error


def _relative(value: torch.Tensor, expected: torch.Tensor) -> float:
    return float((value - expected).norm() / expected.norm())


def _first_noise(case: Case, path: torch.Tensor) -> torch.Tensor:
    """σ ξ[0], from the first two times of a path."""
    drift = torch.baddbmm(-case.h0, case.h0.tanh(), case.weights.mT) / case.tau
    return (path[1] - case.h0 - case.dt * drift) / math.sqrt(case.dt)


def _rounds(runs: Runs, config: SimulationBenchmark) -> dict[str, list[float]]:
    """Time all methods in turn, round after round; slow ones, and all once the budget is spent, LEAST times."""
    taken: dict[str, list[float]] = {method: [] for method in runs}
    start = time.perf_counter()
    for repeat in range(config.repeats):
        for method, (call, seconds) in runs.items():
            spent = time.perf_counter() - start > config.budget
            if repeat < LEAST or not (spent or seconds > SLOW):
                taken[method].append(seconds_per_call(call, min(1000, max(1, round(QUICK / seconds)))))
    return taken


def _measure_build(config: SimulationBenchmark, data: xr.Dataset) -> None:
    """Time build_dataset, and writing the bytes of its cube as one file in the same folder, in turn."""
    task = config.task("B")
    engine: EngineName = "julia" if julia_available() else "torch"  # warm by now, as in the rest of the table
    config.out.parent.mkdir(parents=True, exist_ok=True)
    for repeat in range(data.sizes["build"]):
        with tempfile.TemporaryDirectory(dir=config.out.parent) as folder:
            dataset = DatasetConfig(
                Path(folder, "dataset"),
                task.networks,
                task.N,
                task.trials,
                task.T,
                DT,
                TAU,
                seed=config.seed,
                engine=engine,
            )
            data["build_dataset"].loc["build_dataset", repeat] = seconds_per_call(partial(build_dataset, dataset))
            contents = dataset.path.read_bytes()
            write = partial(_write, Path(folder, "raw"), contents)
            data["build_dataset"].loc["raw write", repeat] = seconds_per_call(write)


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
        "build": list(range(min(BUILDS, config.repeats))),
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
            "build_dataset": missing(("what", "build"), "time of a dataset of task B, and of its bytes", "s"),
        },
        coords=coords,
    )
    data["method_name"] = ("method", [METHODS[method][0] for method in config.methods])
    data["task_size"] = ("task", [str(config.task(name)) for name in config.tasks])
    summary = "Seconds per simulation (float32), every method in turn; floor: matrix products alone, no tanh, no noise."
    data.attrs = global_attributes("Speed of simulation", summary, config, config.seed) | machine()
    data.attrs["left_out"] = "{}"
    return data


def run(options: Namespace) -> int:
    """Run the benchmark, print its tables, write its data and its figure."""
    config = from_options(SimulationBenchmark, options)
    data, status = None, 0
    try:
        for data in simulation_benchmark(config):
            with whole_file(config.out) as temporary:
                data.to_netcdf(temporary, engine="netcdf4")
    except KeyboardInterrupt:
        if data is None:
            raise
        print("interrupted: this is what was measured until then\n")
        status = 130
    assert data is not None  # there is at least one task
    print(report(data))
    picture = config.out.with_suffix(".png")
    with whole_file(picture) as temporary:
        times_figure(data).savefig(temporary, dpi=150, format="png")
    print(f"Data: {config.out}, figure: {picture}")
    return status
