"""Refining draws: guidance from where draws stand, split Gibbs, and what an inference keeps of it."""

import math
from dataclasses import replace

import arviz_base
import numpy as np
import pytest
import scipy.stats
import torch
from problems import GAUSSIAN, D, normal

from neurosde.datasets import generate_activity_trials, sample_weight_matrix
from neurosde.datasets.recordings import Recording
from neurosde.models import (
    CFGPosterior,
    Evidence,
    GaussianPosterior,
    GuidedDiffusion,
    InferenceConfig,
    fold,
    infer,
    load_prior,
    open_posterior,
    resolution,
    save_posterior,
)
from neurosde.models.denoiser import PRESETS, PairNetwork
from neurosde.models.diffusion_cfg import PosteriorConfig
from neurosde.models.diffusion_prior import DiffusionPrior, PriorConfig

SIGMA, DT = 0.3, 0.1


def whitened(draws, evidence):
    exact = fold(torch.zeros_like(draws), math.inf, evidence)
    return exact.whitened(draws - exact.posterior_mean)


def recording(N=12, ensemble="dale", T=150, g=1.5, trials=2, seed=0):
    W = sample_weight_matrix(N, g=g, ensemble=ensemble, generator=seed)
    x = generate_activity_trials(W, trials, T, DT, noise_std=SIGMA, generator=seed + 1)
    return W, Recording(x.numpy(), "here", dt=DT)


def untrained():
    """A posterior whose prior is Gaussian, of the gain that it is told."""
    config = replace(PRESETS["tiny"], families=("gaussian", "dale"), recordings=True)
    return CFGPosterior(PairNetwork(config).double(), PosteriorConfig(config, 1.5, (4, 20), gains=(0.3, 3.0)))


@pytest.mark.parametrize("guidance", ["mmps", "pigdm"])
@pytest.mark.parametrize("high", [10.0, 1e4])
def test_of_a_gaussian_prior_guided_draws_are_exact_from_anywhere(evidence_of, guidance, high):
    N, count = 4, 3000
    evidence = evidence_of(N, high=high)
    far = GuidedDiffusion(GAUSSIAN, guidance, steps=8, rho=80.0).refine(5 + normal(count, N, N, seed=3), evidence, 0)
    near = GuidedDiffusion(GAUSSIAN, guidance, steps=8, rho=1.0).refine(far.draws, evidence, 1)
    for found in (far, near):
        white = whitened(found.draws, evidence)
        for entry in white.flatten(1).mT:  # a start that is off by 5 leaves 5/80 of a spread where nothing is recorded
            assert scipy.stats.kstest(entry, "norm").statistic < 0.0625 * 0.4 + 1.95 / math.sqrt(count)
        assert abs(float(white.square().mean()) - 1) < 4 * math.sqrt(2 / white.numel()) + 0.0625**2
    assert far.evaluations == 8 and far.r_hat == {} and float(far.rho) == 80.0
    assert float(near.moved) == pytest.approx(
        float((near.draws - far.draws).square().mean().sqrt() / near.draws.var(0).mean().sqrt())
    )


def test_draws_are_kept_as_far_as_rho_leaves_them():
    """Without a recording, of a Gaussian prior: W' = (W + ρ ε)/√(1 + ρ²), whatever the steps."""
    W = 3 + normal(4000, 2, 2, seed=4)
    found = GuidedDiffusion(GAUSSIAN, "mmps", steps=8, rho=0.5).refine(W, Evidence.none(2), 0).draws
    assert abs(float(found.mean()) - 3 / math.sqrt(1.25)) < 4 / math.sqrt(found.numel())


