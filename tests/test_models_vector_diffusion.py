"""The vector diffusion: the known posterior of a Gaussian, the preconditioning before training, and bad input."""

import math

import pytest
import torch
from scipy import stats

from neurosde.models.vector_diffusion import (
    SIGMA_MAX,
    Standard,
    VectorDenoiser,
    VectorPosterior,
    VectorTraining,
    train_vector_posterior,
)

LOADING = torch.tensor([[1.0, 0.5], [0.0, 2.0], [-1.0, 1.0]], dtype=torch.float64)
NOISE = 0.8
QUICK = VectorTraining(width=32, blocks=2, steps=60, patience=2)


def pairs(count, seed=0):
    """θ ~ N((3, −1), diag(4, ¼)), x = LOADING θ + noise."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(count, 2, generator=generator, dtype=torch.float64)
    theta = torch.tensor([3.0, -1.0], dtype=torch.float64) + z * torch.tensor([2.0, 0.5], dtype=torch.float64)
    return theta, theta @ LOADING.T + NOISE * torch.randn(count, 3, generator=generator, dtype=torch.float64)


def untrained(support=None):
    torch.manual_seed(0)
    theta, x = pairs(1000)
    return VectorPosterior(VectorDenoiser(2, 3, 16, 1), Standard.of(theta), Standard.of(x), support)


@pytest.mark.slow
def test_a_gaussian_posterior_is_found():
    count, draws = 4000, 4000
    theta, x = pairs(count)
    posterior = train_vector_posterior(theta, x, VectorTraining(width=64, blocks=2, steps=1000))
    prior_precision = torch.diag(torch.tensor([1 / 4, 4.0], dtype=torch.float64))
    covariance = torch.linalg.inv(prior_precision + LOADING.T @ LOADING / NOISE**2)
    unit = torch.linalg.cholesky(covariance)
    for k, observed in enumerate(pairs(3, seed=1)[1]):
        prior_part = prior_precision @ torch.tensor([3.0, -1.0], dtype=torch.float64)
        mean = covariance @ (prior_part + LOADING.T @ observed / NOISE**2)
        found = posterior.sample(observed, draws, steps=32, generator=k)
        off = torch.linalg.solve_triangular(unit, (found - mean).T, upper=False).T  # N(0, I) if exact
        # Linear regression of θ on x with as many pairs errs by √(4/count) sd at an observation of unit leverage; a
        # network, which does not know that it is linear, by some times as much.
        assert float(off.mean(0).abs().max()) < 4 / math.sqrt(draws) + 6 * math.sqrt(4 / count)
        assert float((torch.cov(off.T) - torch.eye(2)).abs().max()) < 5 * math.sqrt(2 / draws) + 6 * math.sqrt(
            4 / count
        )


def test_before_training_it_is_the_gaussian_prior():
    posterior = untrained()
    x = pairs(1, seed=1)[1][0]
    theta = torch.randn(5, 2, dtype=torch.float64)
    for s in (0.1, 1.0, SIGMA_MAX):
        expected = theta / (1 + s**2)
        torch.testing.assert_close(posterior.denoiser(x)(theta, torch.tensor(s, dtype=torch.float64)), expected)
    found = posterior.sample(x, 3000, generator=1, steps=8)
    for k in range(2):
        prior = stats.norm(float(posterior.theta.mean[k]), float(posterior.theta.spread[k]))
        assert stats.kstest(found[:, k].numpy(), prior.cdf).pvalue > 1e-3


def test_draws_outside_the_support_are_drawn_again():
    bound = 3.5
    posterior = untrained(lambda theta: theta[:, 0] > bound)
    found = posterior.sample(pairs(1, seed=1)[1][0], 2000, generator=1, steps=8)
    assert found.shape == (2000, 2) and bool((found[:, 0] > bound).all())
    mean, sd = float(posterior.theta.mean[0]), float(posterior.theta.spread[0])
    restricted = stats.truncnorm((bound - mean) / sd, math.inf, mean, sd)
    assert stats.kstest(found[:, 0].numpy(), restricted.cdf).pvalue > 1e-3
    nowhere = untrained(lambda theta: theta[:, 0] > 1e3)
    with pytest.raises(FloatingPointError, match=r"of 2000 draws 0 lie in the prior's support"):
        nowhere.sample(pairs(1)[1][0], 10, generator=1, steps=2)


def test_the_same_seed_gives_the_same_posterior_and_another_one_another():
    theta, x = pairs(200)
    observed = pairs(1, seed=1)[1][0]
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, again, other = (
        train_vector_posterior(theta, x, VectorTraining(**(vars(QUICK) | {"seed": seed}))).sample(
            observed, 20, steps=8, generator=3
        )
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_constant_feature_of_x_is_harmless():
    theta, x = pairs(200)
    with_constant = torch.cat([x, torch.full((200, 1), 7.0, dtype=torch.float64)], 1)
    found = train_vector_posterior(theta, with_constant, QUICK).sample(with_constant[0], 10, steps=8, generator=1)
    assert bool(found.isfinite().all())


def test_training_that_diverges_says_so():
    theta, x = pairs(200)
    with pytest.raises(FloatingPointError, match="lower learning_rate"):
        train_vector_posterior(theta, x, VectorTraining(width=8, blocks=1, steps=50, learning_rate=1e20))


def test_bad_input_says_what_was_expected():
    theta, x = pairs(100)
    with pytest.raises(ValueError, match=r"one row for each pair; got \(100, 2\) and \(99, 3\)"):
        train_vector_posterior(theta, x[1:])
    with pytest.raises(ValueError, match="at least 20 pairs are needed.*got 19"):
        train_vector_posterior(theta[:19], x[:19])
    with pytest.raises(ValueError, match="every entry of theta must vary"):
        train_vector_posterior(torch.ones(100, 2), x)
    with pytest.raises(ValueError, match="x must be finite"):
        train_vector_posterior(theta, x / 0)
    with pytest.raises(ValueError, match=r"one observation of shape \(3,\); got \(2,\)"):
        untrained().sample(torch.zeros(2), 10)
    with pytest.raises(ValueError, match="draws must be at least 1"):
        untrained().sample(torch.zeros(3), 0)
    with pytest.raises(ValueError, match=r"dropout must lie in \[0, 1\); got 1"):
        VectorTraining(dropout=1)
    with pytest.raises(ValueError, match="width must be at least 1"):
        VectorTraining(width=0)
