"""The posterior by diffusion: its network, what it knows of a recording, guidance, and draws."""

import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
import torch
from posteriors import DT, FAMILIES, GAIN, SIGMA, D, model_of, network_of, recording_of

from neurosde.datasets.ensembles import make_ensemble
from neurosde.datasets.recordings import Recording
from neurosde.likelihood import transition_statistics
from neurosde.models import GaussianPosterior, ScaleMixtureDenoiser, load_prior
from neurosde.models.denoiser import PairNetwork
from neurosde.models.diffusion_cfg import CFGPosterior
from neurosde.models.edm import Evidence, fold, noise_levels
from neurosde.models.empirical_bayes import evidence_gain, sample_noise_scales
from neurosde.models.network_denoiser import Told, evaluate_network
from neurosde.models.probability_flow import flow_log_density
from neurosde.models.samplers import sample


def evidence_of(N, batch=(), count=7):
    phi, y = torch.randn(2, *batch, count, N, dtype=D)
    return Evidence.of(phi.mT @ phi, y.mT @ phi)


def answer(network, x, sigma, evidence, family=0, gain=1.3, gain_known=False):
    folded = fold(x, sigma, evidence)
    with torch.no_grad():
        return evaluate_network(network, folded, sigma, Told.of(len(x), family, gain, gain_known))


# The network


