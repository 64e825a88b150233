"""Diffusion with denoisers in closed form: folding, samplers, guidance."""

import math

import numpy as np
import pytest
import scipy.integrate
import scipy.stats
import torch
from torch.distributions import MultivariateNormal, Normal

from neurosde import simulate_rate_network
from neurosde.likelihood import transition_statistics
from neurosde.models import (
    ClassifierFreeGuidance,
    Evidence,
    GaussianPosterior,
    ScaleMixtureDenoiser,
    SpikeAndSlabDenoiser,
    fold,
    largest_sigma,
    noise_levels,
    sample,
)  # fmt: skip
from neurosde.models.diffusion_prior import weight_levels

D = torch.float64


def evidence_of(N, count=7, scale=1.0):
    """Λ and B of some transitions with unit noise."""
    phi, y = torch.randn(count, N, dtype=D), torch.randn(count, N, dtype=D)
    return phi.mT @ phi, y.mT @ phi


def rounded(found, expected, tolerance=1e-11):
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= tolerance * float(expected.abs().max())


@pytest.mark.parametrize("s", [2e-3, 0.5, 80.0])
@pytest.mark.parametrize("v", [1.0, 0.3])
def test_without_evidence_it_is_edms_preconditioning(s, v):
    x, F = torch.randn(2, 3, 6, 6, dtype=D)
    folded = fold(x, s, Evidence.none(6), v)
    rounded(folded.network_input, x / math.sqrt(s**2 + v))
    rounded(folded.posterior_mean, v / (s**2 + v) * x)
    rounded(folded.scaled(F), s * math.sqrt(v / (s**2 + v)) * F)
    rounded(folded.whitened(folded.scaled(F)), F)


def test_without_a_network_it_is_the_exact_posterior():
    """At infinite noise W_s says nothing: what is left is the posterior of the recording, computed elsewhere."""
    N, g, sigma = 8, 1.4, 0.2
    W = g / math.sqrt(N) * torch.randn(N, N, dtype=D)
    _, h = simulate_rate_network(
        W, torch.randn(3, N, dtype=D), 40, 0.1, 1.0, noise_std=sigma, return_h=True, generator=1
    )
    statistics = transition_statistics(voltage=h, dt=0.1, tau=1.0)
    exact = GaussianPosterior.from_statistics(statistics, sigma, g**2 / N)
    scale = g / math.sqrt(N)
    evidence = Evidence.of(*statistics.precision(sigma)).scaled(scale)
    folded = fold(torch.randn(N, N, dtype=D), 1e9, evidence)
    rounded(scale * folded.posterior_mean, exact.mean, 1e-9)
    rounded(scale**2 * folded.scaled(torch.eye(N, dtype=D)).mT @ folded.scaled(torch.eye(N, dtype=D)),
            exact.covariance, 1e-9)  # fmt: skip


def test_the_loss_of_the_exact_denoiser_is_one_under_its_prior():
    """‖(D₀ − W) C^(−1/2)‖² is χ² with N² degrees of freedom, given W_s and the recording."""
    N, count = 6, 4000
    W = torch.randn(count, N, N, dtype=D)
    phi = torch.randn(5, N, dtype=D)  # the same inputs to all of them
    y = phi @ W.mT + torch.randn(count, 5, N, dtype=D)
    evidence = Evidence.of((phi.mT @ phi).expand(count, N, N), y.mT @ phi)
    for s in (0.1, 1.0, 10.0):
        loss = fold(W + s * torch.randn_like(W), s, evidence).loss(torch.zeros_like(W), W)
        assert abs(float(loss.mean()) - 1) < 4 * math.sqrt(2 / (count * N * N))


def mixture_mean(x, s, variances, probabilities, evidence):
    """E[W | W_s = x] by Tweedie's formula, x + s² ∇ log p(x), from densities of vectors."""
    N = x.shape[-1]
    eye = torch.eye(N * N, dtype=D)
    precision, cross = evidence
    information = torch.kron(torch.eye(N, dtype=D), precision)  # rows are independent
    point = x.flatten().clone().requires_grad_()
    logs = []
    for v, p in zip(variances.tolist(), probabilities.tolist(), strict=True):
        covariance = torch.linalg.inv(information + eye / v)
        mean = covariance @ cross.flatten()
        normaliser = (torch.logdet(covariance) - N * N * math.log(v) + cross.flatten() @ mean) / 2
        logs.append(math.log(p) + normaliser + MultivariateNormal(mean, covariance + s**2 * eye).log_prob(point))
    (slope,) = torch.autograd.grad(torch.stack(logs).logsumexp(0), point)
    return x + s**2 * slope.view(N, N)


