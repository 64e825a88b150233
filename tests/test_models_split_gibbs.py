"""Split Gibbs sampling: against closed forms and exact posteriors."""

import math
from dataclasses import fields

import pytest
import scipy.stats
import torch
from arviz_stats.base import array_stats
from problems import GAUSSIAN, SPARSE, D, normal, number, source

from neurosde.datasets.ensembles import Sparse
from neurosde.evaluation.c2st import c2st
from neurosde.models import (
    Evidence,
    ScaleMixtureDenoiser,
    fold,
    noise_levels,
    sample,
    split_gibbs,
)
from neurosde.models.dps import MomentMatching
from neurosde.models.exact_posterior import exact_posterior
from neurosde.models.gaussian_posterior import gaussian_log_evidence
from neurosde.models.split_gibbs import (
    DECONVOLVED,
    SplitGibbs,
    given_noisy,
    noisier,
    observed,
    r_hat,
    sweep_levels,
)


def test_given_a_noisy_matrix_draws_are_of_the_priors_law():
    for rho in number(0.05), number(0.8):
        z = 2 * rho * normal(1, 3, 3, seed=1)  # where it is open whether there is a weight
        found = given_noisy(GAUSSIAN, z.expand(2000, 3, 3), rho, source=source())
        mean, sd = z / (1 + rho**2), rho / (1 + rho**2).sqrt()
        assert scipy.stats.kstest(((found - mean) / sd).flatten(), "norm").pvalue > 0.01
        sparse = given_noisy(SPARSE, z.expand(4000, 3, 3), rho, source=source())
        there = SPARSE.existence(z, rho)[0]
        share = (sparse.abs() > 0.02 * rho).double().mean(0)
        # The last level leaves zeros a spread of 0.002 ρ; of the slab 2 % of ρ hold a hundredth.
        assert ((share - there).abs() < 4 * (there * (1 - there) / 4000).sqrt() + 0.012).all()


def test_one_sweep_leaves_the_posterior_as_it_is(evidence_of):
    """Of a Gaussian prior: whitened draws stay standard normal, in every direction, at any ρ that is deconvolved."""
    N, evidence = 3, evidence_of(3)
    folded = fold(torch.zeros(N, N, dtype=D), math.inf, evidence)
    sd = folded.variances.sqrt()
    before = (folded.mean + sd * normal(3000, N, N, seed=4)) @ evidence.vectors.mT
    rho = number(0.5 / 200).sqrt()
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


def test_a_recording_is_divided_into_two_of_the_same_network(monkeypatch):
    """Of known weights the denoiser is given B₂ ~ N(WΛ₂, Λ₂), and z is W and noise ρ that knows nothing of B₂."""
    count, rho, precision = 4000, number(0.2), torch.tensor([0.0, 5.0, 40.0], dtype=D)
    W = 3 * normal(count, 2, 3, seed=1)
    cross = W * precision + precision.sqrt() * normal(count, 2, 3, seed=2)
    asked = {}

    def conditional(part):
        asked["rest"] = part
        return ScaleMixtureDenoiser(torch.ones(1, dtype=D), evidence=part)

    def seen(denoise, z, *arguments):
        asked["z"] = z
        return given_noisy(denoise, z, *arguments)

    monkeypatch.setattr(split_gibbs, "given_noisy", seen)
    gibbs = SplitGibbs(GAUSSIAN, conditional=conditional)
    gibbs._sweep(W, Evidence(precision.expand(count, 3), None, cross), rho, source(), None)
    rest, z = asked["rest"], asked["z"]
    share = 1 - float(DECONVOLVED / rho**2) / 40  # a half: without more noise B₂ would have half of its variance
    torch.testing.assert_close(rest.eigenvalues[0], share * precision)
    off = [(z - W) / rho, (rest.cross - W * share * precision)[..., 1:] / (share * precision[1:]).sqrt()]
    for one in (*off[0].unbind(-1), *off[1].unbind(-1)):
        assert scipy.stats.kstest(one.flatten(), "norm").pvalue > 0.01
    known = torch.cat([*off, W], -1).flatten(0, 1).T  # of 8000 pairs, correlations have a standard error of 0.011
    assert float((torch.corrcoef(known) - torch.eye(len(known), dtype=D)).abs().max()) < 4 / math.sqrt(2 * count)


