"""Guidance by the likelihood, and split Gibbs sampling: against closed forms and exact posteriors."""

import math

import pytest
import scipy.stats
import torch

from neurosde.datasets.ensembles import Sparse
from neurosde.evaluation.c2st import c2st
from neurosde.models import (
    Evidence,
    FunctionGuidance,
    ScaleMixtureDenoiser,
    SpikeAndSlabDenoiser,
    fold,
    noise_levels,
    sample,
)
from neurosde.models.dps import (
    DECONVOLVED,
    DiffusionPosteriorSampling,
    MomentMatching,
    PseudoinverseGuidance,
    SplitGibbs,
    given_noisy,
    observed,
    r_hat,
)
from neurosde.models.exact_posterior import exact_posterior

D = torch.float64
GAUSSIAN = ScaleMixtureDenoiser(torch.tensor([1.0]))
SPARSE = SpikeAndSlabDenoiser(0.3, 1 / 0.3)  # in units of s₀


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=D, generator=torch.Generator().manual_seed(seed))


def number(s):
    return torch.tensor(s, dtype=D)


def evidence_of(N, low=0.3, high=200.0, seed=0, J=None):
    """Of a recording whose Λ has eigenvalues from `low` to `high`."""
    U = torch.linalg.qr(normal(N, N, seed=seed))[0]
    eigenvalues = torch.logspace(math.log10(low), math.log10(high), N, dtype=D)
    J = normal(N, N, seed=seed + 1) if J is None else J
    cross = (J @ U) * eigenvalues + normal(N, N, seed=seed + 2) * eigenvalues.sqrt()
    return Evidence(eigenvalues, U, cross)


def source(seed=0):
    return torch.Generator().manual_seed(seed)


# Guidance