@pytest.mark.parametrize("s", [0.1, 1.0, 20.0])
@pytest.mark.parametrize("known", [False, True])
def test_scale_mixture_by_tweedies_formula(s, known):
    variances, probabilities = torch.tensor([0.4, 1.0, 2.5], dtype=D), torch.tensor([0.5, 0.2, 0.3], dtype=D)
    evidence = evidence_of(3) if known else (torch.zeros(3, 3, dtype=D), torch.zeros(3, 3, dtype=D))
    x = math.sqrt(1 + s**2) * torch.randn(4, 3, 3, dtype=D)
    denoise = ScaleMixtureDenoiser(variances, probabilities, Evidence.of(*evidence) if known else None)
    found = denoise(x, torch.tensor(s, dtype=D))
    rounded(found, torch.stack([mixture_mean(one, s, variances, probabilities, evidence) for one in x]), 1e-9)


@pytest.mark.parametrize("s", [0.05, 1.0, 20.0])
def test_spike_and_slab_by_tweedies_formula(s):
    density, variance = 0.2, 5.0
    x = torch.linspace(-4, 4, 36, dtype=D).view(6, 6).requires_grad_()
    slab, spike = (Normal(torch.zeros((), dtype=D), sd) for sd in (math.sqrt(variance + s**2), s))
    log = torch.logaddexp(math.log(density) + slab.log_prob(x), math.log(1 - density) + spike.log_prob(x)).sum()
    (slope,) = torch.autograd.grad(log, x)
    found = SpikeAndSlabDenoiser(density, variance)(x.detach(), torch.tensor(s, dtype=D))
    torch.testing.assert_close(found, (x + s**2 * slope).detach(), rtol=1e-8, atol=1e-9)  # the sum cancels where s ≪ x


def test_a_quadrature_over_gains_converges():
    x = 1.3 * torch.randn(5, 10, 10, dtype=D)
    means = [ScaleMixtureDenoiser.of_gains(0.8, 2.0, points)(x, torch.tensor(1.0)) for points in (32, 64)]
    rounded(*means, 1e-9)


def error_of(method, steps, v=1.0, sigma_max=10.0):
    """Error of the probability flow of N(0, v), which multiplies by √((v + t²)/(v + s²))."""
    levels = torch.linspace(sigma_max ** (1 / 7), 0.05 ** (1 / 7), steps, dtype=D) ** 7
    start = torch.full((1, 1), 3.0, dtype=D)
    end = []
    denoise = ScaleMixtureDenoiser(torch.tensor([v]))

    def until(x, s):
        end.append((float(s), x))
        return denoise(x, s)

    sample(until, (1, 1), method=method, sigmas=torch.cat([levels, levels.new_zeros(1)]), start=start)
    x = next(x for s, x in reversed(end) if s == float(levels[-1]))
    return abs(float(x) / (3 * math.sqrt((v + 0.05**2) / (v + sigma_max**2))) - 1)


@pytest.mark.parametrize("method", ["heun", "dpmpp_2m"])
def test_deterministic_samplers_are_of_second_order(method):
    steps = np.array([32, 64, 128, 256])
    slope = np.polyfit(np.log(steps), np.log([error_of(method, int(n)) for n in steps]), 1)[0]
    assert -2.2 < slope < -1.8


@pytest.mark.parametrize("v", [0.5, 1.5])
def test_the_multistep_sampler_is_of_fourth_order(v):
    """For another variance than it takes for granted; first steps of lower orders at s ≈ 80 are little."""
    steps = np.array([64, 128, 256, 512])
    slope = np.polyfit(np.log(steps), np.log([error_of("multistep", int(n), v, 80.0) for n in steps]), 1)[0]
    assert -4.5 < slope < -3.7


@pytest.mark.parametrize("v", [1.0, 0.3])
def test_the_multistep_sampler_is_exact_for_its_gaussian(v):
    levels, start = noise_levels(4, 80.0, 0.01), 80 * torch.randn(50, 3, 3, dtype=D)
    denoise = ScaleMixtureDenoiser(torch.tensor([v], dtype=D))
    drawn = sample(denoise, start.shape, sigmas=levels, start=start, prior_variance=v)
    rounded(drawn, math.sqrt(v / (v + 80.0**2)) * start)


