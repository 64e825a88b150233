"""`neurosde benchmark sbibm`: the diffusion beside published methods, on tasks of simulation-based inference.

An outside check of preconditioning, samplers and training by noise: a vector denoiser, which shares them with the one
for matrices (`neurosde.models.vector_diffusion`), is trained once for each task and number of simulations, and asked
about several observations (`neurosde.evaluation.sbibm_tasks`).

- C2ST: accuracy of sbibm's own classifier (`neurosde.evaluation.published_c2st`; all other benchmarks use that of
  `neurosde.evaluation.c2st`, which finds less) between draws of the exact posterior and draws of ours, plain /
  standardised, mean over observations with its standard error. Published figures are of the same two tests, and of
  10 000 draws, as ours are by default (the more, the more a classifier finds), but of other observations.
- exact: the same between two sets of exact draws, standardised.
- published: plain / standardised (`neurosde.evaluation.sbibm_published`).

Results are written after every row, and a command that is given again goes on after the rows that are there.
"""

from __future__ import annotations

import math
import time
from argparse import Namespace
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from tqdm import tqdm

from neurosde.evaluation.kept_rows import KeptRows
from neurosde.evaluation.posterior_benchmark import network_seed
from neurosde.evaluation.published_c2st import FOLDS, published_c2st
from neurosde.evaluation.sbibm_published import METHODS, published
from neurosde.evaluation.sbibm_tasks import TASKS, Task, observation
from neurosde.evaluation.timing import hardware
from neurosde.models.samplers import STEPS
from neurosde.models.vector_diffusion import LEAST_PAIRS, VectorTraining, train_vector_posterior
from neurosde.options import OptionParser, add_options, from_options
from neurosde.provenance import global_attributes
from neurosde.validation import check_count

OF_OBSERVATION = {
    "c2st": ("accuracy of sbibm's classifier between draws and exact draws", "1"),
    "c2st_standardised": ("the same of standardised draws", "1"),
    "c2st_exact": ("the same between two sets of exact draws, standardised", "1"),
    "draw_seconds": ("time that drawing took", "s"),
}
OF_ROW = {"seconds": ("time that training took", "s")}


@dataclass(frozen=True)
class SbibmBenchmark:
    """What to train, and what to ask it."""

    tasks: tuple[str, ...] = field(default=tuple(TASKS), metadata={"help": f"of {', '.join(TASKS)}"})
    simulations: tuple[int, ...] = field(default=(1000, 10_000), metadata={"help": "simulations to train on"})
    observations: int = field(default=3, metadata={"help": "observations, of our own seeds"})
    draws: int = field(default=10_000, metadata={"help": "draws per observation; published figures are of 10 000"})
    steps: int = field(default=STEPS, metadata={"help": "noise levels of the sampler"})
    seed: int = field(default=0, metadata={"help": "seed"})

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.tasks) - set(TASKS)):
            raise ValueError(f"tasks must be of {', '.join(TASKS)}; got {', '.join(unknown)}.")
        for name in ("tasks", "simulations"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name} must be one or several, each named once; got {' '.join(map(str, values))}.")
        for count in self.simulations:
            check_count(count, "simulations", LEAST_PAIRS)
        check_count(self.observations, "observations")
        check_count(self.draws, "draws", 2 * FOLDS)
        check_count(self.steps, "steps", 2)
        check_count(self.seed, "seed", 0)


def sbibm_benchmark(config: SbibmBenchmark, out: Path | None = None) -> xr.Dataset:
    """Run the benchmark.

    Args:
        config: what to run.
        out: file that results are written to after every row, and whose rows, if it is there, are not run again.

    Returns:
        Each of `OF_OBSERVATION` (task, simulations, observation) and of `OF_ROW` (task, simulations).

    Raises:
        ValueError: `out` is of another configuration, or no such file.
    """
    kept = KeptRows(_empty(config), ("task", "simulations"), out)
    rows = [(i, j) for i in range(len(config.tasks)) for j in range(len(config.simulations))]
    with tqdm(rows, unit="row", disable=None) as progress:
        for i, j in progress:
            name, count = config.tasks[i], config.simulations[j]
            if kept.missing(task=i, simulations=j):
                progress.set_description(f"{name}, {count}")
                kept.add(_row(TASKS[name], count, config), task=i, simulations=j)
    return kept.results


