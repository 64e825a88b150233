"""Where the answer is known in closed form the network is not asked."""

import math
from dataclasses import replace

import pytest
import scipy.stats
import torch
from posteriors import GAIN, SIGMA, D, network_of, recording_of
from problems import GAUSSIAN, normal

from neurosde.datasets.ensemble_options import plain_parameters
from neurosde.datasets.ensembles import Dale, make_ensemble
from neurosde.models import (
    DaleDenoiser,
    GaussianPosterior,
    SpikeAndSlabMixtureDenoiser,
    SpikedDenoiser,
    analytic,
    analytic_dale,
    best_denoiser,
)
from neurosde.models.analytic import gain_quadrature
from neurosde.models.conditioned_denoiser import conditioned_denoiser, prior_denoiser
from neurosde.models.diffusion_cfg import CFGPosterior, PosteriorConfig
from neurosde.models.edm import Evidence, fold
from neurosde.models.empirical_bayes import evidence_gain
from neurosde.models.gaussian_posterior import gaussian_log_evidence
from neurosde.models.weight_posterior import WeightPosterior


@pytest.mark.parametrize("gain", [None, 0.9])
def test_weights_told_to_be_gaussian_have_their_exact_posterior(gain):
    """Whatever the network says: mean and draws beside those of a quadrature over the gain."""
    _, _, statistics = recording_of(T=12)
    network = network_of()
    trained = {"ensembles": [{"name": "dale", "gain": 9.0}, {"name": "gaussian", "gain": 0.3, "gain_high": 3.0}]}
    config = PosteriorConfig(network.config, 1.5, (4, 20), training=trained, gains=(0.3, 9.0))
    posterior = CFGPosterior(network, config).condition(statistics, noise_std=SIGMA, family="gaussian", gain=gain)
    evidence, N = posterior._most_probable(1)[0, 0], 6
    middles = 0.3 + 2.7 * (torch.arange(20_000, dtype=D) + 0.5) / 20_000
    gains = middles if gain is None else torch.tensor([gain], dtype=D)
    v = gains.square() / N
    chances = gaussian_log_evidence(evidence, v).softmax(-1)
    folded = fold(torch.zeros(len(v), N, N, dtype=D), math.inf, evidence, v)
    # Of the quadrature over log gain, in which log p bends by 2 N² at most: its error is step²/24 of that.
    step = 0.0045
    expected = (chances[:, None, None] * folded.posterior_mean).sum(0)
    torch.testing.assert_close(posterior.mean, expected, rtol=0, atol=step**2 / 24 * 2 * N**2)
    draws = 2000
    drawn = posterior.sample((draws,), generator=1)
    k = torch.multinomial(chances, 10 * draws, replacement=True, generator=torch.Generator().manual_seed(2))
    exact = folded.mean[k] + folded.variances[k].sqrt().unsqueeze(-2) * torch.randn(len(k), N, N, dtype=D)
    along = drawn @ evidence.vectors
    for one, other in zip(
        (along.flatten(1).norm(dim=1), *along.mT.norm(dim=2).mT),
        (exact.flatten(1).norm(dim=1), *exact.mT.norm(dim=2).mT),
        strict=True,
    ):
        assert scipy.stats.ks_2samp(one, other).pvalue > 1e-3
    if gain is None:
        untold = CFGPosterior(network, config).condition(statistics, noise_std=SIGMA).mean
        assert float((untold - posterior.mean).norm()) > 0.01 * float(posterior.mean.norm())


@pytest.mark.parametrize(("density", "exact"), [(1.0, True), (0.5, False)])
def test_sparse_weights_whose_connections_are_all_there_are_gaussian(density, exact):
    """Told the gain they have the exact Gaussian mean, whatever the network says; else that of Gaussian ones."""
    _, _, statistics = recording_of(T=12)
    network = network_of()
    config = replace(network.config, families=("gaussian", "sparse"))
    kinds = [make_ensemble("gaussian", 3.0, gain=0.3), make_ensemble("sparse", 3.0, gain=0.3, density=density)]
    trained = {"ensembles": [plain_parameters(kind) for kind in kinds]}
    model = CFGPosterior(network, PosteriorConfig(config, 1.5, (4, 20), training=trained, gains=(0.3, 3.0)))
    expected = GaussianPosterior.from_statistics(statistics, SIGMA, GAIN**2 / 6).mean
    found = model.condition(statistics, noise_std=SIGMA, gain=GAIN, family="sparse").mean
    assert exact == bool(torch.isclose(found, expected, rtol=1e-3, atol=1e-3).all())
    told = [model.condition(statistics, noise_std=SIGMA, family=name).mean for name in ("gaussian", "sparse")]
    assert exact == torch.equal(*told)