@pytest.mark.parametrize("own", [False, True])
def test_a_draw_that_diverges_is_let_go_and_the_others_are_as_without_it(evidence_of, own):
    """Of five draws the third sees a recording of which it diverges: the others must not notice."""
    N, count = 3, 5
    stiff = torch.tensor([1.0, 1.0, 1e6, 1.0, 1.0], dtype=D)
    mild = evidence_of(N, 0.3, 3.0).expand((count,))
    start, all_mild = normal(count, N, N, seed=5), torch.ones(count, dtype=D)

    def refined(times):
        evidence = Evidence(mild.eigenvalues * times[:, None], mild.vectors, mild.cross * times[:, None, None])
        log_prob = (lambda J: -0.5 * times * (J - 1).square().sum((-1, -2))) if own else None
        return GuidedDiffusion(GAUSSIAN, "dps", steps=16, rho=1.0, log_prob=log_prob).refine(start, evidence, 0)

    with pytest.warns(UserWarning, match=r"guidance 'dps' diverges for 1 of 5 draws.* --method .*with rho \(--rho\)"):
        found = refined(stiff)
    expected = refined(all_mild)
    kept = torch.tensor([True, True, False, True, True])
    assert torch.equal(found.diverged, ~kept) and not expected.diverged.any()
    assert torch.equal(found.draws[2], start[2]) and torch.equal(found.draws[kept], expected.draws[kept])
    with pytest.raises(FloatingPointError, match="guidance 'dps' diverges for 5 of 5 draws, at noise level 1 first"):
        refined(1e6 * all_mild)


@pytest.mark.slow
def test_refining_the_gaussian_posterior_finds_what_it_is_told(tmp_path):
    W, here = recording()
    plain = infer(here, InferenceConfig(noise_std=SIGMA, draws=24, predictive_draws=2))
    config = InferenceConfig(noise_std=SIGMA, draws=24, predictive_draws=2, refine="gibbs", family="dale")
    refined = infer(here, config)

    # Of a right posterior the truth is one draw more: its squared distance from the mean of S draws is (1 + 1/S) of
    # the total variance, and with the spectrum of their covariance about χ² of (tr C)²/tr C² degrees of freedom.
    C = torch.cov(refined.draws.flatten(1).mT)
    total, count = float(C.trace()), len(refined.draws)
    squares = float(C.square().sum()) - total**2 / (count - 1)  # what the number of draws adds to tr C²
    freedom = total**2 / squares

    def tail(estimate, draws):
        square = float((estimate - W).square().sum()) / (total * (1 + 1 / draws))
        return scipy.stats.chi2(freedom).sf(square * freedom)

    assert tail(plain.posterior.mean, math.inf) < 1e-5 < 1e-3 < tail(refined.draws.mean(0), count) < 1 - 1e-3
    torch.testing.assert_close(refined.unrefined, plain.draws)
    assert any("refined by gibbs" in note and "R-hat" in note for note in refined.notes)
    tree = open_posterior(save_posterior(refined, tmp_path / "refined.nc"))
    assert tree["refinement"].sizes["sweep"] == len(refined.refinement.rho) and float(
        tree["refinement"]["refine_seconds"]
    )
    assert tree["unrefined"]["weights"].shape == tree["posterior"]["weights"].shape == (1, 24, 12, 12)
    assert "recording_log_likelihood" in tree["sample_stats"] and tree.attrs["refined_by"] == "gibbs"
    assert len(arviz_base.convert_to_datatree(tree).children)


@pytest.mark.parametrize(
    ("settings", "sweeps", "rho"),
    [
        ({"method": "cfg"}, 8, 0.3),
        ({"method": "cfg", "sweeps": 9, "rho": 0.5}, 9, 0.5),
        ({"method": "cfg", "guidance": 2.0}, 12, 1.0),
        ({"method": "exact"}, 12, 1.0),
    ],
)
def test_draws_go_less_far_where_they_are_those_of_the_posterior_that_refines_them(settings, sweeps, rho):
    _, here = recording(6)
    config = InferenceConfig(**settings, refine="gibbs", draws=4, predictive_draws=0)
    found = infer(here, config).refinement
    assert len(found.rho) == sweeps and float(found.rho[0]) == pytest.approx(rho)