def _empty(c: SbibmBenchmark) -> xr.Dataset:
    shape = (len(c.tasks), len(c.simulations), c.observations)
    dims = ("task", "simulations", "observation")
    data = {
        name: (dims, np.full(shape, np.nan), {"long_name": about, "units": unit})
        for name, (about, unit) in OF_OBSERVATION.items()
    } | {
        name: (dims[:2], np.full(shape[:2], np.nan), {"long_name": about, "units": unit})
        for name, (about, unit) in OF_ROW.items()
    }
    results = xr.Dataset(data, {"task": list(c.tasks), "simulations": list(c.simulations)})
    results.attrs = global_attributes(
        "Vector diffusion on tasks of sbibm", f"{c.draws} draws per observation. {hardware()}", _contents(c), c.seed
    )
    return results


def _contents(c: SbibmBenchmark) -> dict[str, Any]:
    """All that rows depend on."""
    return asdict(c) | {"training": asdict(_training(c))}


def _training(c: SbibmBenchmark) -> VectorTraining:
    return VectorTraining(seed=c.seed)


def _row(task: Task, simulations: int, c: SbibmBenchmark) -> dict[str, np.ndarray | float]:
    seed = network_seed(c.seed, list(TASKS).index(task.name), simulations)
    source = torch.Generator().manual_seed(seed)
    theta = task.prior(simulations, source)
    x = task.simulate(theta, source)
    began = time.perf_counter()
    trained = train_vector_posterior(theta, x, _training(c), support=task.allowed, progress=True)
    seconds = time.perf_counter() - began
    found: dict[str, list[float]] = {name: [] for name in OF_OBSERVATION}
    for number in tqdm(range(c.observations), unit="observation", leave=False, disable=None):
        _, observed = observation(task, number, c.seed)
        exact, again = (task.posterior(observed, c.draws, source).numpy() for _ in range(2))
        began = time.perf_counter()
        draws = trained.sample(observed, c.draws, steps=c.steps, generator=source).numpy()
        found["draw_seconds"].append(time.perf_counter() - began)
        found["c2st"].append(published_c2st(exact, draws, standardise=False))
        found["c2st_standardised"].append(published_c2st(exact, draws, standardise=True))
        found["c2st_exact"].append(published_c2st(exact, again, standardise=True))
    return {name: np.array(values) for name, values in found.items()} | {"seconds": seconds}


def markdown_table(results: xr.Dataset) -> str:
    """A row per task and number of simulations, with published figures beside it."""
    head = ["task", "simulations", "C2ST", "exact", "training, s", "draws, s", *METHODS]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name in results["task"].values:
        for count in results["simulations"].values:
            row = results.sel({"task": name, "simulations": count})
            others = published(str(name), int(count))
            cells = [
                str(name), str(count),
                " / ".join(_with_error(row[key].to_numpy()) for key in ("c2st", "c2st_standardised")),
                f"{float(row['c2st_exact'].mean()):.3f}",
                f"{float(row['seconds']):.1f}", f"{float(row['draw_seconds'].mean()):.1f}",
                *(f"{others[method][0]:.3f} / {others[method][1]:.3f}" if others else "" for method in METHODS),
            ]  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _with_error(values: np.ndarray) -> str:
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{values.mean():.3f} ± {values.std(ddof=1) / math.sqrt(len(values)):.3f}"


def add_arguments(parser: OptionParser) -> None:
    """Add the options of `neurosde benchmark sbibm`."""
    add_options(parser, SbibmBenchmark)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("results/sbibm.nc"),
        help="data; rows in it are kept (default results/sbibm.nc)",
    )
    parser.set_defaults(run=run)


def run(options: Namespace) -> int:
    """Run the benchmark, row by row, and print its table."""
    config = from_options(SbibmBenchmark, options)
    results = sbibm_benchmark(config, options.out)
    print(markdown_table(results))
    print(
        f"\n{config.observations} observations of our own per row, {config.draws} draws each, mean ± standard error; "
        "published figures are means over sbibm's ten, of 10 000 draws. All C2ST are of sbibm's classifier, plain / "
        "standardised; exact: standardised; "
        f"{hardware()}\nData: {options.out}"
    )
    return 0
