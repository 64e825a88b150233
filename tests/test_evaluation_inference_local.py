"""L-C2ST over tasks: right posteriors pass, wrong ones of one task are found in that task."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import chi2

from neurosde.evaluation import inference_local as module
from neurosde.evaluation.inference_local import local_pairs, local_tests
from neurosde.evaluation.inference_methods import Inferred, infer_by
from neurosde.evaluation.inference_tasks import Task, record
from neurosde.evaluation.posterior_benchmark import DIRECTIONS

TASKS = (Task("gaussian", 4, 60), Task("gaussian", 5, 200))


@pytest.fixture(scope="module")
def recorded():
    return [record(task, tuple(range(48))) for task in TASKS]


@pytest.fixture(scope="module")
def exact(recorded):
    return [infer_by("exact", one, draws=16, seed=1, simulations=1) for one in recorded]


def test_right_posteriors_pass_and_wrong_ones_are_found(recorded, exact, monkeypatch):
    """Of right posteriors p is each k/20 with a chance of 1/20; wrong ones are beyond all 19 exchanges in each task."""
    monkeypatch.setattr(module, "PERMUTATIONS", 19)
    right = local_tests([local_pairs(one, data, 0) for one, data in zip(exact, recorded, strict=True)], 0)
    assert right.overall > 1 / 20 and right.statistic.shape == right.p.shape == (2,)
    means = [one.estimate + 0.2 * (one.draws - one.estimate) + 0.5 * one.draws.std() for one in exact]
    pairs = [local_pairs(Inferred(m.mean(0), m), data, 0) for m, data in zip(means, recorded, strict=True)]
    wrong = local_tests(pairs, 0)
    assert wrong.overall == 1 / 20 and (wrong.p == 1 / 20).all() and (wrong.statistic > right.statistic).all()


def test_tasks_without_draws_and_few_networks_have_no_test(recorded, exact):
    assert local_pairs(Inferred(recorded[0].weights), recorded[0], 0) is None
    few = infer_by("exact", record(TASKS[0], (0, 1)), draws=4, seed=0, simulations=1)
    for pairs in ([None, None], [local_pairs(few, record(TASKS[0], (0, 1)), 0), None]):
        found = local_tests(pairs, 0)
        assert math.isnan(found.overall) and np.isnan(found.statistic).all() and np.isnan(found.p).all()


def test_features_are_of_one_size_whatever_the_number_of_neurons():
    """Gaussian weights: projections, mean and trace are normal, of variances near 1 that are known, and |W|² is χ²."""
    networks = 24
    for N in (6, 24):
        data = record(Task("gaussian", N, 20), tuple(range(networks)))
        found = local_pairs(Inferred(data.weights, torch.stack([data.weights] * 3)), data, 0)
        truths = np.array(found["truths"])
        assert np.array(found["draws"]).shape == (networks, 3, 8) and truths.shape == (networks, 8)
        assert np.array(found["conditions"]).shape == (networks, 8 + 3)
        np.testing.assert_allclose(np.array(found["draws"])[:, 0], truths)
        along = np.square(np.random.default_rng(0).standard_normal((DIRECTIONS, N, N))).mean((1, 2))
        np.testing.assert_allclose(along, 1, atol=4 * math.sqrt(2 / N**2))
        squares = np.square(truths).sum(0)
        tails = np.append(
            chi2(networks).cdf(squares[[0, 1, 2, 3, 6, 7]] / [*along, 1, 1]),
            chi2(networks * N**2).cdf(N**2 * squares[4]),
        )
        assert (np.abs(tails - 0.5) < 0.5 - 1e-3).all()
