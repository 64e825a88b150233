"""`neurosde benchmark inference`: every method on every task, one cube of results, and a report.

The work is cut into cells of one task and one method, each with all its networks. A cell that is done is a file of its
own in OUT/cells and is not done again (`neurosde.evaluation.inference_cells`), so that the command can be stopped at
any moment and given again, or made wider by more methods and tasks; cells may run in processes, or on dask, in any
order. OUT/results.nc holds

    results(task, method, network, metric),

with the ensemble, N, T, trials, gain, σ and observed fraction of each task as coordinates, version and commit of each
cell, and L-C2ST of each method (`neurosde.evaluation.inference_local`); what a method cannot say is NaN, and
`metric_missing` says why. OUT/report.html shows it.

The cube and the report are of all cells in OUT, whichever command made them, so that one which names fewer tasks or
methods takes nothing away; what no command has made yet is NaN. Cells of other settings are refused.
"""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import xarray as xr
from tqdm import tqdm

from neurosde.datasets.execution import Execution, run_tasks
from neurosde.evaluation.inference_cells import Cell, cells_beside, run_cell
from neurosde.evaluation.inference_config import InferenceBenchmark
from neurosde.evaluation.inference_local import local_tests
from neurosde.evaluation.inference_methods import METHODS, TRAINED
from neurosde.evaluation.inference_metrics import METRICS, MISSING
from neurosde.evaluation.sbi_baselines import SBI_METHODS
from neurosde.evaluation.timing import machine
from neurosde.options import OptionParser, add_options, from_options
from neurosde.provenance import global_attributes, whole_file
from neurosde.validation import optional_package

_MADE_BY = {"neurosde_version": "version of neurosde", "git_commit": "commit of neurosde"}


def inference_benchmark(config: InferenceBenchmark, out: Path, execution: Execution | None = None) -> xr.Dataset:
    """Run all cells that are not there yet, and gather all that are there then.

    Args:
        config: what to run.
        out: folder of the results.
        execution: who runs the cells; by default this process.

    Returns:
        The cube, see above.

    Raises:
        ValueError: the folder holds cells of other settings.
        ImportError: sbi is not installed and a method of it is asked for.
    """
    if set(config.methods) & set(SBI_METHODS):
        optional_package("sbi", "sbi")
    asked = [Cell(task, method, out / "cells", config) for task in config.chosen for method in config.methods]
    cells = cells_beside(asked, out / "cells", config)  # before any work
    missing = [cell for cell in asked if cell.found() is None]
    done = run_tasks(run_cell, missing, execution or Execution())
    for _ in tqdm(done, total=len(asked), initial=len(asked) - len(missing), unit="cell", disable=None):
        pass
    return gathered(config, cells)


def gathered(config: InferenceBenchmark, cells: Sequence[Cell]) -> xr.Dataset:
    """Return the cube of finished cells."""
    tasks = list(dict.fromkeys(cell.task for cell in cells))
    methods = [name for name in METHODS if any(cell.method == name for cell in cells)]
    shape = (len(tasks), len(methods))
    values = np.full((*shape, config.networks, len(METRICS)), math.nan)
    made_by = {name: np.full(shape, "", dtype=object) for name in _MADE_BY}
    local: list[list[dict[str, object] | None]] = [[None] * len(tasks) for _ in methods]
    for cell in cells:
        found = cell.found()
        assert found is not None
        i, j = tasks.index(cell.task), methods.index(cell.method)
        for m, metric in enumerate(METRICS):
            values[i, j, :, m] = found["metrics"][metric]
        for name, array in made_by.items():
            array[i, j] = found["made_by"][name]
        local[j][i] = found["local"]
    of_tasks = {
        name: ("task", [getattr(task, name) for task in tasks], {"long_name": about, "units": units})
        for name, about, units in (
            ("ensemble", "ensemble", "1"), ("neurons", "number of neurons", "1"), ("times", "times of a trial", "1"),
            ("trials", "trials of a network", "1"), ("gain", "gain", "1"),
            ("noise_std", "noise sigma, per root of tau", "1"), ("observed", "fraction of neurons recorded", "1"),
        )
    }  # fmt: skip
    tests = [local_tests(of_method, config.seed) for of_method in local]
    both = ("task", "method")
    dataset = xr.Dataset(
        {
            "results": ((*both, "network", "metric"), values, {"long_name": "metrics", "units": "1"}),
            "local_c2st": (both, np.stack([one.statistic for one in tests], 1), _label("statistic of L-C2ST")),
            "local_c2st_p": (both, np.stack([one.p for one in tests], 1), _label("p of L-C2ST")),
            "local_c2st_overall_p": ("method", [one.overall for one in tests], _label("p of L-C2ST, all tasks")),
            **{name: (both, array.astype(str), _label(_MADE_BY[name])) for name, array in made_by.items()},
        },
        {
            "task": [task.name for task in tasks], "method": methods, "metric": list(METRICS),
            "metric_long_name": ("metric", [about for about, _ in METRICS.values()]),
            "metric_missing": ("metric", [MISSING.get(name, "") for name in METRICS], _label("why it is NaN")),
            "method_long_name": ("method", [METHODS[name] for name in methods]),
            **of_tasks,
        },
    )  # fmt: skip
    trained = [cell for cell in cells if cell.method in TRAINED]
    dataset.attrs = machine() | global_attributes(
        "Inference of recurrent weights: methods by tasks",
        f"{config.networks} networks per task, {config.draws} draws of each posterior.",
        asdict(config) | {"tasks": dataset["task"].values.tolist(), "methods": methods},
        config.seed,
    )
    if trained:
        dataset.attrs["checkpoint_sha256"] = trained[0].contents["checkpoint_sha256"]
    return dataset


def _label(long_name: str) -> dict[str, str]:
    return {"long_name": long_name, "units": "1"}


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
