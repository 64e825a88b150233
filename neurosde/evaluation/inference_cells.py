"""Cells of `neurosde benchmark inference`: one task and one method, each in a file of its own.

A cell holds what was found (`metrics`, `local`), what that depends on (`of`), and what it was made by (`made_by`). It
is taken again only where the former agrees: the task and the method; networks, draws and seed; the list of metrics; the
number of simulations, of methods of sbi; and, of the trained posterior's methods, the SHA-256 digest of its file, so
that a model that was trained again under its old name is not taken for the old one. Version and commit of neurosde are
kept beside, and do not decide: on most changes of the code no number depends. After one on which they do, choose
another folder.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from neurosde._version import __version__
from neurosde.evaluation.inference_config import InferenceBenchmark
from neurosde.evaluation.inference_local import local_pairs
from neurosde.evaluation.inference_methods import METHODS, TRAINED, infer_by
from neurosde.evaluation.inference_metrics import METRICS, measured
from neurosde.evaluation.inference_tasks import Task, record, suite_tasks
from neurosde.evaluation.resident import peak, reset_peak
from neurosde.evaluation.sbi_baselines import SBI_METHODS
from neurosde.models.model_files import model_digest
from neurosde.provenance import config_changes, git_commit, whole_file


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
        c = self.config
        of = {
            "task": asdict(self.task),
            "method": self.method,
            "networks": c.networks,
            "draws": c.draws,
            "seed": c.seed,
        }
        if self.method in SBI_METHODS:
            of["simulations"] = c.simulations
        if self.method in TRAINED:
            of["checkpoint_sha256"] = model_digest(c.checkpoint, "posterior")
        return of | {"metrics": list(METRICS)}

    def found(self) -> dict[str, Any] | None:
        """Return what is there already: `metrics`, `local` and `made_by`.

        Raises:
            ValueError: it is of another benchmark, or no cell.
        """
        if not self.path.exists():
            return None
        there = _read(self.path)
        changes = _changes(there["of"], json.loads(json.dumps(self.contents)))
        if changes:
            raise ValueError(f"{self.path} is of another benchmark ({changes}); choose another --out.")
        return there


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
    contents = {
        "of": cell.contents,
        "made_by": {"neurosde_version": __version__, "git_commit": git_commit()},
        "metrics": metrics,
        "local": None if found is None else local_pairs(found, recorded, c.seed),
    }
    with whole_file(cell.path) as temporary:
        temporary.write_text(json.dumps(contents))


def cells_beside(asked: Sequence[Cell], folder: Path, config: InferenceBenchmark) -> list[Cell]:
    """Return the cells that are asked for and all others that the folder holds, in the order of suites and methods.

    Raises:
        ValueError: one of the others is of another benchmark than these, or no cell.
    """
    cells = {cell.path.name: cell for cell in asked}
    for path in sorted(folder.glob("*.json")):
        if path.name not in cells:
            of = _read(path)["of"]
            cell = Cell(Task(**of["task"]), of["method"], folder, config)
            cell.found()
            cells[path.name] = cell
    order = {task: k for k, task in enumerate((*suite_tasks("quick"), *suite_tasks("paper")))}
    names = list(METHODS)
    return sorted(cells.values(), key=lambda cell: (order.get(cell.task, len(order)), names.index(cell.method)))


def _read(path: Path) -> dict[str, Any]:
    try:
        there = json.loads(path.read_text())
        if {"metrics", "local", "made_by"} <= there.keys() and there["of"]["method"] in METHODS:
            Task(**there["of"]["task"])
            return dict(there)
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # no JSON, or JSON of something else
        raise ValueError(f"{path} is not a cell of this benchmark; delete it, and it is made again.") from error
    raise ValueError(f"{path} is not a cell of this benchmark; delete it, and it is made again.")


def _changes(there: dict[str, Any], now: dict[str, Any]) -> str:
    """Say in what two benchmarks differ; of the metrics, which are many, only those that one of them lacks."""
    apart = sorted(set(there.get("metrics", ())) ^ set(now["metrics"]))
    rest = config_changes(*(json.dumps({k: v for k, v in one.items() if k != "metrics"}) for one in (there, now)))
    return ", ".join(part for part in (rest, f"metrics {', '.join(apart)}" if apart else "") if part)