def test_of_a_recording_of_which_nothing_is_left_the_prior_is_asked():
    """Beside one of which something is: whoever else is recorded, draws are what they would be alone."""
    rho, evidence = number(0.5), Evidence(torch.tensor([[1.0, 2.0], [1.0, 90.0]], dtype=D), None, normal(2, 2, 2))

    def conditional(part):
        return lambda x, sigma: 5 + 0 * x  # no denoiser of anything

    gibbs = SplitGibbs(GAUSSIAN, steps=8, conditional=conditional)
    W = normal(3, 2, 2, 2, seed=1)
    swept = gibbs._sweep(W, evidence.expand((3, 2)), rho, source(2), None)
    assert float(swept[:, 0].abs().max()) < 4 and float((swept[:, 1] - 5).abs().max()) < 0.1


@pytest.mark.parametrize("conditioned", [True, False])
def test_a_long_sweep_is_exact(evidence_of, conditioned):
    """ρ = 1, where ρ²Λ is far above 1: of a Gaussian prior whitened draws stay standard normal.

    If the denoiser is conditioned on the rest they are of the recording, else of the recording with more noise.
    """
    N, evidence, rho, more = 3, evidence_of(3), number(1.0), normal(2000, 3, 3, seed=6)
    seen = evidence if conditioned else noisier(evidence, evidence.eigenvalues.clamp(max=DECONVOLVED), more)
    folded = fold(torch.zeros(2000, N, N, dtype=D), math.inf, seen)
    sd = folded.variances.sqrt()
    before = (folded.mean + sd * normal(2000, N, N, seed=4)) @ evidence.vectors.mT

    def conditional(part):
        return ScaleMixtureDenoiser(torch.ones(1, dtype=D), evidence=part)

    gibbs = SplitGibbs(GAUSSIAN, conditional=conditional if conditioned else None)
    swept = gibbs._sweep(before, evidence, rho, source(2), None if conditioned else more)
    after = (swept @ evidence.vectors - folded.mean) / sd
    for k in range(N):
        assert scipy.stats.kstest(after[..., k].flatten(), "norm").pvalue > 0.01
    # Draws have gone a long way: of the prior's spread where little is known.
    moved = (after - (before @ evidence.vectors - folded.mean) / sd).square().mean((0, 1))
    assert float(moved.min()) > 0.5


def test_noise_is_added_until_a_recording_is_as_precise_as_can_be_deconvolved():
    """Of recordings of known weights, B ~ N(WΛ, Λ): with more noise they are N(WΛ₁, Λ₁), whatever W is."""
    W, precision, rho = 3 * normal(4000, 2, 3, seed=1), torch.tensor([0.0, 2.0, 300.0], dtype=D), number(0.1)
    cross = W * precision + precision.sqrt() * normal(4000, 2, 3, seed=2)
    evidence = Evidence(precision.expand(4000, 3), None, cross)
    most = float(DECONVOLVED / rho**2)
    seen = noisier(evidence, evidence.eigenvalues.clamp(max=most), normal(4000, 2, 3, seed=3))
    torch.testing.assert_close(seen.eigenvalues[0], torch.tensor([0.0, 2.0, 80.0], dtype=D))
    torch.testing.assert_close(seen.cross[..., :2], cross[..., :2])
    off = (seen.cross - W * seen.eigenvalues.unsqueeze(-2))[..., 2] / math.sqrt(80.0)
    assert scipy.stats.kstest(off.flatten(), "norm").pvalue > 0.01
    # Independent of W: a correlation of 8000 pairs has a standard error of 0.011.
    assert abs(float(torch.corrcoef(torch.stack([off.flatten(), W[..., 2].flatten()]))[0, 1])) < 4 / math.sqrt(8000)


def test_each_draw_has_one_noise_of_its_recording_for_all_sweeps(monkeypatch):
    """A noise anew in each sweep would be averaged over: W would be of no single recording with more noise."""
    noises = []

    def seen(evidence, precision, noise):
        noises.append(noise)
        assert not precision.equal(evidence.eigenvalues)  # it is made use of
        return noisier(evidence, precision, noise)

    monkeypatch.setattr(split_gibbs, "noisier", seen)
    evidence = Evidence(torch.tensor([1.0, 1e4], dtype=D), None, normal(2, 2))
    SplitGibbs(GAUSSIAN, sweeps=8, rho=3.0).refine(normal(3, 2, 2), evidence, 0)
    assert len(noises) == 3 and all(torch.equal(noise, noises[0]) for noise in noises)  # above the last ρ
    assert noises[0].shape == (3, 2, 2) and not torch.equal(noises[0][0], noises[0][1])


