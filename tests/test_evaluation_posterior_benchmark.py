"""Calibration of posteriors over weights, and the benchmark of trained ones."""

import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
import xarray as xr

from neurosde.cli import main
from neurosde.evaluation.calibration import coverage_error, expected_coverage, holm, in_any_order, projections, ranks
from neurosde.evaluation.rank_calibration import uniformity
from neurosde.models.denoiser import PRESETS, PairNetwork
from neurosde.models.diffusion_cfg import CFGPosterior, PosteriorConfig


def normal_posteriors(networks, draws, spread=1.0, N=3, seed=0):
    """Truths N(m, 1) about known means, and draws from N(m, spread²)."""
    rng = np.random.default_rng(seed)
    mean = 2 * rng.standard_normal((networks, N, N))
    truth = mean + rng.standard_normal(mean.shape)
    return truth, mean + spread * rng.standard_normal((draws, *mean.shape)), np.roll(truth, 1, axis=0)


def test_ranks_of_a_right_posterior_are_uniform_and_of_wrong_ones_are_not():
    directions = np.random.default_rng(1).standard_normal((2, 3, 3))
    found = {}
    for spread in (0.7, 1.0, 1.4):
        truth, draws, _ = normal_posteriors(600, 39, spread)
        found[spread] = holm(uniformity(ranks(draws, truth, directions), 39)).min()
    assert found[1.0] > 0.01 and found[0.7] < 1e-6 and found[1.4] < 1e-6


def test_ranks_of_weights_that_are_often_zero_are_uniform():
    rng = np.random.default_rng(2)
    both = rng.standard_normal((40, 600, 2, 2)) * (rng.random((40, 600, 2, 2)) < 0.3)
    found = ranks(both[1:], both[0], rng.standard_normal((2, 2, 2)))
    assert holm(uniformity(found, 39)).min() > 0.01


def test_p_values_of_uniform_ranks_are_uniform():
    drawn = np.random.default_rng(0).integers(64, size=(400, 500))
    assert scipy.stats.kstest(uniformity(drawn, 63), "uniform").pvalue > 0.01


def test_holm_by_hand():
    assert holm(np.array([0.04, 0.01, 0.03])).tolist() == pytest.approx([0.06, 0.03, 0.06])
    assert holm(np.array([0.9, 0.8])).tolist() == [1.0, 1.0]


def test_features_by_hand():
    W = np.array([[3.0, 0.0], [0.0, -4.0]])
    found = projections(W[None], np.array([[[1.0, 2.0], [3.0, 4.0]]]))
    assert found[:, 0].tolist() == pytest.approx([3 - 16, 5, 4, -0.25, -1])


def test_expected_coverage_is_that_of_the_level():
    errors = {}
    for spread in (0.5, 1.0, 2.0):
        truth, draws, references = normal_posteriors(1500, 100, spread)
        errors[spread] = coverage_error(expected_coverage(draws, truth, references))
    # Of uniform credibilities the mean error is below 0.6/√n with a probability above 0.95.
    assert errors[1.0] < 0.6 / math.sqrt(1500) + 1 / 200 and min(errors[0.5], errors[2.0]) > 0.04
    assert coverage_error(np.linspace(0, 1, 1001)) < 1e-3 and coverage_error(np.zeros(10)) == pytest.approx(
        0.5, abs=1e-3
    )


def test_networks_numbered_by_kind_are_judged_in_any_order():
    """Draws of what is known without a recording, which columns excite being open; in truths it is the first half."""
    networks, N, S = 1500, 6, 39
    rng = np.random.default_rng(0)
    sizes = np.abs(rng.standard_normal((S + 1, networks, N, N)))
    signs = np.sign(np.arange(N) - N / 2 + 0.5)
    drawn = rng.permuted(np.tile(signs, (S, networks, 1)), axis=-1)
    draws, truth = sizes[1:] * drawn[:, :, None, :], sizes[0] * signs
    shuffled, shuffled_truth = in_any_order(draws, truth, 1)
    errors = [
        coverage_error(expected_coverage(d, t, np.roll(t, 1, axis=0)))
        for d, t in ((draws, truth), (shuffled, shuffled_truth))
    ]
    assert errors[0] > 0.1 and errors[1] < 0.6 / math.sqrt(networks) + 1 / (2 * S)
    directions = rng.standard_normal((2, N, N))
    p_values = [
        holm(uniformity(ranks(*both, directions), S)).min() for both in ((draws, truth), (shuffled, shuffled_truth))
    ]
    assert p_values[0] < 1e-6 and p_values[1] > 0.01
    k = 7  # one order for all of a network: what does not depend on it stays as it is
    along = projections(np.stack([draws[0, k], truth[k]]), directions)[2:]
    assert projections(np.stack([shuffled[0, k], shuffled_truth[k]]), directions)[2:] == pytest.approx(along)
    assert not np.array_equal(np.sign(shuffled_truth[k]), np.sign(shuffled_truth[k + 1]))
    both, one = in_any_order(truth[None], truth, 3)
    assert np.array_equal(both[0], one)


def test_the_benchmark_prints_tables_and_writes_data(tmp_path, capsys):
    """An untrained network: the Gaussian posterior, which is exact but for the gain for the Gaussian ensemble."""
    kinds = [{"name": name, "gain": 0.8, "gain_high": 2.0} for name in ("gaussian", "dale")]
    config = replace(PRESETS["tiny"], families=("gaussian", "dale"), recordings=True)
    model = CFGPosterior(PairNetwork(config), PosteriorConfig(config, 1.5, (4, 8), training={"ensembles": kinds}))
    model.save(tmp_path / "posterior.safetensors")
    out = tmp_path / "benchmark.nc"
    command = [
        "benchmark",
        "posterior",
        str(tmp_path),
        "--N",
        "5",
        "--lengths",
        "40",
        "--networks",
        "20",
        "--draws",
        "9",
    ]
    assert main([*command, "--steps", "4", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "| gaussian | 5 | 40 |" in text and "| 5 | 40 |" in text and "20 networks per row" in text
    with xr.open_dataset(out) as results:
        assert results["cfg"].dims == ("ensemble", "neurons", "times", "network")
        assert results["rank"].sizes == {
            "ensemble": 2, "neurons": 1, "times": 1, "informed": 2, "feature": 8, "network": 20
        }  # fmt: skip
        both = results[["cfg", "gaussian"]].mean("network")
        np.testing.assert_allclose(both["cfg"], both["gaussian"], rtol=0.1)
        assert int(results["rank"].min()) >= 0 and int(results["rank"].max()) <= 9
    assert main([*command, "--families", "block", "--out", str(out)]) == 2
    assert "families must be of the ensembles ['dale', 'gaussian']" in capsys.readouterr().err