def test_draws_of_no_posterior_become_draws_of_one():
    """Least squares has a flat prior, and draws of the prior are not checked; once refined both are a posterior's."""
    W, here = recording(6, T=200)
    flat = InferenceConfig(method="least-squares", draws=12, predictive_draws=0, seed=1)
    assert math.isnan(infer(here, flat).contraction) and infer(here, flat).checks == ()
    refined = infer(here, InferenceConfig(method="least-squares", draws=12, predictive_draws=0, refine="gibbs"))
    assert math.isnan(refined.contraction) and refined.checks
    prior = InferenceConfig(
        method="cfg", guidance=0.0, steps=4, draws=12, predictive_draws=0, refine="gibbs", sweeps=24
    )
    found = infer(here, prior)
    assert found.checks and any("no proof that wrong ones would have come right" in note for note in found.notes)
    unrefined = infer(here, InferenceConfig(method="cfg", guidance=0.0, steps=4, draws=12, predictive_draws=0)).draws
    assert float((found.draws.mean(0) - W).norm()) < 0.5 * float((unrefined.mean(0) - W).norm())


def test_refined_draws_are_those_of_the_prior_and_the_likelihood():
    """An untrained network has the Gaussian prior, wherever draws begin; each with its own noise, if that is open."""
    gain = 1.2
    given = untrained().condition(recording(4, "gaussian", T=60, g=gain)[1], noise_std=SIGMA, gain=gain)
    found = given.refine(3 + normal(400, 4, 4), sweeps=40, steps=4, generator=0)
    exact = GaussianPosterior.from_statistics(given.statistics[0], SIGMA, gain**2 / 4)
    for one in exact.whiten(found.draws).unbind(-1):
        assert scipy.stats.kstest(one.flatten(), "norm").pvalue > 0.01
    short = untrained().condition(recording(4, "gaussian", T=10, g=gain, trials=1)[1], gain=gain)
    wide = short.refine(normal(400, 4, 4), sweeps=40, steps=4, generator=0).draws
    direct = short.sample((400,), steps=4, generator=1)
    same = [scipy.stats.ks_2samp(wide[:, i, j], direct[:, i, j]).pvalue for i in range(4) for j in range(4)]
    assert min(same) > 0.01 / 16


@pytest.mark.parametrize("known", [SIGMA, None])
def test_several_recordings_are_refined_at_once(known):
    """Of an untrained network: each comes to the Gaussian posterior of its own recording."""
    gain = 1.2
    recordings = [
        recording(4, "gaussian", T=60, g=gain, trials=trials, seed=seed)[1] for seed, trials in ((1, 1), (2, 3))
    ]
    given = untrained().condition(recordings, noise_std=known, gain=gain)
    found = given.refine(3 + normal(400, 2, 4, 4), sweeps=40, steps=4, generator=0)
    assert found.draws.shape == (400, 2, 4, 4) and found.rho.shape == (40, 2)
    direct = given.sample((400,), steps=4, generator=1)
    same = scipy.stats.ks_2samp(found.draws.flatten(1).numpy(), direct.flatten(1).numpy(), axis=0).pvalue
    assert same.min() > 0.01 / 32 and float((found.draws[:, 0].mean(0) - found.draws[:, 1].mean(0)).norm()) > 0.5


@pytest.mark.parametrize("method", ["gibbs", "mmps", "pigdm", "dps"])
def test_in_chaos_draws_from_anywhere_come_to_the_exact_posterior_or_it_is_said_that_they_do_not(method):
    """g = 2.5, T = 1000: directions are known to very different degrees. Told gain and family, the prior is normal."""
    _, here = recording(8, "gaussian", T=1000, g=2.5, trials=1)
    given = CFGPosterior.from_pretrained("base").condition(here, noise_std=SIGMA, gain=2.5, family="gaussian")
    exact = GaussianPosterior.from_statistics(given.statistics[0], SIGMA, 2.5**2 / 8)
    assert float(exact.direction_sd.max() / exact.direction_sd.min()) > 10
    start, options = 3 * normal(8, 8, 8, seed=5), {"sweeps": 16} if method == "gibbs" else {"steps": 32, "rho": 80.0}
    if method == "dps":
        with pytest.raises(FloatingPointError, match="diverges for 8 of 8 draws"):
            given.refine(start, method=method, generator=0, **options)
        return
    found = given.refine(start, method=method, generator=0, **options)
    white = exact.whiten(found.draws).flatten().numpy()
    assert scipy.stats.kstest(white, "norm").pvalue > 1e-3 and not found.diverged.any()
    assert 1e-3 < scipy.stats.chi2(white.size).cdf(np.square(white).sum()) < 1 - 1e-3