def test_weights_told_to_be_gaussian_are_never_0():
    """Of a network that has seen sparse weights: as many are small as the exact posterior has, and none is rounded."""
    _, _, statistics = recording_of(N=4, T=10, trials=1)
    network, count = network_of(), 2000
    model = CFGPosterior(network, PosteriorConfig(network.config, 1.5, (4, 20), sparse=True, gains=(0.3, 3.0)))
    told = model.condition(statistics, noise_std=SIGMA, gain=GAIN, family="gaussian")
    exact = GaussianPosterior.from_statistics(statistics, SIGMA, GAIN**2 / 4)
    small = 0.01 * GAIN / 2
    mean, sd = exact.mean.numpy(), exact.sd.numpy()
    chance = scipy.stats.norm.cdf(small, mean, sd) - scipy.stats.norm.cdf(-small, mean, sd)
    drawn = told.sample((count,), steps=6, generator=0)
    for weights in (drawn, told.refine(drawn, sweeps=8, steps=4, generator=1).draws):
        assert not (weights == 0).any()
        excess = int((weights.abs() < small).sum()) - count * chance.sum()
        assert abs(excess) < 4 * math.sqrt(2 * count * chance.sum())  # entries of a row are not independent
    untold = model.condition(statistics, noise_std=SIGMA, gain=GAIN)
    assert (untold.sample((count,), steps=6, generator=0) == 0).any()


# Without a recording


def trained_on(*kinds):
    network = network_of()
    config = replace(network.config, families=tuple(dict.fromkeys(kind.name for kind in kinds)))
    training = {"ensembles": [plain_parameters(kind) for kind in kinds]}
    return network, PosteriorConfig(config, 1.5, (4, 20), training=training, gains=(0.3, 3.0))


PRIORS = {
    "dale": ("dale", {}),
    "one inhibits": ("dale", {"excitatory_fraction": 0.95, "balance": 1.7}),
    "sparse": ("sparse", {}),
    "nearly empty": ("sparse", {"density": 0.02}),
}


def by_all_gains(base, low, high, unit):
    """The best denoiser by a quadrature over all gains, as dense as that of the narrowest posterior must be."""
    nodes, weights = gain_quadrature(math.log(low), math.log(high), 600)
    gains = nodes.exp() / unit
    if isinstance(base, Dale):
        return DaleDenoiser(base, gains, weights * gains)
    return SpikeAndSlabMixtureDenoiser(base.density, gains.square() / base.density, weights * gains)


@pytest.mark.parametrize("law", PRIORS)
@pytest.mark.parametrize(("N", "low", "high"), [(5, 1.3, 3.0), (24, 1.1, 11.0)])
def test_the_prior_of_a_family_that_is_told_is_the_best_one(law, N, low, high):
    """In any unit, of few entries and of many: whatever the data, draws, what is nearly empty, and 0."""
    name, parameters = PRIORS[law]
    kind = make_ensemble(name, high, gain=low, **parameters)
    network, config = trained_on(make_ensemble("gaussian", 3.0, gain=0.3), kind)
    gain = torch.tensor([[0.5, 2.0]] * 3, dtype=D)
    generator = torch.Generator().manual_seed(0)
    J = kind.sample_weights(6, N, generator).view(3, 2, N, N) * (math.sqrt(N) / gain)[..., None, None]
    J[2] = 0
    denoise, fine = prior_denoiser(network, config, name, N, gain, False), by_all_gains(kind.base, low, high, 1.0)
    for s in (0.02, 0.3, 2.0, 20.0):
        x = J + s * torch.randn(J.shape, generator=generator, dtype=D)
        x[2, 1] = 0
        unit = gain[..., None, None]
        off = denoise(x, torch.tensor([s, s], dtype=D)) - fine(x * unit, s * gain) / unit
        off = off.flatten(2).norm(dim=2) * math.sqrt(1 + s**-2)
        assert float(off.max()) < 1e-3  # of a standard deviation of one of N² directions, W


