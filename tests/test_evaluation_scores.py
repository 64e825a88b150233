"""Scores and distances of draws from laws for which they are known in closed form."""

import math

import numpy as np
import pytest
import scipy.special
import scipy.stats

from neurosde.evaluation.c2st import c2st
from neurosde.evaluation.scores import crps, energy_score, gaussian_kl, log_score, spread_ratios


def test_the_energy_score_of_a_normal_law_is_that_of_its_closed_form():
    """E|X − w| is the mean of a noncentral χ, by a Laguerre function; E|X − X'| is √2 that of a central one."""
    rng = np.random.default_rng(0)
    w = rng.normal(size=(4, 4))
    d, square = w.size, (w**2).sum()
    off = math.sqrt(math.pi / 2) * scipy.special.eval_genlaguerre(0.5, d / 2 - 1, -square / 2)
    exact = off - 0.5 * math.sqrt(2) * scipy.stats.chi(d).mean()
    # Of few draws, many times: an estimate with 1/S² in place of 1/S(S − 1) would be off by 40 standard errors.
    found = np.array([energy_score(rng.normal(size=(8, 4, 4)), w) for _ in range(2000)]) * math.sqrt(square)
    assert found.mean() == pytest.approx(exact, abs=4 * found.std() / math.sqrt(len(found)))
    assert energy_score(np.zeros((3, 4, 4)), w) == pytest.approx(1)
    assert energy_score(np.stack([w] * 3), w) == 0


def test_the_energy_score_is_best_for_the_right_posterior():
    rng = np.random.default_rng(1)
    truths = rng.normal(size=(400, 5, 5))
    z = rng.normal(size=(100, 5, 5))
    scores = {scale: np.array([energy_score(scale * z, w) for w in truths]) for scale in (0.5, 1.0, 2.0)}
    for wrong in (0.5, 2.0):
        gap = scores[wrong] - scores[1.0]
        assert gap.mean() > 4 * gap.std() / math.sqrt(len(gap))


def test_the_ranked_probability_score_of_a_normal_law_is_that_of_its_closed_form():
    rng = np.random.default_rng(2)
    w = rng.normal(size=(3, 3))
    normal = scipy.stats.norm
    exact = w * (2 * normal.cdf(w) - 1) + 2 * normal.pdf(w) - 1 / math.sqrt(math.pi)
    found = np.stack([crps(rng.normal(size=(5, 3, 3)), w) for _ in range(4000)])
    assert np.abs((found.mean(0) - exact) / (found.std(0) / math.sqrt(len(found)))).max() < 4
    one = rng.normal(size=(6, 3, 3))  # against the definition
    pairs = np.abs(one[:, None] - one).sum((0, 1)) / 30
    np.testing.assert_allclose(crps(one, w), np.abs(one - w).mean(0) - pairs / 2, rtol=1e-12)


def test_the_log_score_of_normal_and_of_sparse_weights_is_near_their_densities():
    rng = np.random.default_rng(3)
    N, S, r = 30, 4000, 0.05
    truth = rng.normal(size=(N, N))
    # Expected log density of N(0, 1 + r²) at its own draws; a kernel of variance h² loses of the order h⁴ of it.
    found, entropy = log_score(rng.normal(size=(S, N, N)), truth, r), 0.5 * math.log(2 * math.pi * math.e * (1 + r**2))
    assert found.mean() == pytest.approx(-entropy, abs=4 * math.sqrt(0.5) / N + 0.02)
    spike = np.zeros((N, N))
    draws = rng.normal(size=(S, N, N)) * (rng.random((S, N, N)) < 0.2)
    found = log_score(draws, spike, r, seed=1)
    noise = r * np.random.default_rng(1).standard_normal((N, N))
    density = 0.8 * scipy.stats.norm(0, r).pdf(noise) + 0.2 * scipy.stats.norm(0, math.sqrt(1 + r**2)).pdf(noise)
    # The share of draws in the spike has a binomial error, of all 900 entries by itself.
    assert found.mean() == pytest.approx(np.log(density).mean(), abs=4 * math.sqrt(0.25 / S) / N + 0.005)
    normal = log_score(draws.std(0) * rng.normal(size=(S, N, N)), spike, r, seed=1)
    assert found.mean() > normal.mean() + 1  # a normal law of the same variance knows no spike


