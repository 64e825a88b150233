"""`neurosde benchmark engines`: the constants with which `engine="auto"` chooses between torch and Julia.

Both engines are timed on a grid of shapes, round after round; the quickest call of all rounds counts, since what else
runs on the machine only adds to it. The cost model of `neurosde.julia.choice` is linear in its constants, which
are none of them negative; they are found by non-negative least squares on relative errors,

    min over c ≥ 0 of Σ over measurements i of (A[i] · c / t[i] − 1)²,

A[i, j] being the time that the model predicts for i when constant j is 1 and the others are 0.
"""

from __future__ import annotations

import math
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from scipy.optimize import nnls
from tqdm import tqdm

from neurosde.engines import Work
from neurosde.evaluation.simulation_peers import NeurosdeJulia, NeurosdeTorch
from neurosde.evaluation.simulation_tasks import Task
from neurosde.evaluation.timing import hardware, machine, torch_threads
from neurosde.julia import choice
from neurosde.julia.choice import Costs
from neurosde.julia.locate import find_julia
from neurosde.julia.worker import get_worker
from neurosde.options import from_options
from neurosde.provenance import global_attributes, whole_file
from neurosde.validation import check_count

ENGINES = {"torch": NeurosdeTorch, "julia": NeurosdeJulia}
LARGEST = 5e6  # numbers of a path; more is left out of the grid, since it says nothing new
LONGEST = 1e10  # operations of a forward pass
STARTS = 3  # workers started
WINDOW = 0.02  # seconds for which a call is repeated in each round
NOISE_STD = 0.1


@dataclass(frozen=True)
class EngineCalibration:
    """What is measured: the grid is the product of sizes, batches, times, noise or none, gradient or none."""

    sizes: tuple[int, ...] = field(default=(10, 50, 200, 1000), metadata={"help": "numbers of neurons"})
    networks: tuple[int, ...] = field(default=(1, 30, 1000), metadata={"help": "networks, each with its own W"})
    trials: tuple[int, ...] = field(default=(1, 20, 400), metadata={"help": "trials per network"})
    lengths: tuple[int, ...] = field(default=(11, 101, 1001), metadata={"help": "times"})
    repeats: int = field(default=5, metadata={"help": "rounds, of which the quickest counts"})
    threads: int | None = field(default=None, metadata={"help": "threads (default torch's)"})
    seed: int = field(default=0, metadata={"help": "seed"})
    out: Path = field(default=Path("results/engines.nc"), metadata={"help": "data"})

    def __post_init__(self) -> None:
        for name, least in (("sizes", 1), ("networks", 1), ("trials", 1), ("lengths", 2)):
            for value in getattr(self, name):
                check_count(value, name, least)
        check_count(self.repeats, "repeats")
        check_count(self.seed, "seed", 0)
        if self.threads is not None:
            check_count(self.threads, "threads")

    def tasks(self) -> list[Task]:
        """The shapes of the grid that are not too large."""
        shapes = product(self.networks, self.trials, self.sizes, self.lengths, (0.0, NOISE_STD))
        return [task for task in (Task(*shape) for shape in shapes) if _fits(task)]


def _fits(task: Task) -> bool:
    numbers = task.networks * task.trials * task.N * task.T
    return numbers <= LARGEST and 2 * task.N * numbers <= LONGEST and task.networks * task.N**2 <= LARGEST


def engine_times(config: EngineCalibration) -> xr.Dataset:
    """Time both engines on the grid, and how long a fresh worker takes to its first gradient.

    Returns:
        seconds (engine, work, repeat), of the quickest call of each round; what the work is (work); start (worker).

    Raises:
        JuliaNotFoundError: there is no Julia.
    """
    find_julia()
    tasks = config.tasks()
    if not tasks:
        raise ValueError("every shape of the grid is too large; give smaller sizes, networks, trials or lengths.")
    seconds = np.empty((len(ENGINES), 2 * len(tasks), config.repeats))
    with torch_threads(config.threads), tqdm(total=config.repeats * len(tasks), unit="shape", disable=None) as progress:
        start = [_start_seconds(config.seed) for _ in range(min(STARTS, config.repeats))]
        for repeat in range(config.repeats):
            for i, task in enumerate(tasks):
                case = task.case(config.seed)
                for k, engine in enumerate(ENGINES.values()):
                    simulator = engine(case)
                    for gradient, call in enumerate((simulator.forward, simulator.backward)):
                        seconds[k, 2 * i + gradient, repeat] = _least_seconds(call)
                progress.update()
        found = machine()
    shape = [(t.networks, t.trials, t.N, t.T - 1, t.noise_std > 0, g) for t in tasks for g in (False, True)]
    names = ("networks", "trials", "neurons", "steps", "noisy", "gradient")
    data = xr.Dataset(
        {
            "seconds": (
                ("engine", "work", "repeat"),
                seconds,
                {"long_name": "quickest simulation of a round", "units": "s"},
            ),
            "start": ("worker", start, {"long_name": "a fresh worker's first simulation and gradient", "units": "s"}),
        }
        | {name: ("work", list(values)) for name, values in zip(names, zip(*shape, strict=True), strict=True)},
        coords={"engine": list(ENGINES)},
    )
    summary = f"Both engines, float32, noise or none, gradient or none. {hardware(found)}"
    data.attrs = global_attributes("Cost of simulation by engine", summary, config, config.seed) | found
    return data


