"""Calibration of refined draws: what is right is found to be, what is wrong is told, and runs go on."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import xarray as xr

from neurosde import simulate_rate_network
from neurosde.cli import main
from neurosde.datasets.ensembles import Gaussian
from neurosde.evaluation import refined_calibration as module
from neurosde.evaluation.posterior_benchmark import ensemble_of
from neurosde.evaluation.refined_calibration import (
    RefinedCalibration,
    held_out_score,
    markdown_table,
    refined_calibration,
)
from neurosde.models import CFGPosterior, GaussianPosterior, load_prior

D = torch.float64


@pytest.fixture(scope="module")
def base():
    return CFGPosterior.from_pretrained("base")


def exact_then_wrong(posterior, name, statistics, c, seed):
    """Draws of the exact Gaussian posterior, and of one half as wide about half its mean."""
    exact = [GaussianPosterior.from_statistics(one, c.noise_std, 1.0 / c.N) for one in statistics]
    draws = torch.stack([one.sample((c.draws,), seed + k) for k, one in enumerate(exact)], 1)
    return [(draws, 1.0), (0.5 * draws, 2.0)]


@pytest.mark.slow
def test_what_is_exact_and_what_is_not(base, monkeypatch, tmp_path):
    """Gaussian weights of gain 1, for which the exact posterior is calibrated."""
    monkeypatch.setattr(module, "_refined", exact_then_wrong)
    monkeypatch.setattr(module, "ensemble_of", lambda posterior, name, gains: Gaussian(1.0))
    c = RefinedCalibration(families=("gaussian",), N=5, networks=200, draws=19, length=60)
    results = refined_calibration(base, c, tmp_path / "rows.nc")
    cell = results.isel(ensemble=0)
    before, after = (module.calibration(cell.sel(stage=stage)) for stage in ("before", "after"))
    assert before["p"] > 1e-3 > after["p"] and before["tarp"] < 1.5 * before["tarp_null"] < after["tarp"]
    assert abs(before["coverage_90"] - 0.9) < 0.02 and after["coverage_90"] < 0.75
    assert (1 - after["contraction"]) == pytest.approx(0.25 * (1 - before["contraction"]))
    score = cell["score"].mean("network")
    # Both miss what is not known of W.
    assert float(score.sel(stage="after")) < float(score.sel(stage="before")) < 0
    difference = cell["score"].sel(stage="before") - cell["score"].sel(stage="after")
    assert float(difference.mean()) > 3 * float(difference.std(ddof=1)) / math.sqrt(200)
    norm = cell["norm"].sel(stage="before")
    # ‖W‖ of a draw and of the truth have one law, whose spread is about 1/√(2·25): E[a/b] = 1 + its variance.
    assert abs(float(norm.mean()) - 1 / 50) < 4 * float(norm.std(ddof=1)) / math.sqrt(200) + 1 / 50


def test_the_score_of_the_truth_is_zero_and_of_others_what_they_are_off_by():
    N, scale = 4, 0.3 * math.sqrt(0.1) / 0.1
    W = torch.randn(N, N, dtype=D)
    _, h = simulate_rate_network(W, torch.randn(N, dtype=D), 4000, 0.1, 1.0, noise_std=0.3, return_h=True, generator=0)
    assert held_out_score(W[None], W, h, 0.1, scale) == 0
    off = W + 0.5 * torch.randn(N, N, dtype=D)
    shift = h[:-1].tanh() @ (off - W).mT / scale
    # −½ E(z − δ)² + ½ E z² = −½ δ², of 4 × 3999 residuals whose product with δ is noise.
    error = float((shift.square().mean() / shift.numel()).sqrt())
    assert abs(held_out_score(off[None], W, h, 0.1, scale) + 0.5 * float(shift.square().mean())) < 4 * error
    both = held_out_score(torch.stack([W, off]), W, h, 0.1, scale)
    assert held_out_score(off[None], W, h, 0.1, scale) < both < 0


@pytest.mark.slow
def test_the_command_goes_on_where_it_was_cut_short(base, tmp_path, capsys, monkeypatch):
    out = tmp_path / "rows.nc"
    options = [
        "--N",
        "6",
        "--families",
        "dale",
        "sparse",
        "--networks",
        "2",
        "--draws",
        "4",
        "--length",
        "30",
        "--batch",
        "1",
    ]
    command = ["benchmark", "refined", *options, "--sweeps", "8", "--steps", "4", "--out", str(out)]
    found, calls = module._refined, []

    def cut_short(*arguments):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(arguments[1])
        return found(*arguments)

    monkeypatch.setattr(module, "_refined", cut_short)
    assert main(command) == 130
    with xr.open_dataset(out) as rows:
        assert int(rows["score"].notnull().all("stage").sum()) == 3
        kept = rows["norm"].load()
    monkeypatch.setattr(module, "_refined", lambda *arguments: calls.append(arguments[1]) or found(*arguments))
    assert main(command) == 0
    assert calls == ["dale"] * 2 + ["sparse"] * 2
    said = capsys.readouterr().out
    with xr.open_dataset(out) as rows:
        assert markdown_table(rows) in said and said.count("| dale |") == 2
        assert not any(bool(rows[name].isnull().any()) for name in rows.data_vars)
        assert kept.where(kept.notnull(), rows["norm"]).equals(rows["norm"])
        whole = rows.load()
    again = RefinedCalibration(
        families=("dale", "sparse"), N=6, networks=2, draws=4, length=30, sweeps=8, steps=4, batch=1
    )
    fresh = refined_calibration(base, again, tmp_path / "fresh.nc", "base")
    for name in ("score", "norm", "rank", "credibility"):
        np.testing.assert_allclose(fresh[name], whole[name], rtol=1e-6)
    assert main([*command, "--seed", "1"]) == 2
    assert "is of another benchmark (seed = 0 there, 1 now)" in capsys.readouterr().err


def test_a_prior_alone_moves_draws_of_the_gaussian_posterior(base, monkeypatch, tmp_path):
    """Two stages more, of networks of the gains that the prior knows; its draws are other than the Gaussian's."""
    found, ensembles = module.simulated, []
    monkeypatch.setattr(
        module, "simulated", lambda one, *rest, **rows: ensembles.append(one) or found(one, *rest, **rows)
    )
    c = RefinedCalibration(families=("sparse",), N=5, networks=2, draws=6, length=40, sweeps=8, steps=4, alone=8)
    results = refined_calibration(base, c, tmp_path / "rows.nc").isel(ensemble=0)
    (ensemble,) = ensembles
    assert ensemble == ensemble_of(base, "sparse", (0.8, 2.0)) != ensemble_of(base, "sparse", ())
    assert results["stage"].values.tolist() == [*module.STAGES, *module.ALONE]
    assert not any(bool(results[name].isnull().any()) for name in results.data_vars)
    gaussian, alone = (results["norm"].sel(stage=stage) for stage in module.ALONE)
    assert bool((gaussian != alone).all()) and markdown_table(results.expand_dims("ensemble")).count("| sparse |") == 4
    _, statistics = found(
        ensemble, 2, 5, 40, trials=2, noise_std=c.noise_std, dt=c.dt,
        generator=torch.Generator().manual_seed(module.network_seed(0, 2, 5, 40)),
    )  # fmt: skip
    prior = load_prior("sparse")
    (draws, _), (refined, _) = module._refined_alone(base, prior, statistics, c, 1)
    assert draws.shape == refined.shape == (6, 2, 5, 5)
    assert not (draws == 0).any() and (refined == 0).any()
    with pytest.raises(ValueError, match="families must be of the ensembles .* got 'all'"):  # a prior has this name
        refined_calibration(base, replace(c, families=("all",)), tmp_path / "other.nc")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"alone": 4}, "alone must be"),
        ({"batch": 0}, "batch must be"),
        ({"N": 1}, "N must be"),
        ({"networks": 1}, "networks must be"),
        ({"sweeps": 2}, "sweeps must be"),
        ({"length": 2}, "length must be"),
    ],
)
def test_bad_input_says_what_was_expected(options, match):
    with pytest.raises(ValueError, match=match):
        RefinedCalibration(**options)
