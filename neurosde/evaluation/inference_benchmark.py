"""`neurosde benchmark inference`: every method on every task, one cube of results, and a report.

The work is cut into cells of one task and one method, each with all its networks. A cell that is done is a file of its
own in OUT/cells and is not done again, so that the command can be stopped at any moment and given again, or made wider
by more methods and tasks; cells may run in processes, or on dask, in any order. OUT/results.nc holds

    results(task, method, network, metric),

with the ensemble, N, T, trials, gain, σ and observed fraction of each task as coordinates; what a method cannot say is
NaN. OUT/report.html shows it.
"""

from __future__ import annotations

import json
import math
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from tqdm import tqdm

from neurosde.datasets.execution import Execution, run_tasks
from neurosde.evaluation.inference_methods import DEFAULT, METHODS, infer_by
from neurosde.evaluation.inference_metrics import METRICS, MISSING, measured
from neurosde.evaluation.inference_tasks import Suite, Task, record, suite_tasks
from neurosde.evaluation.resident import peak, reset_peak
from neurosde.evaluation.sbi_baselines import SBI_METHODS
from neurosde.evaluation.timing import machine
from neurosde.options import OptionParser, add_options, from_options
from neurosde.provenance import config_changes, global_attributes, whole_file
from neurosde.validation import check_count, optional_package


@dataclass(frozen=True)
class InferenceBenchmark:
    """What to infer, with what, and how often."""

    suite: Suite = field(default="quick", metadata={"help": "quick takes minutes, paper covers the whole grid"})
    tasks: tuple[str, ...] = field(default=(), metadata={"help": "names of tasks of the suite (default: all)"})
    methods: tuple[str, ...] = field(default=DEFAULT, metadata={"help": "of " + ", ".join(METHODS)})
    networks: int = field(default=8, metadata={"help": "networks per task"})
    draws: int = field(default=32, metadata={"help": "draws of each posterior"})
    simulations: int = field(default=10_000, metadata={"help": "simulations that methods of sbi are trained on"})
    checkpoint: str = field(default="base", metadata={"help": "file, folder or name of the trained posterior"})
    seed: int = field(default=0, metadata={"help": "seed; networks of training have others"})

    def __post_init__(self) -> None:
        if unknown := [name for name in self.methods if name not in METHODS]:
            raise ValueError(f"methods must be of {', '.join(METHODS)}; got {', '.join(unknown)}.")
        names = [task.name for task in suite_tasks(self.suite)]
        if unknown := [name for name in self.tasks if name not in names]:
            some = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
            raise ValueError(f"tasks must be of the suite {self.suite}, {some}; got {', '.join(unknown)}.")
        for what, given in (("tasks", self.tasks), ("methods", self.methods)):
            if len(set(given)) < len(given):
                raise ValueError(f"{what} must be named once each; got {', '.join(given)}.")
        for name in ("networks", "draws"):
            check_count(getattr(self, name), name, 2)
        check_count(self.simulations, "simulations")
        check_count(self.seed, "seed", 0)

    @property
    def chosen(self) -> tuple[Task, ...]:
        """The tasks."""
        return tuple(task for task in suite_tasks(self.suite) if not self.tasks or task.name in self.tasks)


@dataclass(frozen=True)
class Cell:
    """One task and one method.

    Attributes:
        task: the task.
        method: the method.
        folder: of finished cells.
        config: the benchmark; which of its tasks and methods there are beside does not matter.
    """

    task: Task
    method: str
    folder: Path
    config: InferenceBenchmark

    @property
    def path(self) -> Path:
        """File of what was found."""
        return self.folder / f"{self.task.name}--{self.method}.json"

    @property
    def contents(self) -> dict[str, Any]:
        """What the numbers depend on."""
        c = replace(self.config, tasks=(), methods=DEFAULT, suite="quick")
        return {"task": asdict(self.task), "method": self.method} | {
            name: value for name, value in asdict(c).items() if name not in ("tasks", "methods", "suite")
        }

    def found(self) -> dict[str, list[float]] | None:
        """Return what is there already, by metric.

        Raises:
            ValueError: it is of another benchmark.
        """
        if not self.path.exists():
            return None
        try:
            there = json.loads(self.path.read_text())
            of, metrics = there["of"], there["metrics"]
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self.path} is not a cell of this benchmark; delete it, and it is made again."
            ) from error
        if of != json.loads(json.dumps(self.contents)):
            changes = config_changes(json.dumps(of), json.dumps(self.contents))
            raise ValueError(f"{self.path} is of another benchmark ({changes}); choose another --out.")
        return metrics


