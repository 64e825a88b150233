"""Benchmarks that were cut short go on after the last row, and end as if they had not been."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import xarray as xr

from neurosde.evaluation import exact_benchmark, posterior_benchmark, refinement_benchmark
from neurosde.evaluation.kept_rows import KeptRows
from neurosde.models.denoiser import PRESETS, PairNetwork
from neurosde.models.diffusion_cfg import CFGPosterior, PosteriorConfig
from neurosde.models.model_files import model_digest, model_label
from neurosde.provenance import config_json

FAMILIES = ("gaussian", "sparse")


def empty(**config):
    values = {"error": (("place", "method", "network"), np.full((2, 3, 4), np.nan)), "size": ("place", [math.nan] * 2)}
    return xr.Dataset(values, attrs={"config": config_json(config)})


def test_rows_are_kept_and_the_rest_is_missing(tmp_path):
    rows = ("place", "method")
    kept = KeptRows(empty(seed=1), rows, tmp_path / "rows.nc")
    assert not (tmp_path / "rows.nc").exists()
    kept.add({"error": torch.arange(4.0), "size": 7.0}, place=1, method=2)
    kept.add({}, place=0, method=0)  # of a method that had nothing to say
    again = KeptRows(empty(seed=1), rows, tmp_path / "rows.nc")
    xr.testing.assert_identical(again.results, kept.results)
    done = {
        (place, method) for place in range(2) for method in range(3) if not again.missing(place=place, method=method)
    }
    assert done == {(1, 2), (0, 0)}
    assert again.results["error"][1, 2].values.tolist() == [0, 1, 2, 3] and again.results["size"][1] == 7
    assert int(again.results["error"].notnull().sum()) == 4 and int(again.results["size"].notnull().sum()) == 1
    with pytest.raises(ValueError, match=r"rows.nc is of another benchmark \(seed = 1 there, 2 now\); delete it, or"):
        KeptRows(empty(seed=2), rows, tmp_path / "rows.nc")
    with pytest.raises(ValueError, match=r"another benchmark \(other variables\)"):
        KeptRows(empty(seed=1).drop_vars("size"), rows, tmp_path / "rows.nc")
    (tmp_path / "rows.nc").write_text("no netCDF")
    with pytest.raises(ValueError, match=r"is no result of this benchmark .*choose another --out"):
        KeptRows(empty(seed=1), rows, tmp_path / "rows.nc")
    alone = KeptRows(empty(seed=1), rows)
    alone.add({"size": 3.0}, place=0, method=0)
    assert not alone.missing(place=0, method=0)


@pytest.fixture(scope="module")
def untrained():
    torch.manual_seed(0)
    network = PairNetwork(replace(PRESETS["tiny"], families=FAMILIES, recordings=True))
    training = {"ensembles": [{"name": name, "gain": 0.5, "gain_high": 1.5} for name in FAMILIES]}
    return CFGPosterior(network, PosteriorConfig(network.config, 1.0, (5,), 80.0, False, training, gains=(0.5, 2.0)))


def exact(untrained, out):
    c = exact_benchmark.ExactBenchmark(
        sizes=(3,), families=FAMILIES, methods=("exact", "gaussian", "ridge"), length=30, networks=2, draws=16, thin=1
    )
    return exact_benchmark.exact_benchmark(untrained, c, "untrained", out)


def posterior(untrained, out):
    c = posterior_benchmark.PosteriorBenchmark(sizes=(3, 4), lengths=(20,), networks=3, draws=4, steps=3)
    return posterior_benchmark.posterior_benchmark(untrained, c, "untrained", out)


def refinement(_, out):
    c = refinement_benchmark.RefinementBenchmark(
        lengths=(40,), methods=("exact", "mmps", "gibbs"), N=3, rows=2, draws=64, sweeps=16, steps=6
    )
    return refinement_benchmark.refinement_benchmark(c, out)


@pytest.mark.parametrize(
    ("benchmark", "of_a_row", "rows"),
    [
        (exact, (exact_benchmark, "_found"), 6),
        (posterior, (posterior_benchmark, "_cell"), 4),
        (refinement, (refinement_benchmark, "_row"), 6),
    ],
)
def test_a_benchmark_that_was_cut_short_goes_on(benchmark, of_a_row, rows, untrained, tmp_path, monkeypatch):
    whole = benchmark(untrained, None)
    made, calls = getattr(*of_a_row), []

    def cut_short(*arguments):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(arguments)
        return made(*arguments)

    out = tmp_path / "rows.nc"
    monkeypatch.setattr(*of_a_row, cut_short)
    with pytest.raises(KeyboardInterrupt):
        benchmark(untrained, out)
    with xr.open_dataset(out) as there:
        assert int(there["done"].sum()) == 2
    monkeypatch.setattr(*of_a_row, lambda *arguments: calls.append(arguments) or made(*arguments))
    resumed = benchmark(untrained, out)
    assert len(calls) == rows and bool(resumed["done"].all())
    names = [name for name in whole.data_vars if name != "seconds"]
    xr.testing.assert_allclose(resumed[names], whole[names], rtol=1e-6)
    benchmark(untrained, out)
    assert len(calls) == rows


def test_digests_of_models_follow_the_file(tmp_path):
    weights = tmp_path / "posterior.safetensors"
    weights.write_bytes(b"")
    of_nothing = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"  # FIPS 180-4
    assert model_digest(weights, "posterior") == model_digest(tmp_path, "posterior") == of_nothing
    assert model_label(weights, "posterior") == f"{weights} (sha256 e3b0c44298fc1c14)"
    weights.write_bytes(b"abc")
    assert model_digest(weights, "posterior").startswith("ba7816bf8f01cfea")
    with pytest.raises(FileNotFoundError, match="neither a file nor one of the posteriors"):
        model_digest(tmp_path / "none", "posterior")
