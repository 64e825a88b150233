"""The README's results are regenerated from a cube of results."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from neurosde.evaluation.inference_tasks import Task
from neurosde.evaluation.results_section import BEGIN, END, TABLES, Gallery, replace_section, section, shown_task
from neurosde.evaluation.timing import machine

ROOT = Path(__file__).resolve().parent.parent
TASK = "dale-N10-T100x2-g1.5-sigma0.3"


SUITE = ["--tasks", TASK, "--networks", "3", "--draws", "8", "--methods", "ridge", "prior", "gaussian"]
FIGURES = ["--networks", "12", "--draws", "7"]


def check(folder, text):
    """Numbers are those of the cube, the least error is bold, and all four figures are drawn and shown."""
    assert text.startswith("before\n") and text.endswith("after\n") and "former" not in text
    assert "| Relative error | dale N10 T100x2 |" in text and "gain 1.5; noise sigma, per root of tau 0.3; " in text
    with xr.open_dataset(folder / "results" / "results.nc") as results:
        errors = results["results"].sel({"metric": "relative_error"})[0].mean("network")
        least = errors["method"].values[errors.to_numpy().argmin()]
        assert f"**{float(errors.min()):.2f}**" in text and least != "prior"
        assert f"{float(errors.sel({'method': 'prior'})):.2f} ± " in text
    for name in ("weights", "spectrum", "calibration", "cost"):
        assert f"(examples/gallery/{name}.png)" in text
        assert (folder / "examples" / "gallery" / f"{name}.png").stat().st_size > 5000


@pytest.mark.slow
def test_make_results_does_all_in_order(tmp_path):
    """From nothing but an environment: the benchmark, then the section and the figures."""
    programs = Path(sys.executable).parent
    if shutil.which("make") is None or not (programs / "neurosde").exists():
        pytest.skip("no make, or no neurosde beside this Python")
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}\nformer\n{END}\nafter\n", encoding="utf-8")
    told = {
        "BIN": programs, "RESULTS": tmp_path / "results", "PAGE": readme, "GALLERY": tmp_path / "examples" / "gallery",
        "SUITE": " ".join(SUITE), "FIGURES": " ".join(FIGURES),
    }  # fmt: skip
    # The environment is there: that of the tests stands for the one that make would set up.
    command = ["make", "--old-file=.venv/ready", "results", *(f"{name}={value}" for name, value in told.items())]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith(str(programs))]
    assert "benchmark inference" in lines[0] and "results_section" in lines[1] and len(lines) == 2
    check(tmp_path, readme.read_text(encoding="utf-8"))
    assert (tmp_path / "results" / "report.html").exists()


def small(count, **coordinates):
    """A cube of the errors 1, 2, … of two methods on tasks of the ensemble Dale."""
    values = np.arange(1.0, count + 1)[:, None, None, None] * np.ones((2, 3, 2))
    fields = {"ensemble": "dale", "neurons": 10, "times": 100, "trials": 2, "gain": 1.5, "noise_std": 0.3,
              "observed": 1.0}  # fmt: skip
    of_tasks = {name: ("task", coordinates.get(name, [value] * count)) for name, value in fields.items()}
    return xr.Dataset(
        {"results": (("task", "method", "network", "metric"), values)},
        {"task": [f"task {k}" for k in range(count)], "method": ["ridge", "cfg"], "metric": list(TABLES), **of_tasks},
        machine(),
    )


def test_the_task_of_the_figures_is_one_of_the_results():
    results = small(5, neurons=[20, 10, 10, 10, 10], ensemble=["dale", "dale", "dale", "dale", "sparse"],
                    gain=[1.5, 1.6, 1.7, 1.8, 1.9])  # fmt: skip
    assert shown_task(results, "", ["dale"]) == Task("dale", 10, 100, 2, 1.7, 0.3)  # errors 2, 3, 4
    assert shown_task(results, "task 0", ["dale"]).neurons == 20
    for name, ensembles in (("task 4", ["dale"]), ("none", ["dale", "sparse"]), ("", ["block"])):
        with pytest.raises(ValueError, match="task must be one of the results, of an ensemble that the trained"):
            shown_task(results, name, ensembles)
    with pytest.raises(ValueError, match="networks must be at least 2"):
        Gallery(networks=1)


def test_heads_say_what_tasks_differ_in():
    text = section(small(2, gain=[0.8, 1.5], times=[100, 1000]))
    assert text.startswith("| Relative error | dale N10 T100x2 g0.8 | dale N10 T1000x2 g1.5 |")
    assert "noise_std 0.3; " in text and "gain " not in text


def test_many_tasks_are_averaged_by_ensemble():
    results = small(14, ensemble=["dale"] * 10 + ["block"] * 4)
    results["results"][0, 0] = np.nan
    text = section(results)
    assert text.startswith("| Relative error | dale | block | all |")
    assert "| ridge (cross-validation) | 6.00 (9/10 tasks) | **12.50** | 8.00 (13/14 tasks) |" in text
    assert "| trained posterior | **5.50** | **12.50** | **7.50** |" in text
    assert "Means over 14 tasks and, of each, 3 networks" in text


def test_a_file_without_marks(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("no marks")
    with pytest.raises(ValueError, match="must hold <!-- results: begin --> once"):
        replace_section(readme, "new")


def test_rows_without_numbers_are_left_out():
    results = small(2, ensemble=["dale", "block"])
    values = np.full((2, 2, 3, 2), np.nan)
    values[..., 0], values[:, 1, :, 1] = 0.5, 0.25
    values[1, 0, :, 0] = np.nan  # of one task only
    results["results"][:] = values
    errors, scores = section(results).split("\n\n")[:2]
    assert len(errors.splitlines()) == 4 and len(scores.splitlines()) == 3
    assert "**0.25** |" in scores and errors.count("**0.50**") == 3
    assert "| – |" in errors and len({line.count("|") for line in errors.splitlines()}) == 1
