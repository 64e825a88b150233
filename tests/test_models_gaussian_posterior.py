"""The exact posterior against brute force, Bayes' rule and its own calibration; empirical Bayes by the evidence."""

import math
from decimal import Decimal, localcontext

import numpy as np
import pytest
import scipy.stats
import torch

from neurosde import simulate_rate_network
from neurosde.evaluation.benchmark import RecoveryBenchmark, recovery_benchmark
from neurosde.likelihood import transition_statistics
from neurosde.models import Evidence, GaussianPosterior, empirical_bayes, least_squares, ridge
from neurosde.models.empirical_bayes import evidence_gain, ridge_parameter
from neurosde.models.gaussian_posterior import gaussian_log_evidence

D = torch.float64
DT, SIGMA, GAIN = 0.1, 0.3, 1.4


def draw(N=4, T=40, trials=2, seed=0, sigma=SIGMA, gain=GAIN):
    generator = torch.Generator().manual_seed(seed)
    W = gain / N**0.5 * torch.randn(N, N, generator=generator, dtype=D)
    h0 = torch.randn(trials, N, generator=generator, dtype=D)
    x, h = simulate_rate_network(W, h0, T, DT, 1.0, noise_std=sigma, return_h=True, generator=generator)
    return W, x, h


def regression(h):
    """Design X (n, N), targets Y (n, N) and noise sd of y, by hand."""
    y = ((h[:, 1:] - h[:, :-1]) / DT + h[:, :-1]).flatten(0, 1).numpy()
    return h[:, :-1].tanh().flatten(0, 1).numpy(), y, SIGMA / DT**0.5