@pytest.mark.parametrize("s", [0.01, 0.7, 5.0, 80.0])
@pytest.mark.parametrize("guidance", [PseudoinverseGuidance, MomentMatching])
def test_of_a_gaussian_prior_the_guided_mean_is_exact(guidance, s):
    evidence, x = evidence_of(5, high=1e4), (1 + s) * normal(3, 5, 5, seed=9)
    options = {"tolerance": 1e-10} if guidance is MomentMatching else {}
    guided = guidance(GAUSSIAN, evidence, **options)
    torch.testing.assert_close(guided(x, number(s)), fold(x, s, evidence).posterior_mean, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("s", [0.1, 2.0])
def test_moments_of_a_correlated_gaussian_prior_are_matched_too(s):
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


def test_dps_follows_the_gradient_of_the_likelihood_at_the_denoised_matrix():
    evidence, x, s = evidence_of(4), normal(2, 4, 4, seed=7), number(0.6)
    again = x.clone().requires_grad_(True)
    along = SPARSE(again, s) @ evidence.vectors
    log_likelihood = (along * evidence.cross - 0.5 * along.square() * evidence.eigenvalues).sum()
    (slope,) = torch.autograd.grad(log_likelihood, again)
    # Entries are independent, so that ∂D/∂x is diagonal, and symmetric.
    expected = SPARSE(x, s) + 0.5 * s**2 * slope
    torch.testing.assert_close(DiffusionPosteriorSampling(SPARSE, evidence, scale=0.5)(x, s), expected)


@pytest.mark.parametrize("s", [0.05, 1.0, 20.0])
def test_a_gaussian_likelihood_of_ones_own_is_guided_as_by_the_pseudoinverse(s):
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


def test_what_diverges_says_so():
    evidence = evidence_of(4, high=1e5)
    with pytest.raises(FloatingPointError, match="DiffusionPosteriorSampling diverges at noise level"):
        sample(DiffusionPosteriorSampling(GAUSSIAN, evidence), (4, 4, 4), evidence=evidence, generator=0)
    for wrong, match in (
        (lambda: DiffusionPosteriorSampling(GAUSSIAN, evidence, scale=0.0), "scale must be"),
        (lambda: MomentMatching(GAUSSIAN, evidence, tolerance=-1.0), "tolerance must be"),
        (lambda: MomentMatching(GAUSSIAN, evidence, iterations=0), "iterations must be"),
        (lambda: PseudoinverseGuidance(GAUSSIAN, evidence, 0.0), "prior_variance must be"),
    ):
        with pytest.raises(ValueError, match=match):
            wrong()


# Split Gibbs


def test_given_a_noisy_matrix_draws_are_of_the_priors_law():
    for rho in (0.05, 0.8):
        z = 2 * rho * normal(1, 3, 3, seed=1)  # where it is open whether there is a weight
        found = given_noisy(GAUSSIAN, z.expand(2000, 3, 3), rho, source=source())
        mean, sd = z / (1 + rho**2), rho / math.sqrt(1 + rho**2)
        assert scipy.stats.kstest(((found - mean) / sd).flatten(), "norm").pvalue > 0.01
        sparse = given_noisy(SPARSE, z.expand(4000, 3, 3), rho, source=source())
        there = SPARSE.existence(z, number(rho))[0]
        share = (sparse.abs() > 0.02 * rho).double().mean(0)
        # The last level leaves zeros a spread of 0.002 ρ; of the slab 2 % of ρ hold a hundredth.
        assert ((share - there).abs() < 4 * (there * (1 - there) / 4000).sqrt() + 0.012).all()


def test_one_sweep_leaves_the_posterior_as_it_is():
    """Of a Gaussian prior: whitened draws stay standard normal, in every direction, at any ρ that is deconvolved."""
    N, evidence = 3, evidence_of(3)
    folded = fold(torch.zeros(N, N, dtype=D), math.inf, evidence)
    sd = folded.variances.sqrt()
    before = (folded.mean + sd * normal(3000, N, N, seed=4)) @ evidence.vectors.mT
    rho = math.sqrt(0.5 / 200)
    z = observed(before, evidence, rho, source(1))
    # z has the variance c + ρ² − what is taken off: given W, ρ²(1 − ρ²λ) about (1 − ρ²λ) W + ρ² B.
    share = rho**2 * evidence.eigenvalues
    spread = (rho**2 * (1 - share) + (1 - share).square() * folded.variances).sqrt()
    along = z @ evidence.vectors - (1 - share) * folded.mean - rho**2 * evidence.cross
    assert scipy.stats.kstest((along / spread).flatten(), "norm").pvalue > 0.01
    after = (given_noisy(GAUSSIAN, z, rho, source=source(2)) @ evidence.vectors - folded.mean) / sd
    for k in range(N):
        assert scipy.stats.kstest(after[..., k].flatten(), "norm").pvalue > 0.01
    moved = (after - (before @ evidence.vectors - folded.mean) / sd).square().mean((0, 1))
    # Autocorrelation (1 − ρ²λ)/(1 + ρ²) of a sweep.
    torch.testing.assert_close(moved, 2 - 2 * (1 - share) / (1 + rho**2), rtol=0.1, atol=0)


@pytest.mark.parametrize("high", [20.0, 1e4])
def test_draws_from_anywhere_come_to_the_gaussian_posterior(high):
    N, evidence = 4, evidence_of(4, high=high)
    found = SplitGibbs(GAUSSIAN, sweeps=60).refine(7 + 3 * normal(600, N, N, seed=3), evidence, 0)
    folded = fold(torch.zeros(N, N, dtype=D), math.inf, evidence)
    whitened = (found.draws @ evidence.vectors - folded.mean) / folded.variances.sqrt()
    for k in range(N):
        assert scipy.stats.kstest(whitened[..., k].flatten(), "norm").pvalue > 0.01
    assert found.evaluations == 60 * 16 and found.rho.shape == found.moved.shape == found.log_likelihood.shape == (60,)
    assert float(found.rho[-1]) == pytest.approx(math.sqrt(DECONVOLVED / high))
    assert (found.rho[1:] <= found.rho[:-1] * (1 + 1e-12)).all() and float(found.moved[0]) > float(found.moved[-1])


@pytest.mark.slow
def test_sparse_weights_come_to_their_exact_posterior():
    N, scale = 4, 1 / 2.0
    J = Sparse(1.0, density=0.3).sample_weights(1, N, source(2))[0] / scale
    evidence = evidence_of(N, low=1.0, high=60.0, J=J)
    of_W = Evidence(evidence.eigenvalues[None], evidence.vectors[None], evidence.cross[None]).scaled(1 / scale)
    exact = exact_posterior(Sparse(1.0, density=0.3), of_W, 2000, thin=20).weights[:, 0] / scale
    found = SplitGibbs(SPARSE, sweeps=160).refine(normal(2000, N, N, seed=8), evidence, 0).draws
    found = torch.where(found.abs() < 8e-3, 0.0, found)
    there, want = (found != 0).double().mean(0), (exact != 0).double().mean(0)
    # Of the slab 0.4 % lies below 8e-3, and the levels of a sweep decide wrongly in less than as many cases.
    assert ((there - want).abs() < 4.5 * (2 * want * (1 - want) / 2000).sqrt() + 0.01).all()
    # 4000 draws: an accuracy of ½ has a standard error of 0.008.
    assert c2st(exact.flatten(1).numpy(), found.flatten(1).numpy()).accuracy < 0.5 + 3 * 0.008
    guided = sample(
        MomentMatching(SPARSE, evidence), (2000, N, N), evidence=evidence, sigmas=noise_levels(24), generator=0
    )
    assert c2st(exact.flatten(1).numpy(), guided.flatten(1).numpy()).accuracy > 0.6  # what no approximation reaches


def test_without_a_recording_it_is_the_prior():
    N = 3
    found = SplitGibbs(GAUSSIAN, sweeps=8).refine(5 + normal(800, N, N), Evidence.none(N), 0)
    after = found.draws.flatten().numpy()
    # ρ = 1 halves what is left of the beginning in each of 8 sweeps.
    assert abs(after.mean() - 5 / 2**8) < 4 / math.sqrt(len(after)) and abs(after.std() - 1) < 4 / math.sqrt(
        2 * len(after)
    )
    assert (found.rho == 1).all()


def test_r_hat():
    assert r_hat(normal(200, 100)) == pytest.approx(1, abs=0.01)
    assert r_hat(normal(200, 1) + 0.1 * normal(200, 100, seed=1)) > 5
    drifting = torch.linspace(0, 3, 100, dtype=D) + normal(20, 100)
    assert r_hat(drifting) > 1.2
    quick = SplitGibbs(GAUSSIAN, sweeps=80).refine(normal(50, 3, 3), evidence_of(3, 1.0, 2.0), 0)
    slow = SplitGibbs(GAUSSIAN, sweeps=80).refine(normal(50, 3, 3), evidence_of(3, 1.0, 1e4), 0)
    assert quick.r_hat["norm"] < 1.15 < slow.r_hat["norm"]


def test_the_seed_decides_and_bad_input_is_refused():
    evidence = evidence_of(3)
    gibbs = SplitGibbs(GAUSSIAN, sweeps=8)
    one, same, other = (gibbs.refine(normal(4, 3, 3), evidence, k).draws for k in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)
    for wrong, match in (
        (lambda: gibbs.refine(normal(4, 2, 2), evidence), r"draws must be \(draw, 3, 3\)"),
        (lambda: gibbs.refine(normal(1, 3, 3), evidence), "at least two, and finite"),
        (lambda: gibbs.refine(normal(4, 3, 3) * math.nan, evidence), "at least two, and finite"),
        (lambda: SplitGibbs(GAUSSIAN, sweeps=4), "sweeps must be"),
        (lambda: SplitGibbs(GAUSSIAN, rho=0.0), "rho must be"),
    ):
        with pytest.raises(ValueError, match=match):
            wrong()
