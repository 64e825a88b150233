"""Inference by the trained posterior that comes with neurosde."""

import json
import math

import arviz_base
import numpy as np
import pytest
import scipy.stats
import torch
import xarray as xr

from neurosde.cli import main
from neurosde.datasets.ensembles import make_ensemble
from neurosde.datasets.generation import generate_activity_trials
from neurosde.datasets.recordings import Recording
from neurosde.evaluation.calibration import holm, projections
from neurosde.evaluation.rank_calibration import uniformity
from neurosde.evaluation.recovery import recovery
from neurosde.likelihood import transition_statistics
from neurosde.models import CFGPosterior, GaussianPosterior, InferenceConfig, infer, open_posterior, pretrained_names
from neurosde.models.empirical_bayes import ridge
from neurosde.models.model_files import PRETRAINED

SIGMA, DT = 0.3, 0.1


@pytest.fixture(scope="module")
def base():
    return CFGPosterior.from_pretrained("base")


def recordings(name, count, N, T=100, seed=0, gain=0.3, high=3.0):
    W = make_ensemble(name, high, gain=gain).sample_weights(count, N, torch.Generator().manual_seed(seed))
    statistics = []
    for k, weights in enumerate(W):
        _, h = generate_activity_trials(weights, 2, T, DT, noise_std=SIGMA, generator=1000 * seed + k, return_h=True)
        statistics.append(transition_statistics(voltage=h, dt=DT))
    return W, statistics


def errors(estimates, W):
    return np.array(
        [recovery(one.numpy(), true.numpy())["relative_error"] for one, true in zip(estimates, W, strict=True)]
    )


def test_there_is_one_with_its_card():
    assert pretrained_names("posterior") == ["base"] and (PRETRAINED / "posterior" / "base.md").is_file()


@pytest.mark.parametrize(("name", "share"), [("dale", 0.75), ("sparse", 0.9)])
def test_it_knows_more_than_ridge(base, name, share):
    """At an N that it was not trained on, and not told the ensemble: less than `share` of ridge's error."""
    W, statistics = recordings(name, 30, 30, gain=0.8, high=2.0)
    ours = errors(base.condition(statistics, noise_std=SIGMA).mean, W)
    theirs = errors([ridge(one) for one in statistics], W)
    gained = share * theirs - ours
    assert gained.mean() > 3 * gained.std(ddof=1) / math.sqrt(30)


def test_it_knows_no_less_of_gaussian_weights_than_can_be_known(base):
    """Not told that they are Gaussian; the exact posterior is told the gain as well."""
    W, statistics = recordings("gaussian", 30, 20, gain=1.2, high=1.2)
    exact = [GaussianPosterior.from_statistics(one, SIGMA, 1.2**2 / 20).mean for one in statistics]
    ours, theirs = errors(base.condition(statistics, noise_std=SIGMA).mean, W), errors(exact, W)
    assert float(np.mean(ours / theirs)) < 1.03


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gaussian", "dale"])
def test_ranks_of_the_truth_are_uniform(base, family):
    """Simulation-based calibration, told the ensemble, whose gains are those of the training.

    Of a wrong width, a quadratic component of ranks, ranks among L draws keep L(L − 1)/((L + 2)(L + 3)): 120 networks
    of 7 draws tell it as 82 of 15 do.
    """
    W, statistics = recordings(family, 120, 6, seed=3)
    draws = base.condition(statistics, noise_std=SIGMA, family=family).sample((7,), generator=0).numpy()
    directions = np.random.default_rng(0).standard_normal((4, 6, 6))
    ranks = (projections(draws, directions) < projections(W.numpy(), directions)[:, None]).sum(1)
    assert holm(uniformity(ranks, 7)).min() > 1e-3


def test_relabelling_the_neurons_relabels_the_posterior(base):
    _, (statistics,) = recordings("dale", 1, 9)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    moved = statistics.__class__(
        **vars(statistics)
        | {name: getattr(statistics, name)[order][:, order] for name in ("xx", "yx")}
        | {name: getattr(statistics, name)[order] for name in ("x", "y", "yy")}
    )
    means = [base.condition(one, noise_std=SIGMA).mean for one in (statistics, moved)]
    # The noise at σ_max = 80 is another one for each neuron then: of little weight.
    torch.testing.assert_close(means[1], means[0][order][:, order], rtol=0.02, atol=0.01)


def test_it_tells_ensembles_apart(base):
    for name in ("dale", "sparse"):
        _, statistics = recordings(name, 20, 20, T=500, gain=1.0, high=2.0)
        probabilities = base.condition(statistics, noise_std=SIGMA).family_probabilities
        total = sum(probabilities.values())
        torch.testing.assert_close(total, torch.ones(20, dtype=total.dtype), rtol=1e-5, atol=1e-5)
        assert float(probabilities[name].mean()) > 0.8


