"""Bands of ranks and the local classifier test: right for right posteriors, and not for wrong ones."""

import math

import numpy as np
import pytest
import scipy.stats

from neurosde.evaluation.local_c2st import local_c2st
from neurosde.evaluation.rank_calibration import rank_curves


@pytest.mark.parametrize(("networks", "draws"), [(20, 9), (100, 39), (40, 999)])
def test_curves_of_uniform_ranks_are_within_the_band_as_often_as_it_says(networks, draws):
    rng = np.random.default_rng(0)
    found = rank_curves(rng.integers(draws + 1, size=(1000, networks)), draws, 0.9)
    share = found.inside.mean()
    error = 4 * math.sqrt(0.09 / 1000)
    assert 0.9 - error < share < 0.9 + error + 0.03  # counts are whole: the band is the next wider one
    for alpha in (0.02, 0.1, 0.5):
        assert (found.p <= alpha).mean() < alpha + 4 * math.sqrt(alpha * (1 - alpha) / 1000)
    assert (found.p <= 0.5).mean() > 0.4
    assert len(found.levels) <= 100 and (np.diff(found.upper) >= 0).all()
    # A curve is outside of the band of a level just where its p-value is below what is left of it.
    assert (found.p[found.inside] > 0.1 - 1e-6).all() and (found.p[~found.inside] < 0.1).all()


def test_the_probability_of_a_band_is_that_of_all_outcomes_counted():
    """3 ranks of 0 … 2: 27 outcomes, which are counted."""
    outcomes = np.array(np.meshgrid(*[np.arange(3)] * 3)).reshape(3, -1).T
    found = rank_curves(outcomes, 2, 0.5)
    tails = np.array([
        min(2 * min(scipy.stats.binom(3, z).cdf(c), scipy.stats.binom(3, z).sf(c - 1)) for z, c in
            ((k / 3, (one < k).sum()) for k in (1, 2)))
        for one in outcomes
    ])  # fmt: skip
    np.testing.assert_allclose(found.p, [(tails <= tail + 1e-9).mean() for tail in tails], atol=1e-9)


def test_ranks_of_posteriors_that_are_wrong_leave_the_band():
    rng = np.random.default_rng(1)
    truth = rng.standard_normal(300)
    for spread, shift in ((0.6, 0), (1.6, 0), (1, 0.4)):
        ranks = (shift + spread * rng.standard_normal((99, 300)) < truth).sum(0)
        found = rank_curves(ranks[None], 99)
        assert found.p[0] < 1e-4 and not found.inside[0]


def gaussian_pairs(rng, pairs, wrong):
    """θ ~ N(0, 1), x = θ + noise, posterior N(x/2, ½); where x > 0 and it is wrong its sd is half as large."""
    theta = rng.standard_normal((pairs, 2))
    x = theta + rng.standard_normal((pairs, 2))

    def posterior(x, shape):
        sd = np.where(wrong & (x[..., :1] > 0), 0.5, 1.0) * math.sqrt(0.5)
        return x / 2 + sd * rng.standard_normal(shape)

    where = np.array([[1.5, 0.0], [-1.5, 0.0]])
    return theta, posterior(x, x.shape), x, posterior(where[:, None], (2, 200, 2)), where


def test_the_local_test_is_exact_for_right_posteriors(monkeypatch):
    """Of classifiers that are hardly trained, too, and there with many repeats."""
    monkeypatch.setattr("neurosde.evaluation.perceptrons.STEPS", 41)
    rng = np.random.default_rng(2)
    p = [local_c2st(*gaussian_pairs(rng, 64, False), permutations=9, seed=k).p[0] for k in range(30)]
    # Uniform on 0.1, 0.2, …, 1: blurred within the steps, uniform in [0, 1].
    assert scipy.stats.kstest(np.array(p) - 0.1 * rng.random(30), "uniform").pvalue > 0.001


def test_the_local_test_finds_where_a_posterior_is_wrong():
    found = local_c2st(*gaussian_pairs(np.random.default_rng(3), 2000, True), permutations=19)
    assert found.p[0] == 1 / 20 and found.statistic[0] > 2 * found.null[:, 0].max()
    assert found.statistic[1] < found.statistic[0] / 3
    assert found.null.shape == (19, 2)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="between 0 and 9"):
        rank_curves(np.full((1, 5), 10), 9)
    with pytest.raises(ValueError, match="level must lie"):
        rank_curves(np.zeros((1, 5), int), 9, 1.0)
    good = gaussian_pairs(np.random.default_rng(0), 20, False)
    with pytest.raises(ValueError, match="of one shape"):
        local_c2st(good[0], good[1][:5], *good[2:])
    with pytest.raises(ValueError, match=r"observed_draws must be \(observation, draw, 2\)"):
        local_c2st(*good[:3], good[3][0], good[4])
    with pytest.raises(ValueError, match="at least 16 pairs"):
        local_c2st(*(one[:5] for one in good[:3]), *good[3:])
    with pytest.raises(ValueError, match="finite"):
        local_c2st(np.nan * good[0], *good[1:])
