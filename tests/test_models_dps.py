"""Guidance by the likelihood: against closed forms."""

import math

import pytest
import torch
from problems import GAUSSIAN, SPARSE, D, normal, number, source

from neurosde.models import (
    FunctionGuidance,
    fold,
    noise_levels,
    sample,
)
from neurosde.models.dps import DiffusionPosteriorSampling, MomentMatching, PseudoinverseGuidance


@pytest.mark.parametrize("s", [0.01, 0.7, 5.0, 80.0])
@pytest.mark.parametrize("guidance", [PseudoinverseGuidance, MomentMatching])
def test_of_a_gaussian_prior_the_guided_mean_is_exact(evidence_of, guidance, s):
    evidence, x = evidence_of(5, high=1e4), (1 + s) * normal(3, 5, 5, seed=9)
    options = {"tolerance": 1e-10} if guidance is MomentMatching else {}
    guided = guidance(GAUSSIAN, evidence, **options)
    torch.testing.assert_close(guided(x, number(s)), fold(x, s, evidence).posterior_mean, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("s", [0.1, 2.0])
def test_moments_of_a_correlated_gaussian_prior_are_matched_too(evidence_of, s):
    N, evidence = 4, evidence_of(4)
    a = normal(N, N, seed=5)
    covariance = a @ a.mT + 0.1 * torch.eye(N, dtype=D)
    x, eye = normal(2, N, N, seed=6), torch.eye(N, dtype=D)

    def denoise(x, sigma):
        return x @ torch.linalg.solve(covariance + sigma**2 * eye, covariance)

    U = evidence.vectors
    precision = U @ torch.diag(evidence.eigenvalues) @ U.mT + eye / s**2 + torch.linalg.inv(covariance)
    exact = (evidence.cross @ U.mT + x / s**2) @ torch.linalg.inv(precision)
    guided = MomentMatching(denoise, evidence, tolerance=1e-10)
    torch.testing.assert_close(guided(x, number(s)), exact, rtol=1e-6, atol=1e-6)
    assert 0 < guided.unsolved <= 1e-10
    early = MomentMatching(denoise, evidence, iterations=1)
    assert not torch.allclose(early(x, number(s)), exact, rtol=1e-2) and early.unsolved > 1e-3
    assert not torch.allclose(PseudoinverseGuidance(denoise, evidence)(x, number(s)), exact, rtol=1e-2)


def test_dps_follows_the_gradient_of_the_likelihood_at_the_denoised_matrix(evidence_of):
    evidence, x, s = evidence_of(4), normal(2, 4, 4, seed=7), number(0.6)
    again = x.clone().requires_grad_(True)
    along = SPARSE(again, s) @ evidence.vectors
    log_likelihood = (along * evidence.cross - 0.5 * along.square() * evidence.eigenvalues).sum()
    (slope,) = torch.autograd.grad(log_likelihood, again)
    # Entries are independent, so that ∂D/∂x is diagonal, and symmetric.
    expected = SPARSE(x, s) + 0.5 * s**2 * slope
    torch.testing.assert_close(DiffusionPosteriorSampling(SPARSE, evidence, scale=0.5)(x, s), expected)


@pytest.mark.parametrize("s", [0.05, 1.0, 20.0])
def test_a_gaussian_likelihood_of_ones_own_is_guided_as_by_the_pseudoinverse(evidence_of, s):
    evidence, scale = evidence_of(4, high=50.0), 0.5
    precision = (evidence.vectors * evidence.eigenvalues) @ evidence.vectors.mT / scale**2
    cross = evidence.cross @ evidence.vectors.mT / scale

    def log_prob(W):
        return (W * cross).sum((-1, -2)) - 0.5 * ((W @ precision) * W).sum((-1, -2))

    own = FunctionGuidance(SPARSE, log_prob, 4, scale, tolerance=1e-10, iterations=60)
    x = (1 + s) * normal(5, 4, 4, seed=3)
    known = PseudoinverseGuidance(SPARSE, evidence)
    torch.testing.assert_close(own(x, number(s)), known(x, number(s)), rtol=1e-6, atol=1e-6)


def test_counts_of_spikes_find_the_weight_of_a_poisson_neuron():
    """One weight, W ~ N(0, 1), n ~ Poisson(exp W) 40 times: the posterior on a grid."""
    counts = torch.poisson(torch.full((40,), math.exp(0.7), dtype=D), generator=source(1))

    def log_prob(W):
        return counts.sum() * W[:, 0, 0] - len(counts) * W[:, 0, 0].exp()

    drawn = sample(FunctionGuidance(GAUSSIAN, log_prob, 1), (4000, 1, 1), sigmas=noise_levels(64), generator=0)
    grid = torch.linspace(-3, 3, 2001, dtype=D)
    density = (log_prob(grid.view(-1, 1, 1)) - grid.square() / 2).softmax(0)
    mean = float(density @ grid)
    sd = float((density @ (grid - mean).square()).sqrt())
    # It takes the mode of p(W | x, n) for the mean, and its curvature for the variance, at all noise levels.
    mode = float(grid[density.argmax()])
    laplace = 1 / math.sqrt(1 + 40 * math.exp(mode))
    assert abs(float(drawn.mean()) - mean) < 2 * abs(mode - mean) + 4 * sd / math.sqrt(4000)
    assert abs(float(drawn.std()) / sd - 1) < 2 * abs(laplace / sd - 1) + 4 / math.sqrt(8000)


def test_what_is_not_concave_or_linear_is_followed_uphill_and_bad_functions_are_refused():
    x = normal(3, 2, 2)
    rising = FunctionGuidance(GAUSSIAN, lambda W: W.square().sum((-1, -2)), 2)  # 1 + r²H < 0 at large noise
    assert (rising(x, number(5.0)).flatten(1).norm(dim=1) > GAUSSIAN(x, number(5.0)).flatten(1).norm(dim=1)).all()
    linear = FunctionGuidance(GAUSSIAN, lambda W: W.sum((-1, -2)), 2)
    torch.testing.assert_close(linear(x, number(1.0)), GAUSSIAN(x, number(1.0)) + 0.5)
    for wrong in (lambda W: W.sum(), lambda W: W.sum((-1, -2)) * math.nan, lambda W: W):
        with pytest.raises(ValueError, match="log_prob must return a finite number for each of the 3 matrices"):
            FunctionGuidance(GAUSSIAN, wrong, 2)(x, number(1.0))


def test_what_diverges_says_so(evidence_of):
    evidence = evidence_of(4, high=1e5)
    with pytest.raises(FloatingPointError, match="DiffusionPosteriorSampling diverges at .* of 4 matrices"):
        sample(DiffusionPosteriorSampling(GAUSSIAN, evidence), (4, 4, 4), evidence=evidence, generator=0)
    for wrong, match in (
        (lambda: DiffusionPosteriorSampling(GAUSSIAN, evidence, scale=0.0), "scale must be"),
        (lambda: MomentMatching(GAUSSIAN, evidence, tolerance=-1.0), "tolerance must be"),
        (lambda: MomentMatching(GAUSSIAN, evidence, iterations=0), "iterations must be"),
        (lambda: PseudoinverseGuidance(GAUSSIAN, evidence, 0.0), "prior_variance must be"),
    ):
        with pytest.raises(ValueError, match=match):
            wrong()
