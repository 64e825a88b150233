"""Point metrics of matrices for which they are known."""

import numpy as np
import pytest
import scipy.stats

from neurosde.evaluation.recovery import point_metrics, recovery


def sparse(rng, N=40, density=0.3):
    return rng.normal(size=(N, N)) * (rng.random((N, N)) < density)


def test_the_truth_and_nothing_have_the_metrics_that_follow_from_their_definitions():
    W = sparse(np.random.default_rng(0))
    perfect, zero = point_metrics(W, W), point_metrics(0 * W, W)
    assert perfect["edge_auc"] == perfect["sign_accuracy"] == 1 and perfect["singular_value_error"] == 0
    assert zero["edge_auc"] == zero["sign_accuracy"] == 0.5 and zero["singular_value_error"] == 1
    assert point_metrics(-W, W)["sign_accuracy"] == 0 and point_metrics(-W, W)["edge_auc"] == 1
    of_recovery = recovery(-W, W)
    assert {name: point_metrics(-W, W)[name] for name in of_recovery} == of_recovery


def test_edges_are_ranked_as_by_the_test_of_mann_and_whitney():
    rng = np.random.default_rng(1)
    W = sparse(rng)
    estimate = np.round(W + rng.normal(size=W.shape), 1)  # with ties
    scores, edges = np.abs(estimate), W != 0
    u = scipy.stats.mannwhitneyu(scores[edges], scores[~edges]).statistic
    assert point_metrics(estimate, W)["edge_auc"] == pytest.approx(u / (edges.sum() * (~edges).sum()), rel=1e-12)
    assert np.isnan(point_metrics(estimate, W + 100)["edge_auc"])


def test_signs_of_noisy_estimates_are_as_often_right_as_the_normal_law_says():
    rng = np.random.default_rng(2)
    W = np.where(sparse(rng, 100) != 0, 1.0, 0.0)
    found = point_metrics(W + rng.normal(size=W.shape), W)["sign_accuracy"]
    chance = scipy.stats.norm.cdf(1)
    assert found == pytest.approx(chance, abs=4 * np.sqrt(chance * (1 - chance) / W.sum()))


def test_singular_values_are_blind_to_rotations_and_eigenvalues_are_matched():
    rng = np.random.default_rng(3)
    W = rng.normal(size=(20, 20))
    Q = np.linalg.qr(rng.normal(size=(20, 20)))[0]
    rotated, similar = point_metrics(Q @ W, W), point_metrics(Q @ W @ Q.T, W)
    assert rotated["singular_value_error"] == pytest.approx(0, abs=1e-12) and rotated["eigenvalue_error"] > 0.05
    assert similar["eigenvalue_error"] == pytest.approx(0, abs=1e-9) and similar["relative_error"] > 1
    diagonal = np.diag([3.0, -2.0, 1.0])
    moved = np.diag([1.5, 3.0, -2.0])  # the best matching moves 1 to 1.5
    assert point_metrics(moved, diagonal)["eigenvalue_error"] == pytest.approx(0.5 / 3 / 3)
    assert point_metrics(moved, diagonal)["singular_value_error"] == pytest.approx(0.5 / np.sqrt(14))


def test_an_estimate_that_is_not_finite_is_named():
    with pytest.raises(ValueError, match="must be finite; got 1"):
        point_metrics(np.array([[np.nan, 0], [0, 1]]), np.eye(2))