def test_a_prior_variance_may_be_a_whole_number():
    denoise = ScaleMixtureDenoiser(torch.tensor([2.0], dtype=D))
    whole, real = (sample(denoise, (3, 3), prior_variance=v, generator=0) for v in (2, 2.0))
    assert torch.equal(whole, real)


def test_the_multistep_sampler_is_exact_where_the_network_is_quadratic_in_log_sigma():
    """F = a + bu + cu², u = log s, against adaptive quadrature of dy/dθ = −F after the first three steps."""
    levels = torch.cat([torch.logspace(1, -0.5, 14, dtype=D), torch.zeros(1, dtype=D)])  # steps of 0.27 in log s
    x, start = [], 10 * torch.randn(4, 4, dtype=D)

    def f(s):
        return 0.7 - 0.3 * math.log(s) + 0.2 * math.log(s) ** 2

    def denoise(W, s):
        x.append(W)
        return W / (1 + s**2) + s / (1 + s**2).sqrt() * f(float(s))

    sample(denoise, (4, 4), sigmas=levels, start=start)
    s, t = float(levels[3]), float(levels[-2])
    integral = scipy.integrate.quad(lambda u: f(math.exp(u)) / (2 * math.cosh(u)), math.log(t), math.log(s))[0]
    rounded(x[-1] / math.sqrt(1 + t**2), x[3] / math.sqrt(1 + s**2) + integral)


@pytest.mark.parametrize("method", ["multistep", "heun", "dpmpp_2m", "sde"])
def test_samplers_draw_what_the_denoiser_knows(method):
    """The best classifier on one number errs in (1 − KS)/2 of the cases: below 0.52 right is KS < 0.04."""
    N, count = 5, 6000
    denoise = ScaleMixtureDenoiser.of_gains(0.8, 2.0, 16)
    drawn = sample(denoise, (count, N, N), method=method, sigmas=noise_levels(64), generator=0)
    gains = 0.8 + 1.2 * torch.rand(count, dtype=D, generator=torch.Generator().manual_seed(1))
    fresh = gains.view(-1, 1, 1) * torch.randn(count, N, N, dtype=D, generator=torch.Generator().manual_seed(2))
    for statistic in (lambda J: J.square().mean((-1, -2)), lambda J: J[:, 0, 0], lambda J: J.diagonal(0, 1, 2).sum(1)):
        assert scipy.stats.ks_2samp(statistic(drawn), statistic(fresh)).statistic < 0.04


@pytest.mark.parametrize("method", ["multistep", "heun", "dpmpp_2m", "sde"])
def test_samplers_draw_the_exact_posterior(method):
    N, count = 4, 4000
    precision, cross = evidence_of(N)
    evidence = Evidence.of(precision, cross)
    exact = ScaleMixtureDenoiser(torch.ones(1), evidence=evidence)
    drawn = sample(exact, (count, N, N), method=method, sigmas=noise_levels(128), generator=3)
    covariance = torch.linalg.inv(precision + torch.eye(N, dtype=D))
    white = (drawn - cross @ covariance) @ torch.linalg.inv(torch.linalg.cholesky(covariance)).mT
    for entry in white.flatten(1).mT:  # 16 of them, none beyond what chance does once in 10 000
        assert scipy.stats.kstest(entry, "norm").pvalue > 1e-4 / N**2
    assert abs(float(white.square().mean()) - 1) < 4 * math.sqrt(2 / white.numel())


@pytest.mark.parametrize("method", ["multistep", "sde"])
def test_a_gaussian_is_exact_in_any_number_of_steps(method):
    N, count = 4, 4000
    precision, cross = evidence_of(N)
    evidence = Evidence.of(precision, cross)
    exact = ScaleMixtureDenoiser(torch.ones(1), evidence=evidence)
    drawn = sample(exact, (count, N, N), method=method, sigmas=noise_levels(4), evidence=evidence, generator=3)
    covariance = torch.linalg.inv(precision + torch.eye(N, dtype=D))
    white = (drawn - cross @ covariance) @ torch.linalg.inv(torch.linalg.cholesky(covariance)).mT
    for entry in white.flatten(1).mT:
        assert scipy.stats.kstest(entry, "norm").pvalue > 1e-4 / N**2
    assert abs(float(white.square().mean()) - 1) < 4 * math.sqrt(2 / white.numel())