@pytest.mark.parametrize("method", ["gibbs", "mmps"])
def test_a_prior_of_weights_alone_in_place_of_the_posteriors_own(method):
    """An untrained prior is N(0, g_rms²/N), of which the exact posterior is known; draws of another gain come to it."""
    N, gain, count = 6, 1.2, 300
    _, here = recording(N, "gaussian", T=80)
    network = PairNetwork(PRESETS["tiny"])
    prior = DiffusionPrior(network, PriorConfig(network.config, gain, (4, 8)))
    given = CFGPosterior.from_pretrained("base").condition(here, noise_std=SIGMA, family="dale")
    statistics = given.statistics[0]
    exact = GaussianPosterior.from_statistics(statistics, SIGMA, gain**2 / N)
    start = GaussianPosterior.from_statistics(statistics, SIGMA, 0.3**2 / N).sample((count,), 1)
    options = {"sweeps": 16} if method == "gibbs" else {"steps": 32, "rho": 80.0}
    assert scipy.stats.kstest(exact.whiten(start).flatten().numpy(), "norm").pvalue < 1e-6
    found = given.refine(start, method=method, prior=prior, generator=0, **options).draws
    white = exact.whiten(found).numpy()  # (draw, post, direction)
    assert scipy.stats.kstest(white.ravel(), "norm").pvalue > 1e-3
    for square, freedom in ((count * np.square(white.mean(0)), 1), (np.square(white).sum((0, 1)), count * N)):
        assert scipy.stats.chi2(freedom).sf(square.max()) > 1e-3 / square.size
        assert scipy.stats.chi2(freedom).cdf(square.min()) > 1e-3 / square.size


def test_a_prior_of_weights_alone_for_several_recordings():
    """As above, where each recording suggests a gain, and so a unit, of its own."""
    N, gain, count = 4, 1.2, 300
    prior = DiffusionPrior(network := PairNetwork(PRESETS["tiny"]), PriorConfig(network.config, gain, (4, 8)))
    recordings = [recording(N, "gaussian", T=T, g=g)[1] for T, g in ((60, 1.5), (200, 0.6))]
    given = CFGPosterior.from_pretrained("base").condition(recordings, noise_std=SIGMA)
    assert abs(math.log(given.unit[0] / given.unit[1])) > 0.05
    refined = given.refine(normal(count, 2, N, N), sweeps=16, prior=prior, generator=0)
    assert refined.rho[0].tolist() == pytest.approx([3 * math.sqrt(N)] * 2)  # where draws forget where they were
    found = refined.draws
    for k, statistics in enumerate(given.statistics):
        white = GaussianPosterior.from_statistics(statistics, SIGMA, gain**2 / N).whiten(found[:, k]).numpy()
        for direction in range(N):
            assert scipy.stats.kstest(white[..., direction].ravel(), "norm").pvalue > 1e-3


@pytest.mark.parametrize(("families", "rounded"), [((), True), (("dale", "sparse"), False)])
def test_zeros_of_a_prior_that_is_not_told_the_family_stay(families, rounded, monkeypatch):
    """A prior of cubes may know wiring with gaps, whatever ensemble the posterior is told."""
    network = PairNetwork(replace(PRESETS["tiny"], families=families))
    prior = DiffusionPrior(network, PriorConfig(network.config, 1.2, (4, 8), sparse=True))
    given = CFGPosterior.from_pretrained("base").condition(recording(4)[1], noise_std=SIGMA, family="dale")
    monkeypatch.setattr(resolution, "with_exact_zeros", lambda J, _: torch.zeros_like(J))
    found = given.refine(normal(4, 4, 4), prior=prior, sweeps=8, steps=4, generator=0).draws
    assert bool((found == 0).all()) == rounded


