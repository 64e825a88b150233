"""The results of the README, and its figures: `make results` writes both, from what benchmarks measured.

    python -m neurosde.evaluation.results_section RESULTS README GALLERY

RESULTS is the folder of `neurosde benchmark inference`. What stands in the README between two marks,

    <!-- results: begin -->  …  <!-- results: end -->

is replaced; figures go to the folder GALLERY.
"""

from __future__ import annotations

import math
import os
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import xarray as xr
from matplotlib.figure import Figure

from neurosde.datasets.ensembles import sample_weight_matrix
from neurosde.datasets.generation import generate_activity_trials
from neurosde.datasets.recordings import Recording
from neurosde.evaluation import figures
from neurosde.evaluation.evaluate import evaluate_posterior
from neurosde.evaluation.inference_methods import METHODS
from neurosde.evaluation.inference_report import means
from neurosde.evaluation.posterior_benchmark import PosteriorBenchmark, posterior_benchmark
from neurosde.evaluation.rank_calibration import rank_curves
from neurosde.evaluation.timing import hardware
from neurosde.models.diffusion_cfg import CFGPosterior
from neurosde.models.inference import infer
from neurosde.models.inference_config import InferenceConfig
from neurosde.models.posterior_file import save_posterior
from neurosde.options import OptionParser, run_safely
from neurosde.provenance import make_folder, whole_file

if TYPE_CHECKING:
    from collections.abc import Sequence

BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
TABLES = {"relative_error": "Relative error", "energy_score": "Energy score, relative"}


def section(results: xr.Dataset) -> str:
    """Return a table of each of `TABLES`, a row for each method and a column for each task."""
    parts = []
    tasks = [str(task) for task in results["task"].values]
    heads = [task.removesuffix("-g1.5-sigma0.3").replace("-", " ").replace("low rank", "low-rank") for task in tasks]
    for metric, title in TABLES.items():
        mean, half = (frame[metric].unstack("task") for frame in means(results, (metric,)))
        least = mean.round(2).min()
        lines = [f"| {title} | {' | '.join(heads)} |", "|---" * (len(tasks) + 1) + "|"]
        for method in (METHODS[str(name)] for name in results["method"].values):
            if mean.loc[method].notna().any():
                rows = mean.loc[method], half.loc[method], least
                cells = [_cell(*values) for values in zip(*(frame[tasks] for frame in rows), strict=True)]
                lines.append(f"| {method} | {' | '.join(cells)} |")
        parts.append("\n".join(lines))
    about = f"Means over {results.sizes['network']} networks with 95 % intervals; {hardware(results.attrs)}."
    return "\n\n".join([*parts, about])


def _cell(mean: float, half: float, least: float) -> str:
    if not math.isfinite(mean):
        return "–"
    value = f"**{mean:.2f}**" if round(mean, 2) == least else f"{mean:.2f}"
    return f"{value} ± {half:.2f}"


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


def gallery(results: xr.Dataset, folder: Path, *, N: int = 20, T: int = 200, networks: int = 100) -> None:
    """Draw the figures: weights and spectrum of one posterior, calibration of many, and error against cost."""
    W = sample_weight_matrix(N, g=1.5, ensemble="dale", generator=0)
    trials = generate_activity_trials(W, num_trials=2, T=T, dt=0.1, tau=1.0, noise_std=0.3, generator=1)
    assert isinstance(trials, torch.Tensor)
    found = infer(Recording(trials.numpy(), "gallery", dt=0.1), InferenceConfig(method="cfg", draws=64))
    with tempfile.TemporaryDirectory() as temporary:
        file, truth = Path(temporary) / "posterior.nc", Path(temporary) / "W.npy"
        save_posterior(found, file)
        np.save(truth, W.numpy())
        evaluation = evaluate_posterior(file, truth)
    posterior = CFGPosterior.from_pretrained("base")
    config = PosteriorBenchmark(sizes=(10,), lengths=(100,), families=("dale",), networks=networks, draws=31)
    drawn = {
        "weights": figures.weights(evaluation),
        "spectrum": figures.spectrum(evaluation),
        "calibration": _calibration(posterior_benchmark(posterior, config)),
        "cost": _cost(results),
    }
    make_folder(folder)
    for name, figure in drawn.items():
        with whole_file(folder / f"{name}.png") as temporary_file:
            figure.savefig(temporary_file, format="png", dpi=110)


def _calibration(results: xr.Dataset) -> Figure:
    """Ranks of the truth, told the ensemble, with bands that 95 % of calibrated posteriors stay in."""
    draws = int(results.attrs["draws"])
    ranks = results["rank"].sel(informed="told").isel(ensemble=0, neurons=0, times=0).transpose("feature", "network")
    curves = rank_curves(ranks.to_numpy().astype(int), draws)
    figure = Figure(figsize=(4.6, 4.2), layout="constrained")
    axis = figure.subplots()
    axis.fill_between(
        curves.levels, curves.lower - curves.levels, curves.upper - curves.levels, color=figures.GREY, alpha=0.3
    )
    for curve in curves.curves:
        axis.plot(curves.levels, curve - curves.levels, color=figures.BLUE, linewidth=0.9, alpha=0.8)
    axis.set(
        xlabel="rank of the truth among draws", ylabel="share of networks below − rank",
        title=f"calibration: {len(curves.curves)} features, Dale, N = 10",
    )  # fmt: skip
    return figure


def _cost(results: xr.Dataset) -> Figure:
    """Error against seconds, a point for each method, of each ensemble at N = 10."""
    small = [str(task) for task in results["task"].values if "-N10-" in str(task)] or [str(results["task"].values[0])]
    mean, _ = means(results.sel({"task": small}), ("relative_error", "seconds"))
    by_method = mean.groupby(level="method").mean()
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axis = figure.subplots()
    for k, (method, row) in enumerate(by_method.iterrows()):
        marker, colour = "osD^vP*X<>dhp8H4"[k], f"C{k % 10}"
        axis.plot(
            row["seconds"], row["relative_error"], marker, color=colour, markersize=7, alpha=0.8, label=str(method)
        )
    axis.axhline(1, color="0.6", linewidth=0.8)
    axis.set(xscale="log", yscale="log", xlabel="seconds a network", ylabel="relative error",
             title=f"error and cost, mean of {len(small)} ensembles, N = 10")  # fmt: skip
    axis.set_yticks([0.5, 1, 2], ["0.5", "1", "2"])
    axis.set_yticks([], minor=True)
    axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1))
    return figure


def main(arguments: Sequence[str] | None = None) -> int:
    """Write section and figures."""
    parser = OptionParser(prog="results_section", description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="folder of neurosde benchmark inference")
    parser.add_argument("readme", type=Path, help="file with the marks")
    parser.add_argument("gallery", type=Path, help="folder of the figures")
    return run_safely(_write, parser.parse_args(arguments))


def _write(options: Namespace) -> int:
    marked(options.readme)  # before any work
    with xr.open_dataset(options.results / "results.nc") as stored:
        results = stored.load()
    gallery(results, options.gallery)
    shown = os.path.relpath(options.gallery, options.readme.parent)
    pictures = " ".join(f"![{name}]({shown}/{name}.png)" for name in ("weights", "spectrum", "calibration", "cost"))
    replace_section(options.readme, f"{section(results)}\n\n{pictures}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