@pytest.mark.parametrize("name", ["dale", "sparse"])
def test_told_the_gain_too_the_prior_has_no_other(name):
    kind, N, s = make_ensemble(name, 3.0, gain=0.3), 6, torch.tensor(0.7)
    network, config = trained_on(kind)
    gain = torch.tensor([0.5, 2.0], dtype=D)
    x = torch.randn(2, N, N, generator=torch.Generator().manual_seed(0), dtype=D)
    found = prior_denoiser(network, config, name, N, gain, True)(x, s)
    one = make_ensemble(name, gain=1.0)
    g = torch.tensor([1 / math.sqrt(N * one.variance(N))], dtype=D)  # of root mean square gain 1
    expected = DaleDenoiser(one, g) if name == "dale" else SpikeAndSlabMixtureDenoiser(0.2, g.square() / 0.2)
    torch.testing.assert_close(found, expected(x, s))


def test_a_posterior_that_is_told_the_family_has_this_prior():
    """Of two recordings, whose units differ, in the shapes that split Gibbs asks in."""
    kind = make_ensemble("dale", 3.0, gain=0.3)
    network, config = trained_on(make_ensemble("gaussian", 3.0, gain=0.3), kind)
    statistics = [recording_of(seed=seed)[2] for seed in (0, 1)]
    told = CFGPosterior(network, config).condition(statistics, noise_std=SIGMA, family="dale")
    gain, s = torch.tensor([[0.6, 1.9]] * 3, dtype=D), torch.tensor([0.3, 2.0], dtype=D)
    x = torch.randn(3, 2, 6, 6, generator=torch.Generator().manual_seed(0), dtype=D)
    found = told._prior(gain)(x, s)
    for k, unit in enumerate((0.6, 1.9)):
        torch.testing.assert_close(found[:, k], best_denoiser(kind, unit)(x[:, k], s[k]), rtol=1e-6, atol=1e-6)


def test_parts_of_the_gains_are_as_all_at_once(monkeypatch):
    x, s = torch.randn(3, 6, 6, generator=torch.Generator().manual_seed(0), dtype=D), torch.tensor(0.7)
    best = [best_denoiser(make_ensemble(name, 3.0, gain=0.3), 1.0) for name in ("dale", "sparse")]
    best.append(DaleDenoiser(Dale(), torch.tensor([9.0, 1.0, 2.0]), torch.tensor([0.0, 0.5, 0.5])))
    whole = [denoise(x, s) for denoise in best]
    monkeypatch.setattr(analytic, "COMPONENT_ENTRIES", 1)
    monkeypatch.setattr(analytic_dale, "COMPONENT_ENTRIES", 1)
    for denoise, expected in zip(best, whole, strict=True):
        torch.testing.assert_close(denoise(x.clone(), s), expected)


def test_the_prior_is_the_networks_where_the_best_one_is_not_known():
    network, config = trained_on(make_ensemble("dale", 3.0, gain=0.3), make_ensemble("low-rank", 3.0, gain=0.3))
    N, s = 5, torch.tensor(0.8)
    gain, x = torch.full((3,), 1.7, dtype=D), torch.randn(3, N, N, generator=torch.Generator().manual_seed(0), dtype=D)
    nothing = Evidence.none(N).expand((3,))
    for family, known in ((None, False), ("low-rank", False), ("low-rank", True)):
        own = gain if known else evidence_gain(nothing, *config.gains)
        expected = conditioned_denoiser(network, config, family, nothing, own, known)
        ratio = float(own[0] / gain[0])
        found = prior_denoiser(network, config, family, N, gain, known)(x, s)
        torch.testing.assert_close(found, expected(x / ratio, s / ratio) * ratio)