def test_rho_falls_faster_where_draws_forget_at_once():
    largest = torch.tensor([0.1, 80.0, 8000.0], dtype=D)
    rhos = SplitGibbs(GAUSSIAN, sweeps=40, rho=20.0).schedule(largest, 5)
    assert rhos.shape == (40, 3) and (rhos[1:] <= rhos[:-1] * (1 + 1e-12)).all()
    torch.testing.assert_close(rhos[0], torch.full((3,), 20.0, dtype=D))
    torch.testing.assert_close(rhos[-6:], (DECONVOLVED / largest).sqrt().expand(6, 3))
    steps = -rhos[:35].log().diff(dim=0)
    low = rhos[:34] < 1
    for k in (1, 2):
        even = steps[low[:, k], k]
        torch.testing.assert_close(even, even[:1].expand_as(even))
        assert (steps[~low[:, k], k][:-1].diff() < 0).all() and float(steps[0, k]) > 2 * float(even[0])


@pytest.mark.parametrize("rho", [0.3, 2.5, 20.0])
def test_levels_of_a_sweep_are_dense_where_structure_is_decided(rho):
    levels = sweep_levels(rho, 64)
    assert levels.shape == (65,) and float(levels[0]) == pytest.approx(80) and levels[-1] == 0
    steps = -levels[:-1].log().diff()
    densest = float(levels[int(steps.argmin())]) * rho  # in the units of weights: at e, or at ρ if that is less
    assert abs(math.log(densest / min(rho, math.e))) < float(steps.max())


@pytest.mark.slow
def test_an_unknown_gain_is_as_sure_as_the_recording_makes_it():
    """Half of what is recorded is far more precise than can be deconvolved at first: beside the exact posterior."""
    N, draws, prior = 8, 400, ScaleMixtureDenoiser.of_gains(0.3, 3.0, 16)
    precision, W = torch.logspace(-2.0, 4.0, N, dtype=D), normal(N, N, seed=1)
    evidence = Evidence(precision, None, W * precision + precision.sqrt() * normal(N, N, seed=2))
    found = SplitGibbs(prior, sweeps=96, steps=24, rho=10.0).refine(normal(draws, N, N, seed=3), evidence, 0).draws
    log_weights = prior.probabilities.log() + gaussian_log_evidence(evidence, prior.variances)
    gain = torch.multinomial(log_weights.softmax(0), 20 * draws, replacement=True, generator=source(4))
    folded = fold(torch.zeros(20 * draws, N, N, dtype=D), math.inf, evidence, prior.variances[gain])
    exact = folded.posterior_mean + folded.variances.sqrt().unsqueeze(-2) * normal(20 * draws, N, N, seed=5)
    norms = [one.flatten(1).norm(dim=1) for one in (found, exact)]
    assert float(norms[1].std() / norms[1].mean()) > 0.05
    assert scipy.stats.ks_2samp(*norms).pvalue > 0.01


@pytest.mark.parametrize("high", [20.0, 1e4])
def test_draws_from_anywhere_come_to_the_gaussian_posterior(evidence_of, high):
    N, evidence = 4, evidence_of(4, high=high)
    found = SplitGibbs(GAUSSIAN, sweeps=60).refine(7 + 3 * normal(600, N, N, seed=3), evidence, 0)
    folded = fold(torch.zeros(N, N, dtype=D), math.inf, evidence)
    whitened = (found.draws @ evidence.vectors - folded.mean) / folded.variances.sqrt()
    for k in range(N):
        assert scipy.stats.kstest(whitened[..., k].flatten(), "norm").pvalue > 0.01
    assert found.evaluations == 60 * 16 and found.rho.shape == found.moved.shape == found.log_likelihood.shape == (60,)
    assert float(found.rho[-1]) == pytest.approx(math.sqrt(DECONVOLVED / high))
    assert (found.rho[1:] <= found.rho[:-1] * (1 + 1e-12)).all() and float(found.moved[0]) > float(found.moved[-1])


