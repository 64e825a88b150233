"""The results of the README, and its figures: `make results` writes both, from what benchmarks measured.

    python -m neurosde.evaluation.results_section RESULTS README GALLERY

RESULTS is the folder of `neurosde benchmark inference`: tasks, methods and the trained posterior are those of its cube.
What stands in the README between two marks,

    <!-- results: begin -->  …  <!-- results: end -->

is replaced; figures go to the folder GALLERY.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr
from matplotlib.figure import Figure
from tqdm import tqdm

from neurosde.datasets.recordings import Recording
from neurosde.evaluation import figures
from neurosde.evaluation.evaluate import Evaluation, evaluate_posterior
from neurosde.evaluation.inference_averages import Averages, averages, by_ensemble
from neurosde.evaluation.inference_figures import log_scale
from neurosde.evaluation.inference_methods import METHODS
from neurosde.evaluation.inference_tasks import DT, Task, record
from neurosde.evaluation.measures import values_of
from neurosde.evaluation.posterior_benchmark import PosteriorBenchmark, known_ensembles, posterior_benchmark
from neurosde.evaluation.rank_calibration import rank_curves
from neurosde.evaluation.timing import hardware
from neurosde.models.diffusion_cfg import CFGPosterior
from neurosde.models.inference import infer
from neurosde.models.inference_config import InferenceConfig
from neurosde.models.posterior_file import save_posterior
from neurosde.options import OptionParser, add_options, from_options, run_safely
from neurosde.provenance import make_folder, whole_file
from neurosde.validation import check_count

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
TABLES = {"relative_error": "Relative error", "energy_score": "Energy score, relative"}
WIDE = 12  # a table of more tasks has a column for each ensemble instead
_PARTS = {"neurons": "N{:.0f}", "times": "T{:.0f}", "trials": "x{:.0f}", "gain": " g{:g}", "noise_std": " σ{:g}"}


@dataclass(frozen=True)
class Gallery:
    """What the figures show."""

    task: str = field(
        default="",
        metadata={"help": "weights, spectrum, calibration: of this task (default: of those of the fewest neurons the "
                  "one with the median error of the trained posterior)"},
    )  # fmt: skip
    checkpoint: str = field(default="", metadata={"help": "the trained posterior (default: that of the results)"})
    networks: int = field(default=100, metadata={"help": "networks of the figure of calibration"})
    draws: int = field(default=31, metadata={"help": "draws for each of these networks"})

    def __post_init__(self) -> None:
        for name in ("networks", "draws"):
            check_count(getattr(self, name), name, 2)


def section(results: xr.Dataset) -> str:
    """Return a table of each of `TABLES`, a row for each method and a column for each task, or ensemble if many."""
    titles = [METHODS[str(name)] for name in results["method"].values]
    few = results.sizes["task"] <= WIDE
    sets = {head: [k] for k, head in enumerate(_heads(results))} if few else by_ensemble(results)
    parts = []
    for metric, title in TABLES.items():
        found = averages(values_of(results, metric), sets, titles)
        least = found.mean.where(found.complete).round(2).min()
        lines = [f"| {title} | {' | '.join(sets)} |", "|---" * (len(sets) + 1) + "|"]
        for method in titles:
            if found.mean.loc[method].notna().any():
                cells = [_cell(found, method, name, float(least[name])) for name in sets]
                lines.append(f"| {method} | {' | '.join(cells)} |")
        parts.append("\n".join(lines))
    common = [f"{results[name].attrs.get('long_name', name)} {results[name].values[0]:g}"
              for name in ("gain", "noise_std") if len(set(results[name].values)) == 1]  # fmt: skip
    over = "" if few else f"{results.sizes['task']} tasks and, of each, "
    about = f"Means over {over}{results.sizes['network']} networks with 95 % intervals"
    return "\n\n".join([*parts, f"{'; '.join([about, *common, hardware(results.attrs)])}."])


def _heads(results: xr.Dataset) -> list[str]:
    """Ensemble, N, T × trials of each task, and gain and σ if tasks differ in them."""
    shown = [name for name in _PARTS if name in ("neurons", "times", "trials") or len(set(results[name].values)) > 1]
    heads = []
    for k, ensemble in enumerate(results["ensemble"].values):
        N, T, trials, *others = (_PARTS[name].format(float(results[name].values[k])) for name in shown)
        heads.append(f"{ensemble} {N} {T}{trials}{''.join(others)}")
    return heads


def _cell(found: Averages, method: str, name: str, least: float) -> str:
    mean, half, tasks = (np.asarray(one.loc[method, name]).item() for one in (found.mean, found.half, found.tasks))
    if not math.isfinite(mean):
        return "–"
    if not found.complete.loc[method, name]:
        return f"{mean:.2f} ({tasks}/{found.possible[name]} tasks)"
    value = f"**{mean:.2f}**" if round(mean, 2) == least else f"{mean:.2f}"
    return value if math.isnan(half) else f"{value} ± {half:.2f}"


def replace_section(readme: Path, text: str) -> None:
    """Replace what stands between the marks.

    Raises:
        ValueError: the file has not one pair of marks.
    """
    before = marked(readme)
    start, stop = before.index(BEGIN) + len(BEGIN), before.index(END)
    with whole_file(readme) as temporary:
        temporary.write_text(f"{before[:start]}\n\n{text}\n\n{before[stop:]}", encoding="utf-8")


def marked(readme: Path) -> str:
    """Return a file that has the marks.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file has not one pair of marks.
    """
    before = readme.read_text(encoding="utf-8")
    if before.count(BEGIN) != 1 or before.count(END) != 1 or before.index(BEGIN) > before.index(END):
        raise ValueError(f"{readme} must hold {BEGIN} once, and then {END} once; it does not.")
    return before


def shown_task(results: xr.Dataset, name: str, ensembles: Sequence[str]) -> Task:
    """Return the task of a cube that figures show.

    Args:
        results: the cube.
        name: of the task; empty for the default, see `Gallery`.
        ensembles: those that the trained posterior knows.

    Raises:
        ValueError: the cube has no such task, or none of a known ensemble.
    """
    known = [k for k, one in enumerate(results["ensemble"].values) if str(one) in ensembles]
    names = [str(results["task"].values[k]) for k in known]
    if not known or (name and name not in names):
        raise ValueError(
            f"task must be one of the results, of an ensemble that the trained posterior knows "
            f"({', '.join(ensembles)}): {', '.join(names) or 'there is none'}; got {name!r}."
        )
    if name:
        chosen = known[names.index(name)]
    else:
        least = min(results["neurons"].values[k] for k in known)
        small = [k for k in known if results["neurons"].values[k] == least]
        errors = values_of(results, "relative_error").mean("network")
        method = "cfg" if "cfg" in errors["method"].values else errors["method"].values[0]
        order = np.argsort([float(errors.sel({"method": method})[k]) for k in small], kind="stable")
        chosen = small[int(order[len(order) // 2])]
    one = results.isel(task=chosen)
    return Task(
        str(one["ensemble"].item()), int(one["neurons"]), int(one["times"]), int(one["trials"]), float(one["gain"]),
        float(one["noise_std"]), float(one["observed"]),
    )  # fmt: skip


def gallery(results: xr.Dataset, folder: Path, options: Gallery) -> None:
    """Draw the figures: weights and spectrum of one posterior, calibration of many, and error against cost.

    Raises:
        ValueError: no such task, or none that the trained posterior knows.
    """
    config = json.loads(results.attrs["config"])
    checkpoint = options.checkpoint or str(config["checkpoint"])
    posterior = CFGPosterior.from_pretrained(checkpoint)
    task = shown_task(results, options.task, list(known_ensembles(posterior)))
    make_folder(folder)
    evaluation = _evaluation(task, int(config["seed"]), checkpoint)
    draws: dict[str, Callable[[], Figure]] = {
        "weights": lambda: figures.weights(evaluation),
        "spectrum": lambda: figures.spectrum(evaluation),
        "calibration": lambda: _calibration(posterior, task, options),
        "cost": lambda: _cost(results),
    }
    with tqdm(draws.items(), unit="figure", disable=None) as progress:
        for name, draw in progress:
            progress.set_description(name)
            with whole_file(folder / f"{name}.png") as temporary:
                draw().savefig(temporary, format="png", dpi=110)


def _evaluation(task: Task, seed: int, checkpoint: str) -> Evaluation:
    """Of the first network of a task, as the benchmark recorded it."""
    recorded = record(task, (1000 * seed,))
    found = infer(
        Recording(recorded.activity[0].numpy(), task.name, dt=DT),
        InferenceConfig(method="cfg", checkpoint=checkpoint, draws=64),
    )
    with tempfile.TemporaryDirectory() as temporary:
        file, truth = Path(temporary) / "posterior.nc", Path(temporary) / "W.npy"
        save_posterior(found, file)
        np.save(truth, recorded.weights[0].numpy())
        return evaluate_posterior(file, truth)


def _calibration(posterior: CFGPosterior, task: Task, options: Gallery) -> Figure:
    """Ranks of the truth, told the ensemble, with bands that 95 % of calibrated posteriors stay in."""
    config = PosteriorBenchmark(
        sizes=(task.neurons,), lengths=(task.times,), families=(task.ensemble,), trials=task.trials,
        noise_std=task.noise_std, networks=options.networks, draws=options.draws,
    )  # fmt: skip
    ranks = posterior_benchmark(posterior, config)["rank"].sel(informed="told").isel(ensemble=0, neurons=0, times=0)
    curves = rank_curves(ranks.transpose("feature", "network").to_numpy().astype(int), options.draws)
    figure = Figure(figsize=(4.6, 4.2), layout="constrained")
    axis = figure.subplots()
    axis.fill_between(
        curves.levels, curves.lower - curves.levels, curves.upper - curves.levels, color=figures.GREY, alpha=0.3
    )
    for curve in curves.curves:
        axis.plot(curves.levels, curve - curves.levels, color=figures.BLUE, linewidth=0.9, alpha=0.8)
    axis.set(
        xlabel="rank of the truth among draws", ylabel="share of networks below − rank",
        title=f"calibration: {len(curves.curves)} features, {task.ensemble}, N = {task.neurons}",
    )  # fmt: skip
    return figure


def _cost(results: xr.Dataset) -> Figure:
    """Error against seconds, a point for each method, over the tasks of the fewest neurons."""
    N = int(results["neurons"].min())
    small = {"all": np.flatnonzero(results["neurons"].values == N).tolist()}
    titles = [METHODS[str(name)] for name in results["method"].values]
    error, seconds = (averages(values_of(results, name), small, titles).mean for name in ("relative_error", "seconds"))
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axis = figure.subplots()
    for k, method in enumerate(titles):
        marker = "osD^vP*X<>dhp8H4"[k % 16]
        axis.plot(
            seconds.loc[method], error.loc[method], marker, color=f"C{k % 10}", markersize=7, alpha=0.8, label=method
        )
    axis.axhline(1, color="0.6", linewidth=0.8)
    axis.set(xscale="log", xlabel="seconds a network", ylabel="relative error",
             title=f"error and cost, mean of {len(small['all'])} tasks, N = {N}")  # fmt: skip
    log_scale(axis, "y", error.to_numpy())
    axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1))
    return figure


def main(arguments: Sequence[str] | None = None) -> int:
    """Write section and figures."""
    parser = OptionParser(prog="results_section", description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="folder of neurosde benchmark inference")
    parser.add_argument("readme", type=Path, help="file with the marks")
    parser.add_argument("gallery", type=Path, help="folder of the figures")
    add_options(parser, Gallery)
    return run_safely(_write, parser.parse_args(arguments))


def _write(options: Namespace) -> int:
    marked(options.readme)  # before any work
    with xr.open_dataset(options.results / "results.nc") as stored:
        results = stored.load()
    gallery(results, options.gallery, from_options(Gallery, options))
    shown = os.path.relpath(options.gallery, options.readme.parent)
    pictures = " ".join(f"![{name}]({shown}/{name}.png)" for name in ("weights", "spectrum", "calibration", "cost"))
    replace_section(options.readme, f"{section(results)}\n\n{pictures}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