@pytest.mark.parametrize("known", [None, 1.8])
def test_low_rank_weights_have_a_sampled_prior_where_noise_is_low(known):
    """Beside long chains of Gibbs sampling, of its own seed and of dense gains, in units of any gain."""
    kind, N = make_ensemble("low-rank", 3.0, gain=0.3, strength=1.1), 16
    network, config = trained_on(make_ensemble("gaussian", 3.0, gain=0.3), kind)
    gain = torch.full((2, 2), known or 1.0, dtype=D) if known else torch.tensor([[0.7, 2.0]] * 2, dtype=D)
    W = kind.sample_weights(4, N, torch.Generator().manual_seed(0)).view(2, 2, N, N)
    if known:
        W = W * known / (N * W.square().mean((-1, -2), keepdim=True)).sqrt()
    x = W * (math.sqrt(N) / gain)[..., None, None]
    denoise = prior_denoiser(network, config, "low-rank", N, gain, known is not None, sampled=True)
    if known:
        variances, chances = torch.tensor([known**2 - 1.1**2], dtype=D), None
    else:
        gains, chances = gain_quadrature(0.3, 3.0, 400)
        variances = gains.square()
    for s in (0.05, 0.3):
        noisy, levels = x + s * normal(2, 2, N, N, seed=1), torch.full((2, 2), s, dtype=D)
        wide = gain[..., None, None]
        best = SpikedDenoiser(variances, 1.1, 2, chances, burn_in=100, sweeps=1000, seed=7)
        mean, error = best.with_error(noisy * wide, levels * gain)
        _, own_error = SpikedDenoiser(variances, 1.1, 2, chances, chains=4, burn_in=5, sweeps=20).with_error(
            noisy * wide, levels * gain
        )
        off = (denoise(noisy, levels) * wide - mean).square().mean((-1, -2))
        # These ratios scatter by 0.4 of themselves, as F of 15 and, the variances being of 4 chains, 45 degrees would.
        assert (off < scipy.stats.f(15, 45).isf(1e-4 / 16) * (error + own_error)).all()
        assert float((off.sqrt() / (s * gain)).max()) * N < 1  # of a standard deviation of one of N² directions


def test_a_sampled_prior_is_for_split_gibbs_low_noise_and_gains_that_there_are(monkeypatch):
    kind, N = make_ensemble("low-rank", 3.0, gain=0.3), 6
    network, config = trained_on(kind)
    statistics, gain = recording_of()[2], torch.full((3,), 0.9, dtype=D)
    x, s = normal(3, N, N), torch.tensor([0.3, 0.5, 0.4], dtype=D)
    told = CFGPosterior(network, config).condition(statistics, noise_std=SIGMA, family="low-rank")
    sampled, network_said = told._prior(gain, True)(x, s), told._prior(gain)(x, s)
    for k, low in enumerate((True, False, True)):
        assert low != torch.allclose(sampled[k], network_said[k], rtol=0.01)
    # Structure of strength 1 alone has a root mean square gain of 1.
    for known in (0.9, 1.0):
        too_low = CFGPosterior(network, config).condition(statistics, noise_std=SIGMA, family="low-rank", gain=known)
        torch.testing.assert_close(too_low._prior(gain * 0 + known, True)(x, s), too_low._prior(gain * 0 + known)(x, s))
    asked = []

    def prior(_, gain, sampled=False):
        asked.append(sampled)
        return GAUSSIAN

    draws = told.sample((4,), steps=4, generator=0)
    monkeypatch.setattr(WeightPosterior, "_prior", prior)
    for method, is_sampled in (("gibbs", True), ("pigdm", False)):
        told.refine(draws, method=method, steps=4, generator=1)
        assert asked == [is_sampled]
        asked.clear()


def test_two_ranges_of_gains_have_no_closed_form():
    kinds = make_ensemble("dale", 3.0, gain=0.3), make_ensemble("dale", 2.0, gain=1.0)
    network, config = trained_on(*kinds)
    x, s = torch.randn(2, 5, 5, generator=torch.Generator().manual_seed(0), dtype=D), torch.tensor(0.8)
    nothing = Evidence.none(5).expand((2,))
    own = evidence_gain(nothing, *config.gains)
    expected = conditioned_denoiser(network, config, "dale", nothing, own, False)(x, s)
    torch.testing.assert_close(prior_denoiser(network, config, "dale", 5, own, False)(x, s), expected)