def run_cell(cell: Cell) -> None:
    """Infer the networks of a cell, and write what was found. A guidance that diverges leaves NaN."""
    c = cell.config
    seeds = tuple(range(c.seed * 1000, c.seed * 1000 + c.networks))
    recorded = record(cell.task, seeds)
    before = reset_peak()
    start = time.perf_counter()
    try:
        found = infer_by(
            cell.method, recorded, draws=c.draws, seed=c.seed, simulations=c.simulations, checkpoint=c.checkpoint
        )
    except FloatingPointError:
        found = None
    seconds = (time.perf_counter() - start) / len(seeds)
    memory = (peak() - before) / 1e6
    metrics: dict[str, list[float]] = {name: [math.nan] * len(seeds) for name in METRICS}
    metrics |= {"seconds": [seconds] * len(seeds), "memory": [memory] * len(seeds)}
    if found is not None:
        metrics |= measured(found, recorded, c.seed)
    with whole_file(cell.path) as temporary:
        temporary.write_text(json.dumps({"of": cell.contents, "metrics": metrics}))


def inference_benchmark(config: InferenceBenchmark, out: Path, execution: Execution | None = None) -> xr.Dataset:
    """Run all cells that are not there yet, and gather all.

    Args:
        config: what to run.
        out: folder of the results.
        execution: who runs the cells; by default this process.

    Returns:
        The cube, see above.

    Raises:
        ValueError: the folder holds cells of another benchmark.
        ImportError: sbi is not installed and a method of it is asked for.
    """
    if set(config.methods) & set(SBI_METHODS):
        optional_package("sbi", "sbi")
    cells = [Cell(task, method, out / "cells", config) for task in config.chosen for method in config.methods]
    missing = [cell for cell in cells if cell.found() is None]
    done = run_tasks(run_cell, missing, execution or Execution())
    for _ in tqdm(done, total=len(cells), initial=len(cells) - len(missing), unit="cell", disable=None):
        pass
    return gathered(config, cells)


def gathered(config: InferenceBenchmark, cells: Sequence[Cell]) -> xr.Dataset:
    """Return the cube of finished cells."""
    tasks, methods = config.chosen, config.methods
    values = np.full((len(tasks), len(methods), config.networks, len(METRICS)), math.nan)
    for cell in cells:
        found = cell.found()
        assert found is not None
        i, j = tasks.index(cell.task), methods.index(cell.method)
        for m, metric in enumerate(METRICS):
            values[i, j, :, m] = found[metric]
    of_tasks = {
        name: ("task", [getattr(task, name) for task in tasks], {"long_name": about, "units": units})
        for name, about, units in (
            ("ensemble", "ensemble", "1"), ("neurons", "number of neurons", "1"), ("times", "times of a trial", "1"),
            ("trials", "trials of a network", "1"), ("gain", "gain", "1"),
            ("noise_std", "noise sigma, per root of tau", "1"), ("observed", "fraction of neurons recorded", "1"),
        )
    }  # fmt: skip
    dataset = xr.Dataset(
        {"results": (("task", "method", "network", "metric"), values, {"long_name": "metrics", "units": "1"})},
        {
            "task": [task.name for task in tasks], "method": list(methods), "metric": list(METRICS),
            "metric_long_name": ("metric", [about for about, _ in METRICS.values()]),
            "metric_missing": ("metric", [MISSING.get(name, "") for name in METRICS], {"long_name": "why it is NaN"}),
            "method_long_name": ("method", [METHODS[name] for name in methods]),
            **of_tasks,
        },
    )  # fmt: skip
    dataset.attrs = machine() | global_attributes(
        "Inference of recurrent weights: methods by tasks",
        f"Suite {config.suite}, {config.networks} networks per task, {config.draws} draws of each posterior.",
        config,
        config.seed,
    )
    return dataset


def add_arguments(parser: OptionParser) -> None:
    """Add the options of `neurosde benchmark inference`."""
    add_options(parser, InferenceBenchmark)
    add_options(parser.add_argument_group("execution"), Execution)
    parser.add_argument(
        "--out", type=Path, default=Path("results/inference"), help="folder (default results/inference)"
    )
    parser.set_defaults(run=run)


def run(options: Namespace) -> int:
    """Run the benchmark, print its tables, write its data and its report."""
    from neurosde.evaluation.inference_report import markdown_tables, write_inference_report

    config = from_options(InferenceBenchmark, options)
    results = inference_benchmark(config, options.out, from_options(Execution, options))
    with whole_file(options.out / "results.nc") as temporary:
        results.to_netcdf(temporary, engine="netcdf4")
    print(markdown_tables(results))
    report = write_inference_report(results, options.out)
    print(f"\nData:   {options.out / 'results.nc'}\nReport: {report}")
    return 0