def _least_seconds(call: Callable[[], Any]) -> float:
    """Time of the quickest of the calls that fit into WINDOW seconds, after one that warms up."""
    call()
    least, end = math.inf, time.perf_counter() + WINDOW
    while least == math.inf or time.perf_counter() < end:
        began = time.perf_counter()
        call()
        least = min(least, time.perf_counter() - began)
    return least


def _start_seconds(seed: int) -> float:
    """Seconds from no worker to a small simulation and its gradient, compiled on the way."""
    worker = get_worker()
    with worker.lock:
        worker.stop()
    simulator = NeurosdeJulia(Task(3, 5, 50, 11, NOISE_STD).case(seed))
    began = time.perf_counter()
    simulator.forward()
    simulator.backward()
    return time.perf_counter() - began


def work_of(data: xr.Dataset) -> list[Work]:
    """What was measured, as `engine="auto"` sees it."""
    return [
        Work(
            int(w.networks), int(w.networks * w.trials), int(w.neurons), int(w.steps), bool(w.noisy), bool(w.gradient),
            False, "tanh", torch.float32, torch.device("cpu"),
        )
        for w in (data.isel(work=k) for k in range(data.sizes["work"]))
    ]  # fmt: skip


def fitted_costs(works: list[Work], seconds: np.ndarray) -> Costs:
    """Fit the cost model to measured times.

    Args:
        works: what was done.
        seconds: time of each, shape (work,).
    """
    units = [_costs(unit) for unit in np.eye(2 * len(fields(Costs)))]
    predicted = np.array([[unit.seconds(work) for unit in units] for work in works])
    relative = predicted / seconds[:, None]
    scale = np.linalg.norm(relative, axis=0)
    scale[scale == 0] = 1  # what the grid has not got costs nothing
    return _costs(nnls(relative / scale, np.ones(len(works)))[0] / scale)


def _costs(constants: np.ndarray) -> Costs:
    return Costs(*((float(one), float(other)) for one, other in constants.reshape(-1, 2)))


def judged(works: list[Work], seconds: np.ndarray, models: Sequence[Costs]) -> tuple[float, float]:
    """How often a model picks the quicker engine, and how many times longer its worst choice takes.

    Args:
        works: what was done.
        seconds: times of torch and of Julia, shape (2, work).
        models: the costs of torch and of Julia.
    """
    predicted = np.array([[costs.seconds(work) for work in works] for costs in models])
    chosen = predicted.argmin(0)
    regret = seconds[chosen, np.arange(len(works))] / seconds.min(0)
    return float((regret == 1).mean()), float(regret.max())


def report(data: xr.Dataset) -> str:
    """The constants as they stand in choice.py, the start, and how good the choices are."""
    works, seconds = work_of(data), data["seconds"].min("repeat").to_numpy()
    found = [fitted_costs(works, times) for times in seconds]
    lines = [f"{name.upper()} = {_written(costs)}" for name, costs in zip(ENGINES, found, strict=True)]
    lines.append(f"START = {float(data['start'].min()):.2g}")
    for name, costs, times in zip(ENGINES, found, seconds, strict=True):
        off = np.abs(np.log([costs.seconds(work) / t for work, t in zip(works, times, strict=True)]))
        lines.append(f"{name}: predictions are off by a factor of {np.exp(np.median(off)):.2f} (median), "
                     f"{np.exp(np.quantile(off, 0.95)):.2f} (19 in 20 at most)")  # fmt: skip
    for whose, models in (("these", found), ("choice.py's", (choice.TORCH, choice.JULIA))):
        share, worst = judged(works, seconds, models)
        lines.append(
            f"with {whose} constants a warm auto picks the quicker engine in {share:.1%} of {len(works)} cases; "
            f"the worst choice takes {worst:.2f} times as long"
        )
    lines.append(f"{hardware(data.attrs)}, load average {data.attrs['load_average']:.1f}")
    return "\n".join(lines)


def _written(costs: Costs) -> str:
    pairs: list[Any] = [getattr(costs, item.name) for item in fields(costs)]
    return "Costs(" + ", ".join(f"({one:.2g}, {other:.2g})" for one, other in pairs) + ")"


def run(options: Namespace) -> int:
    """Measure, write the data, print the constants."""
    config = from_options(EngineCalibration, options)
    data = engine_times(config)
    with whole_file(config.out) as temporary:
        data.to_netcdf(temporary, engine="netcdf4")
    print(report(data))
    print(f"Data: {config.out}")
    return 0