def test_the_command(tmp_path, capsys):
    cube, out = tmp_path / "data" / "cube.nc", tmp_path / "posterior.nc"
    build = ["build-dataset", "--out-dir", str(cube.parent), "--num-networks", "2", "--N", "10", "--num-trials", "3"]
    assert main([*build, "--T", "120", "--ensemble", "dale", "--noise-std", "0.3", "--seed", "1"]) == 0
    infer_it = ["infer", str(cube), "--network", "1", "--method", "cfg", "--draws", "24", "--steps", "12"]
    assert main([*infer_it, "--predictive-draws", "4", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "probability of each ensemble: dale" in said and "Posterior (cfg, 24 draws" in said
    tree = open_posterior(out)
    assert tree["posterior"]["weights"].shape == (1, 24, 10, 10) and "recording_log_likelihood" in tree["sample_stats"]
    assert set(json.loads(tree.attrs["residual_checks"])) >= {"whiteness", "stationarity"}
    assert len(arviz_base.convert_to_datatree(tree).children)
    assert main(["evaluate", str(out), "--truth", str(cube), "--out-dir", str(tmp_path / "report")]) == 0
    said = capsys.readouterr().out
    assert "point estimate (cfg)" in said and "coverage_90" in said
    assert "whitened_variance" not in said and "truth_chi2" not in said  # of the Gaussian posterior, a baseline here
    with xr.open_dataset(tmp_path / "report" / "results.nc") as results:
        table = results["relative_error"].to_series()
    assert table["point estimate (cfg)"] < table["exact Gaussian posterior (evidence)"]
    assert main([*infer_it, "--guidance", "2", "--family", "dale", "--predictive-draws", "0", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "not calibrated" in said and "probability of each ensemble" not in said


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"method": "exact", "guidance": 2.0}, "guidance is for method 'cfg'; got it with 'exact'"),
        ({"method": "ridge", "family": "dale"}, "family is for method 'cfg'"),
        ({"method": "cfg", "steps": 1}, "steps must be"),
        ({"method": "cfg", "guidance": -1.0}, "guidance must be"),
        ({"method": "vae"}, "method must be one of"),
    ],
)
def test_settings_that_cannot_be(options, match):
    with pytest.raises(ValueError, match=match):
        InferenceConfig(**options)


def test_what_it_has_not_seen_is_said():
    W = make_ensemble("gaussian").sample_weights(1, 3, torch.Generator().manual_seed(0))[0]
    x = generate_activity_trials(W, 2, 60, DT, noise_std=SIGMA, generator=0)
    result = infer(
        Recording(x.numpy(), "three", dt=DT), InferenceConfig(method="cfg", draws=4, steps=4, predictive_draws=0)
    )
    assert any("untested at 3" in note for note in result.notes)
    with pytest.raises(ValueError, match="family must be one of"):
        infer(Recording(x.numpy(), "three", dt=DT), InferenceConfig(method="cfg", family="small-world"))


def test_draws_of_the_prior_are_not_held_against_the_recording():
    """Their residuals are no noise, which is no fault of the recording's: warnings are errors here."""
    W = make_ensemble("dale").sample_weights(1, 8, torch.Generator().manual_seed(0))[0]
    x = generate_activity_trials(W, 2, 100, DT, noise_std=SIGMA, generator=0)
    config = InferenceConfig(method="cfg", noise_std=SIGMA, draws=4, steps=4, predictive_draws=0, guidance=0.0)
    found = infer(Recording(x.numpy(), "prior", dt=DT), config)
    assert found.checks == () and any("guidance = 0 draws from the prior" in note for note in found.notes)


def test_it_fits_a_given_gain_and_family_exactly(base):
    """Gaussian weights of known gain: nothing is left to the network, and draws are the exact posterior's."""
    _, (statistics,) = recordings("gaussian", 1, 10, gain=1.3, high=1.3)
    posterior = base.condition(statistics, noise_std=SIGMA, gain=1.3, family="gaussian")
    exact = GaussianPosterior.from_statistics(statistics, SIGMA, 1.3**2 / 10)
    torch.testing.assert_close(posterior.mean, exact.mean, rtol=1e-8, atol=1e-8)
    whitened = exact.whiten(posterior.sample((100,), generator=0))  # 10 000 numbers
    assert scipy.stats.kstest(whitened.flatten().numpy(), "norm").pvalue > 1e-3