def test_churn_forgets_what_a_denoiser_did_wrong_before():
    """A mean that is off by b while s > 2: the flow keeps b ∫ √c/(s √(s² + c)) ds of it, at c = 1 b asinh(1/2)."""
    exact, count, b = ScaleMixtureDenoiser(torch.ones(1)), 40_000, 1.0

    def wrong(x, s):
        return exact(x, s) + (b if float(s) > 2.0 else 0.0)

    flow, half, full = (
        float(sample(wrong, (count, 1, 1), sigmas=noise_levels(400), generator=0, **options).mean())
        for options in ({}, {"method": "sde"}, {"method": "sde", "churn": 1.0})
    )

    def left(churn):  # of y: (1 + η) ∫ (1/(s² + 1))^(η/2) b √(s² + 1)/s dθ
        return b * (1 + churn) * scipy.integrate.quad(lambda s: (s * s + 1) ** (-(1 + churn) / 2) / s, 2.0, 80.0)[0]

    error = 4 / math.sqrt(count) + 0.02  # chance, and the level that the denoiser's jump falls on
    assert left(0.0) == pytest.approx(math.asinh(0.5) * b, abs=0.02)
    for found, expected in ((flow, left(0.0)), (half, left(0.5)), (full, left(1.0))):
        assert abs(found - expected) < error
    assert full < half < flow


@pytest.mark.parametrize("method", ["multistep", "sde"])
@pytest.mark.parametrize(
    "levels", [noise_levels(16), noise_levels(24), noise_levels(64), *map(weight_levels, (50, 100))]
)
def test_what_is_known_stays_as_near_as_the_level(method, levels):
    spreads = []

    def zero(x, s):
        spreads.append(float((x / s).square().mean().sqrt()))
        return torch.zeros_like(x)

    found = sample(zero, (60, 60), method=method, sigmas=levels, generator=0)
    # Exactly, W_s is s ε: 1, within 4 × 0.012 of 3600 normals' spread. The rest is what steps err, at most 5 % here; it
    # is up to a factor of 60 by sde where longer ones than SHORT and CHURNED are corrected and have fresh noise.
    assert max(spreads) < 1.1
    assert min(spreads) > 0.9
    assert float(found.abs().max()) < 1e-6


def test_sparse_draws_are_sparse():
    """Exact zeros are beyond any sampler that ends at a finite noise: what is below it is counted as none."""
    drawn = sample(SpikeAndSlabDenoiser(0.2, 5.0), (500, 10, 10), generator=0)
    found = float((drawn.abs() > 0.02).double().mean())
    beyond = 0.2 * 2 * scipy.stats.norm.sf(0.02 / math.sqrt(5.0))
    assert abs(found - beyond) < 4 * math.sqrt(0.2 * 0.8 / drawn.numel())


def test_the_same_seed_gives_the_same_draws_and_going_on_from_a_level():
    denoise = ScaleMixtureDenoiser(torch.ones(1))
    one, other = (sample(denoise, (2, 3, 3), method="sde", generator=5) for _ in range(2))
    assert torch.equal(one, other)
    start = torch.randn(2, 3, 3, dtype=D)
    levels = noise_levels(16, 0.01, 0.002)
    near = sample(denoise, (2, 3, 3), sigmas=levels, start=start)
    assert float((near - start).abs().max()) < 0.01  # 0.01 of noise hides little


def test_guidance():
    prior = ScaleMixtureDenoiser(torch.ones(1))
    posterior = ScaleMixtureDenoiser(torch.ones(1), evidence=Evidence.of(*evidence_of(3)))
    x, s = torch.randn(2, 3, 3, dtype=D), torch.tensor(0.7)
    guided = {w: ClassifierFreeGuidance(posterior, prior, w)(x, s) for w in (0.0, 1.0, 2.0)}
    assert torch.equal(guided[0.0], prior(x, s)) and torch.equal(guided[1.0], posterior(x, s))
    rounded(guided[2.0], 2 * posterior(x, s) - prior(x, s))


def test_relabelling_neurons_relabels_the_posterior():
    order = torch.randperm(5)
    precision, cross = evidence_of(5)
    x, s = torch.randn(5, 5, dtype=D), torch.tensor(0.4)

    def relabelled(matrix):
        return matrix[order][:, order]

    def mean(precision, cross, x):
        return ScaleMixtureDenoiser(torch.tensor([0.5, 2.0]), evidence=Evidence.of(precision, cross))(x, s)

    rounded(mean(*map(relabelled, (precision, cross, x))), relabelled(mean(precision, cross, x)))