@pytest.mark.parametrize("own", [False, True])
def test_recordings_are_refined_beside_each_other(evidence_of, own):
    """Each with a ρ of its own, whatever the others say; of a Gaussian prior, known to all draws or each its own."""
    N, alone = 3, [evidence_of(3, high=high) for high in (1e4, 2.0, 0.5)]
    several = Evidence(*(torch.stack([getattr(one, field.name) for one in alone]) for field in fields(Evidence)))
    given = several.expand((500, 3)) if own else several
    found = SplitGibbs(GAUSSIAN, sweeps=60).refine(7 + 3 * normal(500, 3, N, N, seed=3), given, 0)
    assert found.rho.shape == found.moved.shape == found.log_likelihood.shape == (60, 3)
    assert found.draws.shape == (500, 3, N, N) and found.diverged.shape == (500, 3)
    hats = []
    for k, evidence in enumerate(alone):
        one = SplitGibbs(GAUSSIAN, sweeps=60).refine(7 + 3 * normal(500, N, N, seed=3), evidence, 0)
        torch.testing.assert_close(found.rho[:, k], one.rho)
        folded = fold(torch.zeros(N, N, dtype=D), math.inf, evidence)
        whitened = (found.draws[:, k] @ evidence.vectors - folded.mean) / folded.variances.sqrt()
        for direction in range(N):
            assert scipy.stats.kstest(whitened[..., direction].flatten(), "norm").pvalue > 0.01
        hats.append(one.r_hat["norm"])
    # 500 chains: that of the worst, of the recording that tells most, is within a few % whatever the seed.
    assert found.r_hat["norm"] == pytest.approx(max(hats), rel=0.1) and max(hats) == hats[0]


@pytest.mark.slow
def test_sparse_weights_come_to_their_exact_posterior(evidence_of):
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


@pytest.mark.parametrize("chains", ["mixed", "apart", "drifting"])
def test_r_hat_is_that_of_arviz(chains):
    made = {
        "mixed": normal(200, 100),
        "apart": normal(200, 1) + 0.1 * normal(200, 100, seed=1),
        "drifting": torch.linspace(0, 3, 100, dtype=D) + normal(20, 100),
    }[chains]
    expected = array_stats.rhat(made.numpy(), method="split", chain_axis=0, draw_axis=1)
    assert float(r_hat(made)) == pytest.approx(float(expected), rel=1e-12)


def test_r_hat_tells_chains_that_mix_from_chains_that_do_not(evidence_of):
    """Of sweeps of autocorrelation aᵏ the variance of half chains' means, χ² but for its scale, decides what R̂ is.

    The norm is a sum over directions, of a = (1 − ρ²λ)/(1 + ρ²) each: at most that of the least λ where all are open,
    and at least that of the second largest where the largest leaves next to no variance.
    """

    def bound(evidence, direction, tail):
        rho2, half, chains = DECONVOLVED / float(evidence.eigenvalues.max()), 10, 50  # a quarter of 80 sweeps is kept
        a = (1 - rho2 * evidence.eigenvalues[direction]) / (1 + rho2)
        lags = torch.arange(1, half)
        of_means = float(1 + 2 * ((1 - lags / half) * a**lags).sum()) / half  # variance of a mean, in that of a sweep
        within = (1 - of_means) * half / (half - 1)
        chance = scipy.stats.chi2(chains - 1).ppf(tail) / (chains - 1)
        return math.sqrt((half - 1) / half + chance * of_means / within)

    for high, direction, tail in ((2.0, 0, 1 - 1e-3), (1e4, 1, 1e-3)):
        evidence = evidence_of(3, 1.0, high)
        found = SplitGibbs(GAUSSIAN, sweeps=80).refine(normal(50, 3, 3), evidence, 0).r_hat["norm"]
        limit = bound(evidence, direction, tail)
        assert found < limit < 1.5 if high == 2.0 else found > limit > 3


def test_the_seed_decides_and_bad_input_is_refused(evidence_of):
    evidence = evidence_of(3)
    gibbs = SplitGibbs(GAUSSIAN, sweeps=8)
    one, same, other = (gibbs.refine(normal(4, 3, 3), evidence, k).draws for k in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)
    for wrong, match in (
        (lambda: gibbs.refine(normal(4, 2, 3, 3), evidence_of(3)[None].expand((5,))), r"\(draw, 5, 3, 3\), as 5"),
        (lambda: gibbs.refine(normal(4, 2, 2), evidence), r"draws must be \(draw, 3, 3\)"),
        (lambda: gibbs.refine(normal(1, 3, 3), evidence), "at least two, and finite"),
        (lambda: gibbs.refine(normal(4, 3, 3) * math.nan, evidence), "at least two, and finite"),
        (lambda: SplitGibbs(GAUSSIAN, sweeps=4), "sweeps must be"),
        (lambda: SplitGibbs(GAUSSIAN, rho=0.0), "rho must be"),
        (lambda: SplitGibbs(GAUSSIAN, exact_share=0.6), "exact_share must lie between 0 and 0.5; got 0.6"),
    ):
        with pytest.raises(ValueError, match=match):
            wrong()
