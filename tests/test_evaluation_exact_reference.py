"""Distances to exact posteriors are what they are known to be, of methods that are exact and of ones that are not."""

import math

import numpy as np
import pytest
import scipy.stats
import torch

from neurosde.evaluation import exact_reference as module
from neurosde.evaluation.exact_reference import METRICS, compared_with_exact, exact_reference, ratio_accuracy
from neurosde.evaluation.inference_methods import Inferred, infer_by
from neurosde.evaluation.inference_metrics import METRICS as ALL
from neurosde.evaluation.inference_metrics import MISSING, measured
from neurosde.evaluation.inference_tasks import Task, record
from neurosde.models.gaussian_posterior import GaussianPosterior

SEEDS = (0, 1)


def test_the_exact_posterior_is_as_far_from_itself_as_its_draws_allow():
    task = Task("gaussian", 5, 60)
    found = infer_by("exact", record(task, SEEDS), draws=200, seed=3, simulations=1)
    reference = exact_reference(task, SEEDS)
    rows = compared_with_exact(found.estimate, found.draws, found.densities, reference, 0)
    for row in rows:
        assert set(row) == set(METRICS)
        assert row["to_exact"] < 1e-9 and row["c2st_ratio"] == 0.5
        # Root of a variance of 200 · 25 normal numbers beside one of 512 · 25; one direction may have most of it.
        assert row["sd_ratio"] == pytest.approx(1, abs=4 * math.sqrt(1 / 200 + 1 / 512) / math.sqrt(2 * 5))
        # Each row's divergence varies like ½ χ² of N (N + 3)/2 parameters over 200 draws.
        spread = math.sqrt(2 * 20) / 2 / 200 / 5 * math.sqrt(1 / 5) * (1 + 200 / 512)
        assert row["kl"] == pytest.approx(row["kl_floor"], abs=5 * spread)
        # 400 draws, of which four fifths teach and each is asked about once: within 4 binomial standard errors.
        assert all(abs(row[name] - 0.5) < 4 * 0.5 / math.sqrt(400) for name in ("c2st_mlp", "c2st_forest"))


def test_a_shifted_posterior_is_told_as_well_as_its_shift_allows():
    """Of two normal laws that are d standard deviations apart the best classifier is right with chance Φ(d/2)."""
    task = Task("gaussian", 5, 60)
    (exact, *_), d = exact_reference(task, SEEDS).densities, 1.3
    shift = torch.zeros(5, 5, dtype=torch.float64)
    shift[2] = d * exact.factor[:, 1]  # one standard deviation along one direction of one row, d times
    other = GaussianPosterior(exact.mean + shift, exact.directions, exact.direction_sd, exact.prior_variance, 0.3)
    error = 0.5 / math.sqrt(2 * module.RATIO_DRAWS)
    assert ratio_accuracy(exact, other) == pytest.approx(scipy.stats.norm.cdf(d / 2), abs=4 * error)
    assert ratio_accuracy(exact, exact) == 0.5
    far = exact.mean + 40 * exact.sd
    row = compared_with_exact(
        torch.stack([far, far]), torch.stack([other.sample((40,), 0) + 40 * exact.sd] * 2, 1), None,
        exact_reference(task, SEEDS), 0,
    )[0]  # fmt: skip
    assert row["c2st_mlp"] == row["c2st_forest"] == 1 and row["kl"] > 100 and "c2st_ratio" not in row
    assert row["to_exact"] == pytest.approx(float((far - exact.mean).norm() / exact.mean.norm()))


def test_only_where_the_exact_posterior_is_known_is_there_one(monkeypatch):
    assert exact_reference(Task("dale", 6, 20), SEEDS) is None and exact_reference(Task("block", 6, 20), SEEDS) is None
    assert exact_reference(Task("sparse", module.LARGEST + 1, 20), SEEDS) is None
    assert exact_reference(Task("gaussian", module.LARGEST + 1, 20), SEEDS).known.all()
    assert exact_reference(Task("sparse", 5, 20), SEEDS).known.all()  # summed over all supports
    monkeypatch.setattr(module, "DISAGREEMENT", 0.0)  # which no chains keep to
    task = Task("low-rank", 5, 20)
    reference = exact_reference(task, (5, 6))
    assert not reference.known.any() and reference.densities is None
    recorded = record(task, (5, 6))
    found = measured(infer_by("exact", recorded, draws=12, seed=0, simulations=1), recorded, 0)
    assert not set(METRICS) & set(found) and "crps" in found and set(METRICS) <= set(ALL) and set(MISSING) <= set(ALL)


def test_few_draws_have_no_classifier_and_no_divergence():
    task = Task("gaussian", 4, 30)
    for draws, present in ((6, False), (10, True)):
        found = infer_by("prior", record(task, SEEDS), draws=draws, seed=0, simulations=1)
        row = compared_with_exact(found.estimate, found.draws, found.densities, exact_reference(task, SEEDS), 0)[0]
        assert np.isfinite(row["kl"]) == present and ("c2st_mlp" in row) == present
        assert row["c2st_ratio"] > 0.9 and row["sd_ratio"] > 1  # of the prior, whose density is known


def test_residuals_of_right_posteriors_look_like_noise_and_of_others_do_not(monkeypatch):
    monkeypatch.setattr("neurosde.evaluation.inference_metrics.exact_reference", lambda *_: None)  # for speed
    recorded = record(Task("gaussian", 6, 200), tuple(range(6)))
    right = measured(infer_by("exact", recorded, draws=16, seed=0, simulations=1), recorded, 0)
    # Medians of normal numbers, of eight checks and six networks.
    assert max(right["misfit"]) < scipy.stats.norm.isf(1e-4 / 48 / 2)
    prior = measured(infer_by("prior", recorded, draws=16, seed=0, simulations=1), recorded, 0)
    assert min(prior["misfit"]) > 5
    assert "misfit" not in measured(Inferred(recorded.weights), recorded, 0)


def test_dynamics_of_draws_that_are_the_truth_are_those_of_the_truth():
    recorded = record(Task("gaussian", 6, 30), SEEDS)
    same = measured(Inferred(0 * recorded.weights, recorded.weights.expand(4, -1, -1, -1)), recorded, 0)
    # Exponents start from voltages of their own; on their way to a rest or a cycle they differ like 1/time.
    np.testing.assert_allclose(same["lyapunov_error"], 0, atol=1 / 200)
    np.testing.assert_allclose(same["fixed_point_distance"], 0, atol=1e-12)
