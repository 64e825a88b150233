"""Tasks of sbibm: likelihoods against other code, references against integration over a grid or importance sampling."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from neurosde.evaluation.sbibm_tasks import SLCP, TASKS, GaussianLinear, TwoMoons, observation

KS_LEVEL = 1.95  # √draws times the distance, at a level of 0.1 %


def ks_distance(draws, edges, mass):
    """Distance of draws from a law given by its masses between edges, and what a mass in one cell may hide."""
    below = np.concatenate([[0], mass.cumsum() / mass.sum()])
    found = np.searchsorted(np.sort(draws), edges) / len(draws)
    return np.abs(found - below).max()


@pytest.mark.parametrize("number", [0, 1, 2])
def test_two_moons_posterior_is_its_density_on_a_grid(number):
    task, draws = TwoMoons(), 4000
    truth, x = observation(task, number)
    edges = np.linspace(-1, 1, 1601)
    middle = torch.from_numpy((edges[1:] + edges[:-1]) / 2)
    theta = torch.cartesian_prod(middle, middle)
    mass = task.log_likelihood(theta, x).exp().view(1600, 1600).numpy()
    found = task.posterior(x, draws, 1).numpy()
    assert ks_distance(found[:, 0], edges, mass.sum(1)) < KS_LEVEL / math.sqrt(draws)
    assert ks_distance(found[:, 1], edges, mass.sum(0)) < KS_LEVEL / math.sqrt(draws)
    total = found.sum(1)  # the moons differ by its sign
    first = mass[np.add.outer(middle.numpy(), middle.numpy()) > 0].sum() / mass.sum()
    assert abs((total > 0).mean() - first) < 4 * math.sqrt(0.25 / draws)
    assert task.allowed(torch.from_numpy(found)).all()
    assert bool(task.log_likelihood(truth[None], x).isfinite())


def test_two_moons_likelihood_is_the_law_of_its_simulator():
    task = TwoMoons()
    # At x = 0 each moon is whole and in the square, and x − u is θ turned: the likelihood's integral over it is 1.
    middle = torch.linspace(-1, 1, 2001, dtype=torch.float64)
    density = task.log_likelihood(torch.cartesian_prod(middle, middle), torch.zeros(2)).exp()
    assert float(density.sum()) * 0.001**2 == pytest.approx(2, rel=1e-3)
    theta = torch.tensor([[0.3, -0.8]], dtype=torch.float64)
    log = np.array([float(task.log_likelihood(theta, x)) for x in task.simulate(theta.expand(500, 2), 3)])
    # Entropy of a uniform angle and a normal radius r, and E log r of the polar coordinates' Jacobian.
    entropy = math.log(math.pi) + 0.5 * math.log(2 * math.pi * math.e * 0.01**2) + math.log(0.1) - 0.005
    assert abs(-log.mean() - entropy) < 4 * log.std() / math.sqrt(len(log))


def test_gaussian_linear_posterior_is_the_conjugate_one():
    task, draws = GaussianLinear(), 8000
    theta, x = observation(task, 0)
    prior = task.prior(draws, 1)
    assert abs(float(prior.var()) / 0.1 - 1) < 5 * math.sqrt(2 / prior.numel())
    noise = task.simulate(prior, 2) - prior
    assert abs(float(noise.var()) / 0.1 - 1) < 5 * math.sqrt(2 / noise.numel())
    precision = 1 / 0.1 + 1 / 0.1
    off = (task.posterior(x, draws, 3) - (x / 0.1) / precision) * math.sqrt(precision)
    assert float(off.mean(0).abs().max()) < 4.5 / math.sqrt(draws)
    assert float((torch.cov(off.T) - torch.eye(10)).abs().max()) < 5 * math.sqrt(2 / draws)
    expected = stats.multivariate_normal(theta.numpy(), 0.1 * np.eye(10)).logpdf(x.numpy())
    assert float(task.log_likelihood(theta[None], x)) == pytest.approx(expected, rel=1e-12)


def test_slcp_likelihood_is_that_of_four_points():
    task = SLCP()
    for number in range(3):
        theta, x = observation(task, number)
        m1, m2, a, b, c = theta.tolist()
        cross = math.tanh(c) * a**2 * b**2
        law = stats.multivariate_normal([m1, m2], [[a**4 + 1e-6, cross], [cross, b**4 + 1e-6]])
        expected = law.logpdf(x.numpy().reshape(4, 2)).sum()
        assert float(task.log_likelihood(theta[None], x)) == pytest.approx(expected, rel=1e-9)
        points = task.simulate(theta.expand(20_000, 5), 1).view(-1, 2).numpy()
        np.testing.assert_allclose(
            np.cov(points.T) / np.sqrt(np.outer(np.diag(law.cov), np.diag(law.cov))),
            law.cov / np.sqrt(np.outer(np.diag(law.cov), np.diag(law.cov))),
            atol=5 * math.sqrt(2 / len(points)),
        )


@pytest.mark.parametrize("number", [1, 5])
def test_slcp_posterior_is_the_prior_weighted_by_the_likelihood(number):
    """Self-normalised importance sampling from another proposal: m of a wide normal law, the rest of the prior."""
    task, draws, proposals = SLCP(), 4000, 400_000
    _, x = observation(task, number)
    theta = task.prior(proposals, 7)
    mean, spread = x.view(4, 2).mean(0), x.view(4, 2).std(0)
    generator = torch.Generator().manual_seed(8)
    theta[:, :2] = mean + spread * torch.randn(proposals, 2, generator=generator, dtype=torch.float64)
    log_weight = task.log_likelihood(theta, x) + 0.5 * ((theta[:, :2] - mean) / spread).square().sum(-1)
    weight = torch.where(task.allowed(theta), log_weight, -math.inf).softmax(0)
    effective = float(1 / weight.square().sum())
    assert effective > 1000
    found = task.posterior(x, draws, 1)
    for values in (lambda t: t[:, 0], lambda t: t[:, 1], lambda t: t[:, 2].abs(), lambda t: t[:, 3].abs(),
                   lambda t: t[:, 4], lambda t: t[:, 4].square(), lambda t: t[:, 2].abs() * t[:, 4],
                   lambda t: t[:, 0] * t[:, 1], lambda t: (t[:, 2].abs() < 1.2).double()):  # fmt: skip
        expected = float((weight * values(theta)).sum())
        spread_of = float((weight * (values(theta) - expected).square()).sum().sqrt())
        assert abs(float(values(found).mean()) - expected) < 4 * spread_of * math.sqrt(1 / draws + 1 / effective)
    signs = found[:, 2:4].sign()  # four modes, of one mass each
    assert abs(float(signs.mean(0).abs().max())) < 4 / math.sqrt(draws)
    assert abs(float(signs.prod(1).mean())) < 4 / math.sqrt(draws)


@pytest.mark.parametrize("name", TASKS)
def test_observations_are_of_their_seed_and_number(name):
    task = TASKS[name]
    first, again, other = observation(task, 0), observation(task, 0), observation(task, 1)
    assert torch.equal(first[1], again[1]) and not torch.equal(first[1], other[1])
    assert not torch.equal(first[1], observation(task, 0, seed=1)[1])
    assert first[0].shape == (task.dim,) and first[1].shape == (task.features,)
    assert bool(task.allowed(task.prior(500, 1)).all())
    if name != "gaussian_linear":
        assert not bool(task.allowed(torch.full((1, task.dim), 3.1, dtype=torch.float64)).any())


def test_bad_input_says_what_was_expected():
    with pytest.raises(ValueError, match=r"theta must have shape \(draw, 2\); got \(4, 3\)"):
        TwoMoons().simulate(torch.zeros(4, 3))
    with pytest.raises(ValueError, match=r"x must be one observation of shape \(8,\); got \(4, 2\)"):
        SLCP().posterior(torch.zeros(4, 2), 10)
    with pytest.raises(ValueError, match="one that two_moons can make"):
        TwoMoons().posterior(torch.tensor([5.0, 0.0]), 10)
    with pytest.raises(FloatingPointError, match="are accepted; take an observation"):
        SLCP().posterior(torch.full((8,), 40.0) + torch.arange(8), 4)
    with pytest.raises(ValueError, match="number must be at least 0"):
        observation(TwoMoons(), -1)


def test_slcp_posterior_is_not_starved_by_a_steep_cell():
    """At observation 2 a spread is known to a few per cent, and the density is steep across cells."""
    _, x = observation(SLCP(), 2)
    assert SLCP().posterior(x, 20_000, 1).unique(dim=0).shape == (20_000, 5)