def test_ratios_of_spread_find_the_direction_that_is_wrong():
    rng = np.random.default_rng(4)
    S, N = 4000, 6
    directions = np.linalg.qr(rng.normal(size=(2, N, N)))[0]
    sd = np.linspace(0.1, 1, N)
    exact, found = (rng.normal(size=(S, 2, N, N)) * sd for _ in range(2))
    found[..., 0] *= 2
    found[..., 3] /= 2
    ratios = spread_ratios(*(part @ directions.mT for part in (found, exact)), directions)
    error = 4 * 2 * math.sqrt(1 / (S * N))  # of the ratio of two variances, each of S·N numbers, and twice that
    np.testing.assert_allclose(ratios["largest_variance"], 4, rtol=error)
    np.testing.assert_allclose(ratios["least_variance"], 0.25, rtol=error)
    still = spread_ratios(found, 0 * exact, directions)
    assert all(np.isnan(value).all() for value in still.values())
    scales = np.array([2, 1, 1, 0.5, 1, 1])
    np.testing.assert_allclose(ratios["sd"], math.sqrt(((sd * scales) ** 2).sum() / (sd**2).sum()), rtol=error)


def test_the_divergence_of_normal_laws_is_that_of_its_closed_form_and_its_floor_is_met():
    rng = np.random.default_rng(5)
    N = 5
    same = [gaussian_kl(rng.normal(size=(40, N, N)), rng.normal(size=(60, N, N))) for _ in range(400)]
    found = np.array([one["kl"] for one in same])
    assert found.mean() == pytest.approx(same[0]["kl_floor"], abs=4 * found.std() / math.sqrt(len(found)))
    S = 20000
    first, second = rng.normal(size=(2, S, N, N))
    A = np.eye(N) + 0.3 * rng.normal(size=(N, N))
    C = A @ A.T
    kl = 0.5 * (np.trace(C) + N * 0.2**2 - N - np.linalg.slogdet(C)[1]) / N
    compared = gaussian_kl(0.2 + first @ A.T, second)
    # The delta method: a covariance's entries have an error of √(2/S), and there are N of them to a weight, at most.
    assert compared["kl"] == pytest.approx(kl, abs=4 * math.sqrt(2 / S))
    assert kl > 0.05 > compared["kl_floor"]
    assert np.isnan(gaussian_kl(first[:7], second)["kl"])
    assert np.isnan(gaussian_kl(first[:50], second[:50] * (np.arange(N) > 0))["kl"])


def test_the_forest_is_at_chance_for_one_law_and_near_the_optimum_for_two():
    rng = np.random.default_rng(6)
    same = [c2st(*rng.normal(size=(2, 250, 5)), seed=k, classifier="forest").accuracy for k in range(2)]
    assert np.mean(same) == pytest.approx(0.5, abs=4 * math.sqrt(0.25 / 500 / 2))
    first, second = rng.normal(size=(2, 400, 5))
    second[:, 0] += 2
    found, best = c2st(first, second, classifier="forest"), scipy.stats.norm.cdf(1)
    assert best - 0.05 < found.accuracy < best + 4 * found.standard_error
    again = [c2st(first[:20], second[:20], classifier="forest") for _ in range(2)]
    assert again[0] == again[1]  # seeded


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="at least two"):
        energy_score(np.zeros((1, 2, 2)), np.ones((2, 2)))
    with pytest.raises(ValueError, match="all zero"):
        energy_score(np.ones((3, 2, 2)), np.zeros((2, 2)))
    with pytest.raises(ValueError, match=r"got \(3, 2, 2\) and \(3, 3\)"):
        crps(np.ones((3, 2, 2)), np.ones((3, 3)))
    with pytest.raises(ValueError, match="resolution must be positive"):
        log_score(np.ones((3, 2, 2)), np.ones((2, 2)), 0.0)
    with pytest.raises(ValueError, match="of one shape"):
        gaussian_kl(np.ones((9, 2, 2)), np.ones((9, 3, 3)))
    with pytest.raises(ValueError, match="classifier must be one of"):
        c2st(np.ones((20, 2)), np.ones((20, 2)), classifier="svm")