def test_relabelling_the_neurons_relabels_the_answer():
    network, x, sigma = network_of(), torch.randn(3, 7, 7, dtype=D), torch.tensor([0.05, 1.0, 30.0], dtype=D)
    phi, y = torch.randn(2, 3, 5, 7, dtype=D)  # fewer transitions than neurons
    order = torch.randperm(7)
    F, families = answer(network, x, sigma, Evidence.of(phi.mT @ phi, y.mT @ phi))
    phi, y = phi[..., order], y[..., order]
    moved, same = answer(network, x[:, order][:, :, order], sigma, Evidence.of(phi.mT @ phi, y.mT @ phi))
    torch.testing.assert_close(moved, F[:, order][:, :, order], rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(same, families, rtol=1e-7, atol=1e-7)
    assert float(F.std()) > 0.01 and families.exp().sum(-1).tolist() == pytest.approx([1, 1, 1])


def test_the_recording_changes_the_answer():
    network, x, sigma = network_of(), torch.randn(2, 5, 5, dtype=D), torch.tensor([1.0, 1.0], dtype=D)
    one, other = (answer(network, x, sigma, evidence_of(5, (2,)))[0] for _ in range(2))
    assert float((one - other).abs().max()) > 0.01


def test_gaussian_weights_of_known_gain_leave_nothing_to_the_network():
    network, x, sigma = network_of(), torch.randn(2, 5, 5, dtype=D), torch.tensor([0.1, 1.0], dtype=D)
    evidence = evidence_of(5, (2,))
    assert not answer(network, x, sigma, evidence, family=1, gain_known=True)[0].any()
    assert answer(network, x, sigma, evidence, family=1, gain_known=False)[0].any()
    assert answer(network, x, sigma, evidence, family=2, gain_known=True)[0].any()


def test_it_can_start_from_a_prior():
    """What knows of recordings is 0 at first: without a recording the answers are the prior's."""
    prior = load_prior("all").network
    started = PairNetwork(replace(prior.config, recordings=True))
    started.load_state_dict(started.state_dict() | prior.state_dict())
    x, sigma, nothing = torch.randn(4, 6, 6, dtype=D), torch.tensor([0.01, 0.3, 2.0, 20.0], dtype=D), Evidence.none(6)
    told = Told.of(4, 3)
    expected = evaluate_network(prior, fold(x, sigma, nothing), sigma, told)[0]
    found = evaluate_network(started, fold(x, sigma, nothing), sigma, told)[0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


# Exactness


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_an_untrained_one_is_the_exact_gaussian_posterior(scale):
    """However much is known: whitened draws are standard normal, by the best test there is against that."""
    _, _, statistics = recording_of()
    statistics = replace(statistics, xx=scale * statistics.xx, yx=scale * statistics.yx)
    posterior = model_of(trained=False).condition(statistics, noise_std=SIGMA, gain=GAIN)
    exact = GaussianPosterior.from_statistics(statistics, SIGMA, GAIN**2 / 6)
    torch.testing.assert_close(posterior.mean, exact.mean, rtol=1e-9, atol=1e-9)
    whitened = exact.whiten(posterior.sample((2000,), steps=4, generator=1))
    assert scipy.stats.kstest(whitened.flatten().numpy(), "norm").pvalue > 1e-3
    variance = whitened.square().mean((0, 1))  # of each direction, from 12 000 numbers
    assert float((variance - 1).abs().max()) < 4 * math.sqrt(2 / 12_000)
    correlation = torch.corrcoef(whitened.flatten(1).mT) - torch.eye(36, dtype=D)
    assert float(correlation.abs().max()) < 5 / math.sqrt(2000)


def test_the_sampler_is_exact_for_any_evidence():
    evidence = evidence_of(4).scaled(torch.tensor([0.0, 1.0, 1e5], dtype=D))
    assert evidence.eigenvalues.shape == (3, 4)
    start = 80 * torch.randn(3, 4, 4, dtype=D)

    def denoise(x, sigma):
        return fold(x, sigma, evidence).posterior_mean

    drawn = sample(denoise, start.shape, sigmas=noise_levels(3), start=start, evidence=evidence)
    c = 1 / (evidence.eigenvalues + 1).unsqueeze(-2)
    mean = evidence.cross * c
    expected = mean + (start @ evidence.vectors - mean) * (c / (c + 80.0**2)).sqrt()
    torch.testing.assert_close(drawn @ evidence.vectors, expected, rtol=1e-8, atol=1e-9)


def test_intervals_from_few_draws_cover_what_they_say():
    """On average over the draws: of nine, the next one lies between the first and the last with probability 0.8."""
    _, _, statistics = recording_of()
    exact = GaussianPosterior.from_statistics(statistics, SIGMA, GAIN**2 / 6)
    posterior = model_of(trained=False).condition(statistics, noise_std=SIGMA, gain=GAIN)
    covered = []
    for seed in range(8):
        low, high = (torch.special.ndtr((end - exact.mean) / exact.sd) for end in posterior.interval(0.8, 9, seed))
        covered.append(float((high - low).mean()))
    # Each row of six weights is independent: the standard error is at most that of 8 × 6 numbers of variance 0.16/11.
    assert abs(np.mean(covered) - 0.8) < 4 * math.sqrt(0.16 / 11 / 48)


def test_more_recordings_contract_the_posterior():
    _, _, one = recording_of(seed=1)
    both = one + recording_of(T=400, seed=1)[2]
    model = model_of(trained=False)
    wide, narrow = (model.condition(known, noise_std=SIGMA).sd(400) for known in (one, both))
    assert bool((narrow < wide).all()) and narrow.shape == (6, 6)


# Density


def test_without_a_network_the_density_is_that_of_the_gaussian_posterior():
    W, _, statistics = recording_of(N=4)
    posterior = model_of(trained=False).condition(statistics, noise_std=SIGMA, gain=GAIN)
    exact = GaussianPosterior.from_statistics(statistics, SIGMA, GAIN**2 / 4)
    drawn = torch.stack([W, *exact.sample((3,), 0)])
    torch.testing.assert_close(
        posterior.log_prob(drawn, steps=3, probes=1), exact.log_prob(drawn), rtol=1e-9, atol=1e-8
    )


@pytest.mark.parametrize(("known", "resolution"), [(False, 0.0), (True, 0.0), (True, 0.3)])
def test_the_density_of_a_scale_mixture(known, resolution):
    """Against the mixture of the posteriors for each variance, by their evidence: second order in the steps."""
    N, variances, shares = 2, torch.tensor([0.4, 1.5], dtype=D), torch.tensor([0.3, 0.7], dtype=D)
    torch.manual_seed(0)
    phi, y = torch.randn(2, 4, N, dtype=D)
    evidence = Evidence.of(phi.mT @ phi, y.mT @ phi) if known else None
    J = torch.randn(5, N, N, dtype=D)
    parts = []
    for v, share in zip(variances, shares, strict=True):
        normal = torch.distributions.MultivariateNormal
        precision = torch.eye(N, dtype=D) / v + (phi.mT @ phi if known else 0)
        mean = (y.mT @ phi if known else torch.zeros(N, N, dtype=D)) @ torch.linalg.inv(precision)
        weight = share.log()
        if known:
            marginal = normal(torch.zeros(4, dtype=D), torch.eye(4, dtype=D) + v * phi @ phi.mT)
            weight = weight + marginal.log_prob(y.mT).sum()
        covariance = torch.linalg.inv(precision) + resolution**2 * torch.eye(N, dtype=D)
        parts.append((weight, normal(mean, covariance).log_prob(J).sum(-1)))
    weights = torch.stack([weight for weight, _ in parts]).log_softmax(0)
    expected = torch.logsumexp(weights.unsqueeze(-1) + torch.stack([density for _, density in parts]), 0)
    denoise = ScaleMixtureDenoiser(variances, shares, evidence)
    errors = []
    for steps in (48, 96):  # from a σ_max at which the law is next to normal
        sigmas = noise_levels(steps, 2000.0)
        found = flow_log_density(denoise, J, sigmas=sigmas, evidence=evidence, resolution=resolution, probes=None)
        errors.append(float((found - expected).abs().max()))
    assert errors[1] < 0.01 and errors[1] < 0.4 * errors[0]


def test_traces_from_random_signs_are_not_biased():
    model = model_of()
    W, _, statistics = recording_of(N=3)
    posterior = model.condition([statistics], noise_std=SIGMA)
    exact = posterior.log_prob(W.unsqueeze(0), probes=None, steps=8)
    estimates = posterior.log_prob(W.expand(400, 1, 3, 3), probes=1, steps=8, generator=1)
    assert exact.shape == (1,) and estimates.shape == (400, 1)
    error = float(estimates.std()) / 20
    assert error > 0 and abs(float(estimates.mean() - exact)) < 4 * error
    with pytest.raises(ValueError, match=r"weights must be of shape \(..., 1, 3, 3\)"):
        posterior.log_prob(torch.zeros(4, 4))
    with pytest.raises(ValueError, match="probes must be"):
        posterior.log_prob(W.unsqueeze(0), probes=0)
    with pytest.raises(ValueError, match="resolution must be below the largest noise level"):
        posterior.log_prob(W.unsqueeze(0), resolution=1000.0)


# What is estimated


def test_the_gain_of_a_recording_is_that_of_bayes():
    _, _, statistics = recording_of(N=3, T=12, trials=1)
    s = statistics.noise_scale(SIGMA)
    gains = np.linspace(0.4, 3.0, 400)
    log_evidence = []
    rng = np.random.default_rng(0)
    z = torch.as_tensor(rng.standard_normal((40_000, 3, 3)))
    for gain in gains[::20]:
        log_likelihood = statistics.log_likelihood(gain / math.sqrt(3) * z, SIGMA)
        log_evidence.append(float(torch.logsumexp(log_likelihood, 0)))
    weights = np.exp(np.interp(gains, gains[::20], log_evidence) - max(log_evidence))
    expected = math.sqrt((weights * gains**2).sum() / weights.sum())
    evidence = Evidence.of(statistics.xx / s**2, statistics.yx / s**2)
    assert float(evidence_gain(evidence, 0.4, 3.0)) == pytest.approx(expected, rel=0.03)
    uniform = math.sqrt(((3**3 - 0.4**3) / 3) / 2.6)
    assert float(evidence_gain(Evidence.none(3), 0.4, 3.0)) == pytest.approx(uniform, rel=3e-3)


def test_noise_is_drawn_from_its_posterior():
    """Against the marginal likelihood of y as a multivariate normal, on a grid of σ and g."""
    N, low, high = 2, 0.5, 2.0
    W, x, _ = recording_of(N=N, T=14, trials=1)
    h = torch.atanh(x)
    statistics = transition_statistics(voltage=h, dt=DT)
    y = ((h[0, 1:] - (1 - DT) * h[0, :-1]) / DT).numpy()
    phi = x[0, :-1].numpy()
    scales = np.geomspace(0.3, 4.0, 160)
    density = np.zeros(len(scales))
    for gain in np.geomspace(low, high, 25):
        for k, s in enumerate(scales):
            covariance = gain**2 / N * phi @ phi.T + s**2 * np.eye(len(phi))
            density[k] += math.exp(sum(scipy.stats.multivariate_normal.logpdf(y.T, cov=covariance)))
    cumulated = np.cumsum(density) / density.sum()
    drawn = sample_noise_scales(statistics, 4000, (low, high), torch.Generator().manual_seed(0)).numpy()
    distance = scipy.stats.kstest(drawn, lambda at: np.interp(at, scales, cumulated)).statistic
    assert distance < 1.95 / math.sqrt(4000) + 0.02  # the grids' own error


def test_unknown_noise_widens_the_posterior():
    _, _, statistics = recording_of(T=12, trials=1)
    model = model_of(trained=False)
    posterior = model.condition(statistics)
    precisions = posterior._drawn(500, torch.Generator().manual_seed(0)).eigenvalues
    assert precisions.shape == (500, 1, 6) and (precisions.std(0) > 0.1 * precisions.mean(0)).all()
    assert not model.condition(statistics, noise_std=SIGMA)._drawn(5, None).eigenvalues.std(0).any()


# Guidance, batches


def test_without_guidance_it_is_the_prior():
    model = model_of()
    _, _, statistics = recording_of()
    drawn = model.condition(statistics, noise_std=SIGMA).sample((3,), guidance=0.0, steps=8, generator=0)
    other = model.condition(recording_of(seed=5)[2], noise_std=SIGMA)
    # The unit of J is each recording's own: the draws are the same but for the steps of the sampler.
    again = other.sample((3,), guidance=0.0, steps=8, generator=0)
    assert drawn.shape == (3, 6, 6) and not torch.equal(drawn, again)
    told = [model.condition(one, noise_std=SIGMA, gain=1.0) for one in (statistics, recording_of(seed=5)[2])]
    first, second = (one.sample((3,), guidance=0.0, steps=8, generator=0) for one in told)
    assert torch.equal(first, second)


def test_guidance_beyond_its_interval_does_nothing():
    _, _, statistics = recording_of()
    posterior = model_of().condition(statistics, noise_std=SIGMA)
    plain, out, inside = (
        posterior.sample((2,), guidance=w, guidance_interval=interval, steps=6, generator=0)
        for w, interval in ((1.0, (0.0, math.inf)), (2.0, (100.0, 200.0)), (2.0, (0.0, 1.0)))
    )
    assert torch.equal(plain, out) and not torch.allclose(plain, inside)


def test_several_recordings_at_once_are_as_one_after_the_other():
    model = model_of()
    recordings = [recording_of(seed=seed)[2] for seed in (1, 2, 3)]
    together = model.condition(recordings, noise_std=SIGMA)
    alone = [model.condition(one, noise_std=SIGMA) for one in recordings]
    torch.testing.assert_close(together.mean, torch.stack([one.mean for one in alone]), rtol=1e-4, atol=1e-4)
    assert together.sample((2, 4), steps=3).shape == (2, 4, 3, 6, 6)
    probabilities = together.family_probabilities
    assert set(probabilities) == set(FAMILIES) and probabilities["dale"].shape == (3,)
    assert float(alone[1].family_probabilities["dale"]) == pytest.approx(float(probabilities["dale"][1]), abs=0.02)
    low, high = together.interval(0.5, 100)
    assert low.shape == (3, 6, 6) and bool((low < high).all())


def test_it_takes_recordings_and_paths(tmp_path):
    _, x, statistics = recording_of()
    model = model_of(trained=False)
    given = [Recording(x.numpy(), "here", dt=DT), statistics]
    means = [model.condition(one, noise_std=SIGMA, gain=GAIN).mean for one in given]
    torch.testing.assert_close(*means, rtol=1e-6, atol=1e-6)
    np.savez(tmp_path / "r.npz", activity=x.numpy(), dt=DT)
    found = model.condition(tmp_path / "r.npz", noise_std=SIGMA, gain=GAIN).mean
    torch.testing.assert_close(found, means[0])


def test_saved_it_is_the_same(tmp_path):
    model = model_of()
    path = model.save(tmp_path / "posterior.safetensors")
    loaded = CFGPosterior.from_pretrained(tmp_path)
    assert loaded.config.gains == (0.3, 3.0) and loaded.families == FAMILIES
    _, _, statistics = recording_of()
    drawn = [one.condition(statistics, noise_std=SIGMA).sample((2,), steps=4, generator=0) for one in (model, loaded)]
    torch.testing.assert_close(*drawn, rtol=1e-3, atol=1e-3)  # float32
    with pytest.raises(ValueError, match="is not a prior of neurosde"):
        load_prior(path)
    load_prior("dale").save(tmp_path / "prior.safetensors")
    with pytest.raises(ValueError, match="is not a posterior of neurosde; write one with neurosde train cfg"):
        CFGPosterior.from_pretrained(tmp_path / "prior.safetensors")
    with pytest.raises(FileNotFoundError, match="nor one of the posteriors"):
        CFGPosterior.from_pretrained("nothing")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"family": "block"}, r"family must be one of \['dale', 'gaussian'\]; got 'block'"),
        ({"noise_std": -1.0}, "noise_std must be"),
        ({"gain": 0.0}, "gain must be"),
    ],
)
def test_conditions_that_cannot_be(options, match):
    with pytest.raises(ValueError, match=match):
        model_of().condition(recording_of()[2], **options)