@pytest.mark.parametrize(
    ("levels", "peaks", "elsewhere"),
    [
        (noise_levels(12, 80.0, 0.002), [(1.0, 1.0, 1.8)], 0.5),
        (weight_levels(50, 12), [(1.0, 0.5, 1.5), (0.7, 0.7, 0.5)], 0.85),
    ],
)
def test_levels_have_the_density_that_they_are_said_to_have(levels, peaks, elsewhere):
    """Between any two neighbours lies the same share of it, by adaptive quadrature."""
    u = levels[:-1].log().tolist()

    def density(x):
        return elsewhere + sum(height * math.exp(-((x - mean) ** 2) / (2 * sd**2)) for height, mean, sd in peaks)

    shares = [scipy.integrate.quad(density, low, high)[0] for high, low in zip(u, u[1:], strict=False)]
    assert max(shares) / min(shares) < 1 + 1e-5


def test_levels_are_dense_enough_for_weights_of_a_known_sign():
    """Of |N(0, 1)|, as many draws are small by 28 levels as by 200 from the same noise.

    A matrix of 50 neurons has 2500 weights, and its share of those below 0.1 varies by 7 %. Off by 1 % in all matrices,
    who knows nothing but this share tells them from right ones with an accuracy of at most Φ(0.01/0.07/2) = 0.53.
    """

    def positive(x, s):
        variance = s * s / (1 + s * s)
        mean, spread = x / (1 + s * s), variance.sqrt()
        t = mean / spread
        return mean + spread * (-t * t / 2 - math.log(2 * math.pi) / 2 - torch.special.log_ndtr(t)).exp()

    few, many = (sample(positive, (300, 300), sigmas=weight_levels(50, steps), generator=1) for steps in (None, 200))
    for size in (0.05, 0.1, 0.2):
        assert float((few < size).sum() / (many < size).sum()) == pytest.approx(1, abs=0.01)


def test_levels():
    levels = noise_levels(18, 80.0, 0.002)
    assert len(levels) == 19 and levels[-1] == 0
    assert levels[0] == pytest.approx(80) and levels[-2] == pytest.approx(0.002)
    assert bool((levels[1:] < levels[:-1]).all())
    assert largest_sigma(1.0, 50) == 80
    assert largest_sigma(1.0, 50, alignment=2500) == 250


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: noise_levels(1), "at least 2; got 1"),
        (lambda: noise_levels(5, 0.001), "must exceed sigma_min"),
        (lambda: largest_sigma(1.0, 3, 10.0), "between 1 and N² = 9; got 10"),
        (lambda: Evidence.of(torch.zeros(2, 3), torch.zeros(2, 3)), "precision must be square"),
        (lambda: Evidence.of(torch.zeros(2, 2), torch.zeros(3, 3)), "must have one shape"),
        (lambda: Evidence.of(-torch.eye(2), torch.zeros(2, 2)), "no negative eigenvalue; got -1"),
        (lambda: Evidence.of(torch.eye(2) * math.nan, torch.zeros(2, 2)), "must be finite"),
        (lambda: ScaleMixtureDenoiser(torch.tensor([1.0, -1.0])), "positive"),
        (lambda: ScaleMixtureDenoiser(torch.ones(2), torch.ones(3)), "one for each of the variances"),
        (lambda: ScaleMixtureDenoiser.of_gains(2.0, 1.0), "must exceed low"),
        (lambda: SpikeAndSlabDenoiser(0.0, 1.0), r"lie in \(0, 1\]; got 0"),
        (lambda: sample(lambda x, s: x, (2, 2), method="euler"), "method must be one of"),
        (lambda: sample(lambda x, s: x, (2, 2), prior_variance=0.0), "prior_variance must be"),
        (lambda: sample(lambda x, s: x, (2, 2), method="heun", prior_variance=2.0), "'sde'; got 2.0 with 'heun'"),
        (lambda: sample(lambda x, s: x, (2, 2), churn=0.0), "churn must be"),
        (lambda: sample(lambda x, s: x, (2, 2), churn=1.0), "churn is for method='sde'; got 1.0 with 'multistep'"),
        (lambda: sample(lambda x, s: x, (2, 2), sigmas=torch.tensor([1.0, 2.0, 0.0])), "strictly falling"),
        (lambda: sample(lambda x, s: x, (2, 2), sigmas=torch.tensor([2.0, 1.0])), "end with 0"),
        (lambda: sample(lambda x, s: x, (2, 2), start=torch.zeros(3, 3)), r"\(2, 2\); got \(3, 3\)"),
    ],
)
def test_bad_input_says_what_was_expected(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def test_a_denoiser_that_fails_is_caught_where_it_does():
    with pytest.raises(FloatingPointError, match="noise level 80"):
        sample(lambda x, s: x * math.nan, (2, 2))