def test_posterior_is_the_brute_force_one():
    """All N² weights as one vector, its N² × N² precision built by Kronecker products."""
    _, _, h = draw()
    X, Y, s = regression(h)
    N, v = X.shape[1], GAIN**2 / X.shape[1]
    design = np.kron(np.eye(N), X)
    covariance = np.linalg.inv(design.T @ design / s**2 + np.eye(N * N) / v)
    mean = covariance @ design.T @ Y.T.ravel() / s**2
    posterior = GaussianPosterior.from_statistics(transition_statistics(voltage=h, dt=DT), SIGMA, v)
    np.testing.assert_allclose(posterior.mean, mean.reshape(N, N), rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(np.kron(np.eye(N), posterior.covariance), covariance, rtol=1e-8, atol=1e-12)
    W = torch.randn(3, N, N, dtype=D)
    expected = scipy.stats.multivariate_normal(mean, covariance).logpdf(W.reshape(3, -1).numpy())
    np.testing.assert_allclose(posterior.log_prob(W), expected, rtol=1e-8)
    # The mean is ridge regression with λ = s²/v.
    np.testing.assert_allclose(posterior.mean, np.linalg.solve(X.T @ X + s**2 / v * np.eye(N), X.T @ Y).T, rtol=1e-9)
    np.testing.assert_allclose(ridge(transition_statistics(voltage=h, dt=DT), s**2 / v), posterior.mean, rtol=1e-9)


def test_bayes_rule():
    """log posterior − log likelihood − log prior is the same everywhere."""
    _, x, _ = draw()
    statistics = transition_statistics(x, DT)
    v = 0.5
    posterior = GaussianPosterior.from_statistics(statistics, SIGMA, v)
    W = torch.randn(6, 4, 4, dtype=D)
    prior = torch.as_tensor(scipy.stats.norm(0, v**0.5).logpdf(W.numpy())).sum((-1, -2))
    likelihood = statistics.log_likelihood(W, SIGMA)
    evidence = likelihood + prior - posterior.log_prob(W)
    cancellation = 1e-13 * float(likelihood.abs().max())
    torch.testing.assert_close(evidence, evidence[:1].expand(6), rtol=0, atol=cancellation)
    found = empirical_bayes(statistics, noise_std=SIGMA, prior_variance=v)
    assert found.log_evidence == pytest.approx(float(evidence[0]), abs=cancellation)


def test_the_evidence_of_a_gaussian_prior_obeys_it_at_any_weights(evidence_of):
    """Of two recordings and three variances, with two rows of W, along the neurons and by scipy."""
    variances, J = torch.tensor([0.1, 0.7, 5.0], dtype=D), torch.randn(2, 3, dtype=D)
    each = [evidence_of(3, 0.5, 30.0, seed=seed, J=J) for seed in (0, 5)]
    both = Evidence(*(torch.stack([getattr(e, name) for e in each]) for name in ("eigenvalues", "vectors", "cross")))
    found = gaussian_log_evidence(both, variances)
    assert found.shape == (2, 3)
    for e, row in zip(each, found, strict=True):
        precision = (e.vectors * e.eigenvalues @ e.vectors.mT).numpy()
        cross, W = (e.cross @ e.vectors.mT).numpy(), np.random.default_rng(0).normal(size=(2, 3))
        likelihood = (W * cross).sum() - 0.5 * (W @ precision * W).sum()
        expected = []
        for v in variances.tolist():
            C = np.linalg.inv(precision + np.eye(3) / v)
            posterior = sum(scipy.stats.multivariate_normal(b @ C, C).logpdf(w) for b, w in zip(cross, W, strict=True))
            expected.append(likelihood + scipy.stats.norm(0, v**0.5).logpdf(W).sum() - posterior)
        np.testing.assert_allclose(row - row[0], np.array(expected) - expected[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("precision", [1e-15, 1.0, 1e6, 1e15])
def test_the_evidence_of_a_precise_recording_keeps_its_digits(precision):
    """Beside the difference of large numbers in 60 digits; directions are known to different degrees, and one not."""
    N, variances = 5, torch.tensor([1e-3, 0.03, 0.2, 1.7, 40.0], dtype=D)
    eigenvalues = precision * torch.tensor([0.0, 1e-4, 0.01, 0.3, 1.0], dtype=D)
    cross = eigenvalues * torch.randn(3, N, dtype=D) + eigenvalues.sqrt() * torch.randn(3, N, dtype=D)
    expected = []
    with localcontext() as context:
        context.prec = 60
        for v in map(Decimal, variances.tolist()):
            terms = [
                v * sum(Decimal(b) ** 2 for b in column) / (1 + v * Decimal(e)) - 3 * (1 + v * Decimal(e)).ln()
                for e, column in zip(eigenvalues.tolist(), cross.mT.tolist(), strict=True)
            ]
            expected.append(sum(terms) / 2)
        expected = torch.tensor([float(one - expected[-1]) for one in expected], dtype=D)
    found = gaussian_log_evidence(Evidence(eigenvalues, None, cross), variances)
    torch.testing.assert_close(found - found[-1], expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("precision", [1e9, 1e15])
def test_the_gain_of_a_recording_that_says_all_is_that_of_weights_themselves(precision):
    """p(g | W) ∝ g^(−N²) exp(−N|W|²/2g²): E g² over it by integration, of gains that are equally probable before."""
    N, low, high = 20, 0.3, 3.0
    W = 1.1 / math.sqrt(N) * torch.randn(N, N, dtype=D)
    eigenvalues = precision * torch.logspace(-2, 0, N, dtype=D)
    g, total = np.linspace(low, high, 200_001), N * float(W.square().sum())
    log_density = -(N**2) * np.log(g) - total / (2 * g**2)
    density = np.exp(log_density - log_density.max())
    expected = math.sqrt((density * g**2).sum() / density.sum())
    found = evidence_gain(Evidence(eigenvalues, None, eigenvalues * W), low, high)
    assert float(found) == pytest.approx(expected, rel=1e-6)


def test_evidence_with_a_free_input_obeys_bayes_rule_too():
    statistics = transition_statistics(draw()[1], DT).without_input()
    posterior = GaussianPosterior.from_statistics(statistics, SIGMA, 0.5)
    W = torch.randn(4, 4, dtype=D)
    prior = float(scipy.stats.norm(0, 0.5**0.5).logpdf(W.numpy()).sum())
    expected = float(statistics.log_likelihood(W, SIGMA) - posterior.log_prob(W)) + prior
    found = empirical_bayes(statistics, noise_std=SIGMA, prior_variance=0.5)
    assert found.log_evidence == pytest.approx(expected, abs=1e-9)


def test_samples_have_its_moments():
    _, x, _ = draw()
    posterior = GaussianPosterior.from_statistics(transition_statistics(x, DT), SIGMA, 0.5)
    S = 20000
    draws = posterior.sample((S,), generator=0)
    z = posterior.whiten(draws).reshape(S, -1)
    assert float(z.mean(0).abs().max()) < 4.5 / S**0.5
    covariance = z.mT @ z / S
    assert float((covariance - torch.eye(16, dtype=D)).abs().max()) < 4.5 * (2 / S) ** 0.5
    low, high = posterior.interval(0.8)
    inside = float(((draws > low) & (draws < high)).double().mean())
    assert inside == pytest.approx(0.8, abs=4 * (0.16 / S) ** 0.5)
    torch.testing.assert_close(posterior.sd, posterior.covariance.diagonal().sqrt().expand(4, 4))


def test_truth_is_a_draw_of_the_posterior():
    """Simulation-based calibration, exactly: whitened truths of 300 networks are standard normal."""
    z = []
    for seed in range(300):
        W, _, h = draw(N=3, T=30, trials=1, seed=seed)
        posterior = GaussianPosterior.from_statistics(transition_statistics(voltage=h, dt=DT), SIGMA, GAIN**2 / 3)
        z.append(posterior.whiten(W).ravel())
    assert scipy.stats.kstest(torch.cat(z).numpy(), "norm").pvalue > 0.01


def test_relabelling_neurons_relabels_the_posterior():
    _, x, _ = draw(N=5)
    order = torch.tensor([3, 1, 4, 0, 2])
    one = GaussianPosterior.from_statistics(transition_statistics(x, DT), SIGMA, 0.4)
    other = GaussianPosterior.from_statistics(transition_statistics(x[..., order], DT), SIGMA, 0.4)
    torch.testing.assert_close(other.mean, one.mean[order][:, order])
    torch.testing.assert_close(other.covariance, one.covariance[order][:, order])


def test_more_data_contracts():
    _, x, _ = draw(T=400)
    pieces = [GaussianPosterior.from_statistics(transition_statistics(x[:, :T], DT), SIGMA, 0.5) for T in (10, 80, 400)]
    assert 0 < pieces[0].contraction < pieces[1].contraction < pieces[2].contraction < 1


def test_without_noise_W_is_known_on_the_span_and_keeps_its_prior_off_it():
    W, x, _ = draw(N=10, T=6, trials=1, sigma=0.0)
    v = GAIN**2 / 10
    posterior = GaussianPosterior.from_statistics(transition_statistics(x, DT), 0.0, v)
    assert 0 < posterior.noise_std < 1e-6
    directions = torch.linalg.svd(x[0, :-1])[2]
    unknown = directions[5:]
    torch.testing.assert_close(posterior.mean @ unknown.mT, torch.zeros(10, 5, dtype=D), rtol=0, atol=1e-6)
    variance = (unknown @ posterior.covariance * unknown).sum(-1)
    torch.testing.assert_close(variance, torch.full((5,), v, dtype=D), rtol=1e-6, atol=0)
    sd = (directions[:5] @ posterior.covariance * directions[:5]).sum(-1).sqrt()
    assert sd[0] < 1e-7  # the direction that the activity mostly took
    error = (posterior.mean - W) @ directions[:5].mT
    assert bool((error.abs() < 5 * sd).all())


def test_evidence_is_the_marginal_likelihood():
    """n = 8 targets of one neuron are jointly Gaussian with covariance v XXᵀ + s²; h is y scaled by b = dt."""
    _, _, h = draw(N=3, T=9, trials=1)
    X, Y, s = regression(h)
    v = 0.7
    marginal = scipy.stats.multivariate_normal(np.zeros(8), v * X @ X.T + s**2 * np.eye(8))
    expected = sum(marginal.logpdf(column) for column in Y.T) - Y.size * math.log(DT)
    found = empirical_bayes(transition_statistics(voltage=h, dt=DT), noise_std=SIGMA, prior_variance=v)
    assert found.log_evidence == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(("noise_std", "variance"), [(None, None), (SIGMA, None), (None, GAIN**2 / 4)])
def test_empirical_bayes_maximises_the_evidence(noise_std, variance):
    _, x, _ = draw(T=100)
    statistics = transition_statistics(x, DT)
    best = empirical_bayes(statistics, noise_std=noise_std, prior_variance=variance)
    assert noise_std is None or best.noise_std == pytest.approx(noise_std)
    assert variance is None or best.prior_variance == variance
    for factor in (0.8, 0.98, 1.02, 1.25):
        for name in ("noise_std", "prior_variance"):
            other = {"noise_std": best.noise_std, "prior_variance": best.prior_variance}
            if (noise_std if name == "noise_std" else variance) is None:
                other[name] *= factor
                assert empirical_bayes(statistics, **other).log_evidence < best.log_evidence


def test_empirical_bayes_finds_gain_and_noise():
    """Over 60 networks: σ̂ is right to its standard error; g² is the mean square of N² weights, sd 2/N² relative."""
    found = [empirical_bayes(transition_statistics(draw(N=8, T=300, seed=seed)[1], DT)) for seed in range(60)]
    sigma = np.array([one.noise_std for one in found])
    gain = np.array([one.gain(8) for one in found])
    assert abs(sigma.mean() - SIGMA) < 4 * sigma.std() / 60**0.5 + 0.001  # maximum marginal likelihood: bias O(1/n)
    assert abs((gain**2).mean() - GAIN**2) < 4 * (gain**2).std() / 60**0.5
    assert not any(one.at_floor for one in found)


def test_a_noise_free_recording_is_at_the_floor():
    _, x, _ = draw(N=5, T=200, sigma=0.0)
    found = empirical_bayes(transition_statistics(x.float(), DT))
    assert found.at_floor and found.noise_std < 1e-4


def test_the_gain_of_noise_free_recordings_is_found():
    """W is then known on all that was visited, so the evidence has the gain that W really has."""
    for seed in range(5):
        W, x, _ = draw(N=20, T=300, trials=5, sigma=0.0, seed=seed, gain=1.5)
        found = empirical_bayes(transition_statistics(x, DT))
        assert found.gain(20) == pytest.approx(float(W.square().sum() / 20) ** 0.5, rel=0.01)


def test_generalised_cross_validation_by_hat_matrices():
    _, _, h = draw(T=25)
    X, Y, _ = regression(h)
    statistics = transition_statistics(voltage=h, dt=DT)
    n, N = X.shape

    def score(r):
        hat = X @ np.linalg.solve(X.T @ X + r * np.eye(N), X.T)
        return ((Y - hat @ Y) ** 2).sum() / (1 - np.trace(hat) / n) ** 2

    best = ridge_parameter(statistics)
    assert all(score(best) <= score(best * factor) for factor in (0.5, 0.95, 1.05, 2.0))
    found = empirical_bayes(statistics)
    expected = statistics.noise_scale(found.noise_std) ** 2 / found.prior_variance
    assert ridge_parameter(statistics, "evidence") == pytest.approx(expected)


def test_least_squares_is_numpys():
    _, _, h = draw(T=25)
    X, Y, _ = regression(h)
    np.testing.assert_allclose(
        least_squares(transition_statistics(voltage=h, dt=DT)), np.linalg.lstsq(X, Y)[0].T, rtol=1e-8
    )


@pytest.mark.slow
def test_point_estimates_are_those_measured_before():
    """Relative errors measured once with independent code over 500 draws, to within both runs' sampling errors."""
    expected = {
        (5, 100): ("1.12", "0.586"),
        (5, 1000): ("0.308", "0.259"),
        (10, 100): ("2.29", "0.720"),
        (10, 1000): ("0.461", "0.355"),
        (20, 100): ("4.68", "0.838"),
        (20, 1000): ("0.703", "0.475"),
        (50, 100): ("11.6", "0.931"),
        (50, 1000): ("1.353", "0.654"),
    }
    networks = 120
    results = recovery_benchmark(RecoveryBenchmark(networks=networks, seed=1))
    for (N, T), pair in expected.items():
        cell = results.sel(neurons=N, times=T)
        for name, value in zip(("least_squares", "exact"), pair, strict=True):
            errors = cell[name].to_numpy()
            standard_error = errors.std(ddof=1) * math.sqrt(1 / networks + 1 / 500)
            rounding = 0.5 * 10.0 ** -len(value.partition(".")[2])
            assert abs(errors.mean() - float(value)) < 4 * standard_error + rounding, (N, T, name)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda s: GaussianPosterior.from_statistics(s, -1.0, 1.0), "noise_std must be non-negative"),
        (lambda s: GaussianPosterior.from_statistics(s, 0.3, 0.0), "prior_variance must be positive"),
        (lambda s: GaussianPosterior.from_statistics(s, 0.3, math.inf), "W is undetermined"),
        (lambda s: GaussianPosterior(torch.zeros(2, 2), torch.eye(3), torch.ones(2), 1.0, 0.1), "must fit"),
        (lambda s: GaussianPosterior(torch.zeros(2, 2), torch.eye(2), torch.zeros(2), 1.0, 0.1), "positive definite"),
        (lambda s: GaussianPosterior.from_statistics(s, 0.3, 1.0).interval(90), "level must lie between"),
        (lambda s: ridge(s, "aic"), "ridge parameter must be"),
        (lambda s: empirical_bayes(s, prior_variance=-1.0), "prior_variance must be positive"),
    ],
)
def test_bad_input_is_named(call, match):
    statistics = transition_statistics(draw(N=6, T=4, trials=1)[1], DT)
    with pytest.raises(ValueError, match=match):
        call(statistics)


def test_a_silent_recording_does_not_tell_gain_or_noise():
    statistics = transition_statistics(torch.zeros(9, 3, dtype=D), DT)
    with pytest.raises(ValueError, match="silent"):
        empirical_bayes(statistics)
