"""The README's results are regenerated from a cube of results."""

import numpy as np
import pytest
import xarray as xr

from neurosde.cli import main
from neurosde.evaluation import results_section
from neurosde.evaluation.results_section import BEGIN, END, replace_section, section
from neurosde.evaluation.timing import machine

TASK = "dale-N10-T100x2-g1.5-sigma0.3"


@pytest.mark.slow
def test_section_and_gallery(tmp_path, monkeypatch):
    """Numbers are those of the cube, the least error is bold, and all four figures are drawn and shown."""
    options = ["--tasks", TASK, "--networks", "3", "--draws", "8", "--methods", "ridge", "prior", "gaussian"]
    assert main(["benchmark", "inference", *options, "--out", str(tmp_path / "results")]) == 0
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}\nformer\n{END}\nafter\n", encoding="utf-8")
    full = results_section.gallery

    def small(results, folder):
        full(results, folder, N=6, T=60, networks=12)

    monkeypatch.setattr(results_section, "gallery", small)
    assert results_section.main([str(tmp_path / "results"), str(readme), str(tmp_path / "examples" / "gallery")]) == 0
    text = readme.read_text(encoding="utf-8")
    assert text.startswith("before\n") and text.endswith("after\n") and "former" not in text
    with xr.open_dataset(tmp_path / "results" / "results.nc") as results:
        errors = results["results"].sel({"metric": "relative_error"})[0].mean("network")
        least = errors["method"].values[errors.to_numpy().argmin()]
        assert f"**{float(errors.min()):.2f}**" in text and least != "prior"
        assert f"{float(errors.sel({'method': 'prior'})):.2f} ± " in text
    for name in ("weights", "spectrum", "calibration", "cost"):
        assert f"(examples/gallery/{name}.png)" in text
        assert (tmp_path / "examples" / "gallery" / f"{name}.png").stat().st_size > 5000


def test_a_file_without_marks(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("no marks")
    with pytest.raises(ValueError, match="must hold <!-- results: begin --> once"):
        replace_section(readme, "new")


def test_rows_without_numbers_are_left_out():
    metrics = list(results_section.TABLES)
    values = np.full((1, 2, 4, len(metrics)), np.nan)
    values[..., metrics.index("relative_error")] = 0.5
    values[0, 1, :, metrics.index("energy_score")] = 0.25
    values = np.repeat(values, 2, axis=0)
    values[1, 0, :, metrics.index("relative_error")] = np.nan  # of one task only
    results = xr.Dataset(
        {"results": (("task", "method", "network", "metric"), values)},
        {"task": [TASK, "block" + TASK[4:]], "method": ["ridge", "prior"], "metric": metrics},
        machine(),
    )
    errors, scores = section(results).split("\n\n")[:2]
    assert len(errors.splitlines()) == 4 and len(scores.splitlines()) == 3
    assert "**0.25** ± 0.00" in scores and errors.count("**0.50**") == 3
    assert "| – |" in errors and len({line.count("|") for line in errors.splitlines()}) == 1