def test_recordings_of_other_sizes():
    with pytest.raises(ValueError, match=r"of one size; got \[5, 6\] neurons"):
        model_of().condition([recording_of()[2], recording_of(N=5)[2]])
    posterior = model_of().condition(recording_of()[2], family="dale")
    with pytest.raises(ValueError, match="leave family out"):
        _ = posterior.family_probabilities
    with pytest.raises(ValueError, match="weight must be"):
        posterior.sample(guidance=-1.0)
    with pytest.raises(TypeError, match=r"a sequence of numbers; got 3\. Give \(3,\)\."):
        posterior.sample(3)
    with pytest.raises(ValueError, match="weights must be finite"):
        posterior.log_prob(torch.full((posterior.num_neurons,) * 2, math.nan))
    with pytest.raises(ValueError, match="level must lie"):
        posterior.interval(1.5)
    with pytest.raises(ValueError, match=r"4 draws have no interval of 0\.9, .* covers 0\.6; give draws=19 or more"):
        posterior.interval(0.9, draws=4)


# Training


def test_ensembles_that_recordings_are_made_of():
    kind = make_ensemble("low-rank", 2.0, gain=0.5)
    assert kind.sample_gains(3).shape == (3,) and kind.matrices(torch.ones(2, dtype=D), 4, None).shape == (2, 4, 4)
