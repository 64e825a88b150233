"""Sequential Monte Carlo: against closed forms of posterior and evidence, and sums over all supports."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats
import torch
from problems import DENSITY, GAUSSIAN, SLAB, SPARSE, D

from neurosde.evaluation.c2st import c2st
from neurosde.models import Evidence, TwistedSMC, fold
from neurosde.models.twisted_smc import MOST_WEIGHTS, systematic


def supports(evidence):
    """All supports of a sparse row: log evidence, and draws."""
    precision = ((evidence.vectors * evidence.eigenvalues) @ evidence.vectors.mT).numpy()
    cross = (evidence.cross @ evidence.vectors.mT)[0].numpy()
    N = len(cross)
    logs, laws = [], []
    for support in itertools.product((False, True), repeat=N):
        there = np.flatnonzero(support)
        inverse = np.linalg.inv(precision[np.ix_(there, there)] + np.eye(len(there)) / SLAB)
        mean = inverse @ cross[there]
        log = len(there) * math.log(DENSITY) + (N - len(there)) * math.log(1 - DENSITY)
        logs.append(log + 0.5 * (np.linalg.slogdet(inverse)[1] - len(there) * math.log(SLAB) + cross[there] @ mean))
        laws.append((there, mean, inverse))
    logs = np.array(logs)
    total = np.logaddexp.reduce(logs)
    return total, np.exp(logs - total), laws


@pytest.mark.parametrize("high", [20.0, 1e4])
def test_of_a_gaussian_prior_no_weight_changes_and_the_evidence_is_exact(evidence_of, high):
    N, runs, particles = 3, 2, 1000
    evidence = evidence_of(N, 0.3, high)
    found = TwistedSMC(GAUSSIAN, particles, runs, steps=6).sample(evidence, 0)
    one = 1 + evidence.eigenvalues
    exact = float((0.5 * evidence.cross.square() / one - 0.5 * one.log()).sum())
    torch.testing.assert_close(found.log_evidence, torch.full((runs,), exact, dtype=D), rtol=1e-9, atol=1e-9)
    assert float((found.effective - 1).abs().max()) < 1e-9 and not bool(found.resampled.any())
    assert found.effective.shape == found.resampled.shape == (6, runs) and found.evaluations == 6
    folded = fold(torch.zeros(N, N, dtype=D), math.inf, evidence)
    whitened = (found.particles.flatten(0, 1) @ evidence.vectors - folded.mean) / folded.variances.sqrt()
    for entry in whitened.flatten(1).mT:
        assert scipy.stats.kstest(entry, "norm").pvalue > 0.002  # nine of them, at two conditions
    draws = found.draws(runs * particles)
    assert torch.equal(draws.flatten(1).unique(dim=0), found.particles.flatten(0, 1).flatten(1).unique(dim=0))


def test_of_a_sparse_row_it_is_the_sum_over_all_supports(evidence_of):
    """A posterior of several supports, of which moment matching alone makes one hump."""
    runs, particles, draws = 8, 1000, 2000
    J = torch.tensor([[0.0, 1.2, 0.0, -0.6, 0.3]], dtype=D)
    evidence = evidence_of(J.shape[-1], 0.5, 12.0, seed=3, J=J)
    log_evidence, chances, laws = supports(evidence)
    assert chances.max() < 0.6  # it is open which connections exist
    rng = np.random.default_rng(0)
    exact = np.zeros((draws, J.shape[-1]))
    for row, k in enumerate(rng.choice(len(laws), draws, p=chances)):
        there, mean, covariance = laws[k]
        exact[row, there] = mean + np.linalg.cholesky(covariance) @ rng.standard_normal(len(there))
    smc = TwistedSMC(SPARSE, particles, runs)
    found = smc.sample(evidence, 0)
    assert found.resampled.any() and (found.effective <= 1).all() and found.effective.min() > 0.02
    assert (found.effective[found.resampled] < smc.threshold).all()
    estimates = found.log_evidence
    error = float(estimates.std()) / math.sqrt(runs)
    assert error < 0.1 and abs(float(estimates.mean()) - log_evidence) < 4 * error + 0.02
    drawn = found.draws(draws, 0)[:, 0]
    share = (drawn.abs() > 0.01).double().mean(0).numpy()
    want = sum(p * np.isin(np.arange(J.shape[-1]), law[0]) for p, law in zip(chances, laws, strict=True))
    of_runs = torch.stack([(one.abs() > 0.01).double().mean(0) for one in drawn.view(runs, -1, J.shape[-1])])
    assert (np.abs(share - want) < 5 * of_runs.std(0).numpy() / math.sqrt(runs) + 0.01).all()
    # 4000 draws: an accuracy of ½ has a standard error of 0.008.
    assert c2st(exact, drawn.numpy()).accuracy < 0.5 + 3 * 0.008
    assert torch.equal(TwistedSMC(SPARSE, 10, 2, 4).sample(evidence, 5).particles,
                       TwistedSMC(SPARSE, 10, 2, 4).sample(evidence, 5).particles)  # fmt: skip


def test_without_a_recording_it_is_the_prior():
    found = TwistedSMC(SPARSE, 2000, 2).sample(Evidence.none(2), 0)
    assert float(found.log_evidence.abs().max()) < 1e-9 and not bool(found.resampled.any())
    share = (found.particles.abs() > 0.01).double().mean()
    # 16000 entries, of which 0.4 % of the slab's are below 0.01, and what the steps get wrong of the existence.
    assert abs(float(share) - DENSITY) < 4 * math.sqrt(DENSITY * (1 - DENSITY) / 16000) + 0.01
    assert abs(float(found.particles.square().mean()) - 1) < 4 * math.sqrt((3 / DENSITY - 1) / 16000) + 0.01


def test_systematic_resampling_takes_each_about_as_often_as_its_weight_says():
    weights = torch.rand(3, 50, dtype=D) ** 3
    log_weights = weights.log().log_softmax(-1)
    total = torch.zeros(3, 50, dtype=D)
    for seed in range(200):
        index = systematic(log_weights, 80, torch.Generator().manual_seed(seed))
        counts = torch.stack([one.bincount(minlength=50) for one in index]).double()
        assert ((counts - 80 * log_weights.exp()).abs() < 1).all()
        total += counts / 200
    # A count's remainder is a coin whose variance is ¼ at most.
    assert ((total - 80 * log_weights.exp()).abs() < 5 * math.sqrt(0.25 / 200)).all()


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: TwistedSMC(GAUSSIAN, 1), "particles must be"),
        (lambda: TwistedSMC(GAUSSIAN, threshold=1.5), "threshold must be at most 1"),
        (lambda: TwistedSMC(GAUSSIAN).sample(Evidence.none(11)), f"at most {MOST_WEIGHTS} weights"),
        (
            lambda: TwistedSMC(GAUSSIAN, 10, 3, 2).sample(Evidence.none(2)).draws(10),
            "multiple of the number of runs, 3",
        ),
    ],
)
def test_bad_input_says_what_was_expected(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def test_a_denoiser_that_fails_is_told():
    with pytest.raises(FloatingPointError, match="NaN or infinite values at noise level 80"):
        TwistedSMC(lambda x, sigma: x * math.nan, 10, 1).sample(Evidence.none(2), 0)
