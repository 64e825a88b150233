"""The priors that come with neurosde, and the benchmarks of trained priors."""

from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr

from neurosde.cli import main
from neurosde.datasets.ensembles import make_ensemble
from neurosde.evaluation.denoising_benchmark import DenoisingBenchmark, denoising_benchmark
from neurosde.models import best_denoiser, load_prior, pretrained_names
from neurosde.models.model_files import PRETRAINED, find_model
from neurosde.models.teachers import Teachers

FAMILIES = ["block", "dale", "gaussian", "low-rank", "sparse"]


def test_there_is_one_for_each_ensemble_with_its_card_and_they_are_small():
    assert pretrained_names() == ["all", *FAMILIES]
    assert sorted(path.stem for path in PRETRAINED.glob("*.md")) == pretrained_names()
    assert sum(path.stat().st_size for path in PRETRAINED.rglob("*")) < 12e6
    assert load_prior("all").config.network.families == ("gaussian", "dale", "sparse", "low-rank", "block")


def test_a_folder_is_meant_before_a_model_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "state.safetensors").touch()
    with pytest.raises(FileNotFoundError, match="not trained yet; go on with neurosde train cfg"):
        find_model("base", "posterior")
    (tmp_path / "base" / "prior.safetensors").touch()
    assert find_model("base", "posterior", "prior") == Path("base/prior.safetensors")
    (tmp_path / "state.safetensors").touch()
    with pytest.raises(FileNotFoundError, match="neither a file nor one of the posteriors"):
        find_model("missing", "posterior")


@pytest.mark.parametrize(("name", "N"), [("gaussian", 12), ("sparse", 12), ("low-rank", 12), ("dale", 25)])
def test_they_denoise_nearly_as_well_as_can_be(name, N):
    """At half precision, at an N that was not trained on: two per cent are wanted, and far less was measured."""
    results = denoising_benchmark(
        load_prior(name), DenoisingBenchmark(sizes=(N,), sigmas=(0.003, 0.3, 1.5, 8.0), matrices=16)
    )
    assert float(results["excess"].max()) < 0.02
    assert float(results["best"].max()) < 1.5 and float(results["best"].min()) > 0.1  # of the Gaussian prior's error


@pytest.mark.parametrize("prior", ["dale", "all"])
def test_draws_have_the_variance_of_the_ensemble(prior):
    """The sampling distribution of the mean square over matrices is taken from fresh draws."""
    loaded, count, N = load_prior(prior), 60, 10
    family = "dale" if prior == "all" else None
    drawn = loaded.sample(count, N, family=family, steps=24, generator=0)
    fresh = make_ensemble("dale", 2.0, gain=0.8).sample_weights(count, N, torch.Generator().manual_seed(1))
    squares = [W.square().mean((-1, -2)) for W in (drawn, fresh)]
    error = (sum(float(square.var()) for square in squares) / count) ** 0.5
    assert abs(float(squares[0].mean() - squares[1].mean())) < 4 * error
    wrong = ((drawn > 0).any(-2) & (drawn < 0).any(-2)).sum()
    assert int(wrong) <= 4  # of 600 columns; one in a thousand is wanted, and more than 4 then have the chance 4e-4


def test_sparse_draws_hold_exact_zeros():
    drawn = load_prior("sparse").sample(40, 12, steps=32, generator=0)
    density, error = float((drawn != 0).double().mean()), (0.2 * 0.8 / drawn.numel()) ** 0.5
    assert abs(density - 0.2) < 3 * error  # 1 % of the density is 0.002, the error 0.005


def test_benchmarks_print_tables_and_write_data(tmp_path, capsys):
    out = tmp_path / "denoising.nc"
    command = ["benchmark", "denoising", "all", "--family", "sparse", "--N", "8", "--sigmas", "0.1", "1"]
    assert main([*command, "--matrices", "10", "--out", str(out)]) == 0
    assert "| 8 | " in capsys.readouterr().out
    with xr.open_dataset(out) as results:
        assert results["excess"].dims == ("neurons", "sigma") and np.isfinite(results["excess"]).all()
    out = tmp_path / "sampling.nc"
    command = ["benchmark", "sampling", "sparse", "--N", "6", "--num", "4", "--steps", "4", "--repeats", "2"]
    assert main([*command, "--out", str(out)]) == 0
    assert "4 noise levels, median of 2" in capsys.readouterr().out
    with xr.open_dataset(out) as results:
        assert results["seconds"].shape == (1, 2) and float(results["seconds"].min()) > 0


def test_what_the_best_denoiser_is_not_known_for(capsys):
    with pytest.raises(ValueError, match="known for the ensembles gaussian, sparse, dale, low-rank; got block"):
        best_denoiser(make_ensemble("block"), 1.0)
    assert main(["benchmark", "denoising", "all"]) == 2
    assert "name one of the ensembles" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["gaussian", "sparse", "dale"])
def test_fixed_gains_are_the_limit_of_narrow_ranges(name):
    x, sigma = torch.randn(3, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), torch.tensor(0.7)
    fixed, narrow = (best_denoiser(make_ensemble(name, high, gain=1.2), 1.5) for high in (None, 1.2 * (1 + 1e-7)))
    torch.testing.assert_close(fixed(x, sigma), narrow(x, sigma), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("high", [None, 2.0])
def test_sparse_weights_whose_connections_are_all_there_are_gaussian(high):
    """Of one gain the mean is x v/(v + s²); of a range it is the limit of densities next to 1."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, 5, dtype=torch.float64, generator=generator)
    sigma = torch.tensor([0.1, 0.7, 5.0], dtype=torch.float64)
    full, near = (make_ensemble("sparse", high, gain=1.2, density=density) for density in (1.0, 1 - 1e-9))
    found, teachers = best_denoiser(full, 1.5)(x, sigma), Teachers(("exact",), (full,), 1.5, (5,))
    torch.testing.assert_close(found, best_denoiser(near, 1.5)(x, sigma), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found, teachers.mean(x, sigma, torch.zeros(3, dtype=torch.long)))
    if high is None:
        v = (1.2 / 1.5) ** 2
        torch.testing.assert_close(found, x * (v / (v + sigma.square()))[:, None, None])