@pytest.mark.parametrize(("family", "signed"), [("dale", True), ("block", False), (None, False)])
def test_weights_too_small_to_be_told_from_none_are_decided_by_the_family_told(family, signed, monkeypatch):
    """Both where draws are made and where they are refined."""
    monkeypatch.setattr(resolution, "with_one_sign", torch.zeros_like)
    monkeypatch.setattr(resolution, "with_exact_zeros", lambda J, _: J)
    given = CFGPosterior.from_pretrained("base").condition(recording(4)[1], noise_std=SIGMA, family=family)
    drawn = given.sample((4,), steps=4, closing=False, generator=0)
    assert bool((drawn == 0).all()) == signed
    found = given.refine(normal(4, 4, 4), sweeps=8, steps=4, closing=False, generator=0).draws
    assert bool((found == 0).all()) == signed


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: InferenceConfig(prior="dale"), "got 'dale' where draws are not refined. Leave prior out, or add"),
        (lambda: InferenceConfig(refine="gibbs", prior="dale", gain=1.0), "gains of its own; got gain = 1. Leave gain"),
        (lambda: GuidedDiffusion(GAUSSIAN, "vae"), "guidance must be one of"),
        (lambda: GuidedDiffusion(GAUSSIAN, rho=0.001), "rho must exceed the smallest noise level, 0.002"),
        (lambda: GuidedDiffusion(GAUSSIAN).refine(normal(2, 3, 3), Evidence.none(2)), r"draws must be \(draw, 2, 2\)"),
        (lambda: GuidedDiffusion(GAUSSIAN).refine(normal(1, 2, 2), Evidence.none(2)), "at least two, and finite"),
        (lambda: InferenceConfig(refine="vae"), "refine must be one of"),
        (lambda: InferenceConfig(rho=1.0), "got 1.0 where draws are not refined. Leave rho out, or add refine, one of"),
        (lambda: InferenceConfig(sweeps=9), "refined by 'gibbs'; got 9 where draws are not refined. Leave sweeps out"),
        (lambda: InferenceConfig(refine="dps", sweeps=9), "by 'gibbs'; got 9 with 'dps'. Leave sweeps out, or choose"),
        (lambda: InferenceConfig(likelihood="rollout"), "got it where draws are not refined. Leave likelihood out"),
        (lambda: InferenceConfig(refine="gibbs", likelihood="rollout"), "by 'pigdm' or 'dps'; got it with 'gibbs'. L"),
        (lambda: InferenceConfig(refine="dps", window=0.5), "for likelihood 'rollout'; got 0.5 with 'transitions'. L"),
        (lambda: InferenceConfig(refine="gibbs", sweeps=4), "sweeps must be"),
        (
            lambda: (
                CFGPosterior.from_pretrained("base")
                .condition(recording(4)[1], gain=1.0)
                .refine(normal(4, 4, 4), prior=load_prior("dale"))
            ),
            "gains of its own; got gain = 1. Leave the gain out",
        ),
        (
            lambda: (
                CFGPosterior.from_pretrained("base")
                .condition(recording(4)[1], family="sparse")
                .refine(normal(4, 4, 4), prior=load_prior("dale"))
            ),
            "the family is known to be 'sparse', and the prior is of 'dale'; choose",
        ),
        (
            lambda: untrained().condition(recording(4)[1]).refine(torch.zeros(4, 5, 5)),
            r"draws must be \(draw, 4, 4\); got \(4, 5, 5\)",
        ),
        (
            lambda: untrained().condition([recording(4)[1]]).refine(torch.zeros(4, 4, 4)),
            r"draws must be \(draw, 1, 4, 4\)",
        ),
        (
            lambda: untrained().condition([recording(4)[1]]).refine(torch.zeros(4, 1, 4, 4), method="mmps"),
            "takes one recording at a time",
        ),
        (lambda: infer(recording(4)[1], draws=normal(4, 4, 4)), "draws are given to be refined: set refine"),
        (
            lambda: infer(recording(4)[1], InferenceConfig(refine="gibbs"), draws=normal(4, 5, 5)),
            r"draws must be \(draw, 4, 4\); got \(4, 5, 5\)",
        ),
    ],
)
def test_bad_input_says_what_was_expected(call, match):
    with pytest.raises(ValueError, match=match):
        call()
