"""The benchmark of refiners: what is exact is found to be, and what is not is told from it."""

import math

import numpy as np
import pytest
import xarray as xr

from neurosde.cli import main
from neurosde.evaluation import refinement_benchmark as module
from neurosde.evaluation.refinement_benchmark import RefinementBenchmark, markdown_table, refinement_benchmark


def test_of_a_gaussian_prior_the_exact_methods_are_exact():
    c = RefinementBenchmark(
        priors=("gaussian",), lengths=(60,), N=3, rows=3, draws=1000, sweeps=60, steps=8,
        methods=("exact", "pigdm", "mmps", "gibbs", "tds", "dps"),
    )  # fmt: skip
    found = refinement_benchmark(c).squeeze(["prior", "times"])
    exact = found.sel({"method": ["exact", "pigdm", "mmps", "gibbs", "tds"]})
    # An accuracy of ½ over 2000 draws, three rows; ratios of two variances of 1000 draws each, the most extreme of 9.
    np.testing.assert_allclose(exact["c2st"].mean("row"), 0.5, atol=4 * math.sqrt(0.25 / 2000 / 3))
    assert float(exact["least_variance"].min()) > 1 - 5 * math.sqrt(4 / 1000)
    assert float(exact["largest_variance"].max()) < 1 + 5 * math.sqrt(4 / 1000)
    assert not float(found["c2st"].sel({"method": "dps"}).mean()) < 0.55  # biased, or diverged
    assert (
        found["evaluations"].sel({"method": "gibbs"}) == 60 * 16 and found["evaluations"].sel({"method": "exact"}) == 0
    )


def test_of_sparse_weights_guidance_is_told_from_the_exact_posterior():
    c = RefinementBenchmark(
        priors=("sparse",),
        lengths=(100,),
        N=4,
        rows=4,
        draws=1000,
        density=0.4,
        methods=("exact", "mmps", "tds"),
        steps=48,
    )
    found = refinement_benchmark(c).squeeze(["prior", "times"])["c2st"].mean("row")
    error = math.sqrt(0.25 / 2000 / 4)
    assert abs(float(found.sel({"method": "exact"})) - 0.5) < 4 * error < float(found.sel({"method": "mmps"})) - 0.5
    assert abs(float(found.sel({"method": "tds"})) - 0.5) < 4 * error


def test_the_command(tmp_path, capsys, monkeypatch):
    def diverging(method, denoise, start, evidence, c):
        return None if method == "dps" else (start, 7)

    monkeypatch.setattr(module, "_refined", diverging)
    out = tmp_path / "refinement.nc"
    options = ["--N", "2", "--rows", "1", "--draws", "16", "--lengths", "50", "--methods", "dps", "gibbs"]
    assert main(["benchmark", "refinement", *options, "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert said.count("| DPS, likelihood gradient | diverged |") == 2 and "split Gibbs" in said
    with xr.open_dataset(out) as results:
        assert (
            np.isnan(results["c2st"].sel({"method": "dps"})).all()
            and (results["evaluations"].sel({"method": "gibbs"}) == 7).all()
        )
        assert markdown_table(results) in said


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"N": 12}, "N must be at most 10"),
        ({"N": 3, "rows": 4}, "rows must be at most N = 3; got 4"),
        ({"draws": 1001}, "multiple of"),
        ({"methods": ("vae",)}, "methods must be of"),
        ({"priors": ("dale",)}, "priors must be of gaussian, sparse; got dale"),
    ],
)
def test_bad_input_says_what_was_expected(options, match):
    with pytest.raises(ValueError, match=match):
        RefinementBenchmark(**options)
