"""Exact posteriors by Gibbs sampling: against closed forms, enumeration, another sampler, and their own prior."""

import itertools
import math
import warnings

import numpy as np
import pytest
import torch
from problems import D, normal
from scipy.stats import kstest

from neurosde.datasets.ensembles import Block, Gaussian, LowRank, Sparse, make_ensemble
from neurosde.evaluation.calibration import holm, ranks
from neurosde.evaluation.rank_calibration import uniformity
from neurosde.models import Evidence, ScaleMixtureDenoiser, SpikedDenoiser
from neurosde.models import exact_posterior as module
from neurosde.models.analytic import gain_quadrature
from neurosde.models.exact_posterior import POINTS, exact_posterior
from neurosde.models.gaussian_posterior import gaussian_log_evidence

MIXTURES = {name: make_ensemble(name, 1.5, gain=0.5) for name in ("gaussian", "sparse", "low-rank")}


def recorded(W, precision, seed=0):
    """Evidence of recordings of W with a given Λ: B = WΛ + noise of the row covariance Λ."""
    L = torch.linalg.cholesky(precision)
    return Evidence.of(precision, W @ precision + normal(*W.shape, seed=seed) @ L.mT)


def precisions(count, N, strength, seed=0):
    x = normal(count, 2 * N, N, seed=seed)
    return strength * x.mT @ x / N


def test_one_gain_is_the_gaussian_posterior():
    N, v = 4, 1.3**2 / 4
    precision = precisions(3, N, 5.0)
    evidence = recorded(math.sqrt(v) * normal(3, N, N, seed=1), precision, seed=2)
    found = exact_posterior(Gaussian(1.3), evidence, 4000, burn_in=0, thin=1)
    C = torch.linalg.inv(precision + torch.eye(N, dtype=D) / v)
    cross = evidence.cross @ evidence.vectors.mT
    torch.testing.assert_close(found.mean, cross @ C)
    whitened = (found.weights - cross @ C) @ torch.linalg.inv(torch.linalg.cholesky(C)).mT
    assert kstest(whitened.flatten(), "norm").pvalue > 0.01
    assert (found.gain == 1.3).all()


def test_unknown_gain_is_the_scale_mixture():
    N = 4
    evidence = recorded(0.4 * normal(5, N, N), precisions(5, N, 5.0), seed=1)
    found = exact_posterior(MIXTURES["gaussian"], evidence, 8000, burn_in=20, thin=1)
    known = ScaleMixtureDenoiser(*_variances(N), evidence=evidence)
    want = known(torch.zeros(5, N, N, dtype=D), torch.tensor(1e6, dtype=D))
    z = (found.mean - want).square().mean((-1, -2)).sqrt() / (found.mean_error * found.weights.std(0).mean((-1, -2)))
    assert (z < 3).all()  # of eight chains, the error is told with two digits at best
    log_weights = known.probabilities.log() + gaussian_log_evidence(evidence, known.variances)
    mean_gain = log_weights.softmax(-1) @ gain_quadrature(0.5, 1.5, POINTS)[0]
    assert ((found.gain.mean(0) - mean_gain).abs() < 5 * found.gain.std(0) / math.sqrt(2000)).all()


def _variances(N):
    gains, chances = gain_quadrature(0.5, 1.5, POINTS)
    return gains.square() / N, chances


def steep(N, condition, seed=0):
    """A Λ of one network whose eigenvalues span a condition number."""
    U = torch.linalg.qr(normal(N, N, seed=seed))[0]
    return (U @ torch.diag(torch.logspace(math.log10(condition), 0, N, dtype=D)) @ U.mT).unsqueeze(0)


@pytest.mark.parametrize("condition", [3.0, 1e4])
@pytest.mark.parametrize("enumerated", [True, False])
def test_sparse_weights_by_enumeration(condition, enumerated, monkeypatch):
    """Summed over supports in the package too, and by flipping one weight after the other, which may have to warn."""
    N, density = 3, 0.3
    precision = steep(N, condition)
    monkeypatch.setattr(module, "ENUMERATED", N if enumerated else 0)
    evidence = recorded(
        torch.tensor([[[0.0, 1.0, 0.0], [0.6, 0.0, 0.0], [0.0, 0.0, -0.5]]], dtype=D), precision, seed=3
    )
    cross = (evidence.cross @ evidence.vectors.mT)[0]
    gains, chances = gain_quadrature(0.5, 1.5, POINTS)
    supports = [list(one) for one in itertools.product([False, True], repeat=N)]
    log_rows, means, exists = [], [], []
    for g in gains:
        v = float(g**2) / (N * density)
        logs, mean = torch.empty(len(supports), N, dtype=D), torch.zeros(len(supports), N, N, dtype=D)
        for k, s in enumerate(supports):
            on, number = torch.tensor(s), sum(s)
            C = torch.linalg.inv(precision[0][on][:, on] + torch.eye(number, dtype=D) / v)
            b = cross[:, on]
            prior = number * math.log(density) + (N - number) * math.log(1 - density)
            logs[k] = prior + 0.5 * (b @ C * b).sum(-1) + 0.5 * torch.logdet(C) - 0.5 * number * math.log(v)
            mean[k][:, on] = b @ C
        share = logs.softmax(0)
        log_rows.append(logs.logsumexp(0).sum())
        means.append(torch.einsum("kr,krp->rp", share, mean))
        exists.append(torch.einsum("kr,kp->rp", share, torch.tensor(supports, dtype=D)))
    of_gain = (chances.log() + torch.stack(log_rows)).softmax(0)
    want, there = (torch.einsum("g,grp->rp", of_gain, torch.stack(one)) for one in (means, exists))

    other = make_ensemble("sparse", 1.5, gain=0.5, density=density)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = exact_posterior(other, evidence, 8000, thin=3)
    assert bool(told) == (not enumerated and condition > 10)
    spread = float(found.weights.var(0).mean().sqrt())
    error = float(found.mean_error[0]) * spread
    off = float((found.mean[0] - want).square().mean().sqrt())
    if enumerated:
        assert off < 1e-3 * spread and error < 1e-12  # quadratures of other nodes
    else:
        assert off < 3 * error
    if enumerated or condition < 10:
        share = (found.weights[:, 0] != 0).double().mean(0)
        assert ((share - there).abs() < 5 * (there * (1 - there) / 2000).sqrt() + 1e-3).all()


@pytest.mark.parametrize("s", [0.5, 1.5])
def test_low_rank_weights_as_the_denoisers_own_sampler(s):
    N, scale = 6, 1 / math.sqrt(6)
    J = normal(4, N, N) + normal(4, N, 2, seed=1) @ normal(4, 2, N, seed=2) / math.sqrt(2)
    x = J + s * normal(4, N, N, seed=3)
    # A recording that says of W what x says of J = W/s₀.
    evidence = Evidence.of(torch.eye(N, dtype=D).expand(4, N, N) / s**2, x / s**2).scaled(1 / scale)
    found = exact_posterior(MIXTURES["low-rank"], evidence, 4000, thin=2)
    denoise = SpikedDenoiser.of_gains(0.5, 1.5, 1.0, chains=16, sweeps=500)
    want, variance = denoise.with_error(x, torch.tensor(s, dtype=D))
    spread = found.weights.var(0).mean((-1, -2)).sqrt()
    error = ((found.mean_error * spread / scale).square() + variance).sqrt()
    assert (error < 0.02).all()
    assert ((found.mean / scale - want).square().mean((-1, -2)).sqrt() < 3 * error).all()


@pytest.mark.parametrize("name", ["gaussian", "sparse", "low-rank"])
def test_the_truth_is_a_draw_like_the_others(name):
    N, count, draws = 4, 400, 40
    W = MIXTURES[name].sample_weights(count, N, torch.Generator().manual_seed(0))
    found = exact_posterior(MIXTURES[name], recorded(W, precisions(count, N, 3.0, seed=1), seed=2), draws, thin=20)
    directions = np.random.default_rng(0).standard_normal((4, N, N))
    assert holm(uniformity(ranks(found.weights.numpy(), W.numpy(), directions), draws)).min() > 0.01


@pytest.mark.parametrize("name", ["gaussian", "sparse", "low-rank"])
def test_nothing_recorded_leaves_the_prior(name):
    N = 5
    nothing = Evidence.none(N).expand((20,))
    found = exact_posterior(MIXTURES[name], nothing, 400, thin=40)
    square = found.weights.square().mean((-1, -2)).mean(0)  # of each recording
    assert abs(float(square.mean()) - MIXTURES[name].variance(N)) < 4 * float(square.std()) / math.sqrt(20)
    if name == "sparse":
        share = (found.weights != 0).double().mean((0, 2, 3))
        assert abs(float(share.mean()) - 0.2) < 4 * float(share.std()) / math.sqrt(20)


def test_the_seed_decides():
    evidence = recorded(normal(2, 3, 3), precisions(2, 3, 1.0))
    one, same, other = (exact_posterior(LowRank(1.0), evidence, 8, burn_in=2, seed=k).weights for k in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_full_sparse_weights_are_gaussian():
    evidence = recorded(normal(2, 3, 3), precisions(2, 3, 4.0))
    full = exact_posterior(Sparse(1.0, density=1.0), evidence, 8000, thin=2)
    known = exact_posterior(Gaussian(1.0), evidence, 8)
    torch.testing.assert_close(full.mean, known.mean)
    assert (full.weights != 0).all()


def test_what_is_refused():
    evidence = recorded(normal(2, 4, 4), precisions(2, 4, 1.0))
    with pytest.raises(ValueError, match="multiple of chains = 8; got 9"):
        exact_posterior(Gaussian(1.0), evidence, 9)
    with pytest.raises(ValueError, match="got 'block'"):
        exact_posterior(Block(1.0), evidence, 8)
    with pytest.raises(ValueError, match=r"shape \(recording, post, pre\); got \(4, 4\)"):
        exact_posterior(Gaussian(1.0), evidence[0], 8)
    with pytest.raises(ValueError, match="chains"):
        exact_posterior(Gaussian(1.0), evidence, 8, chains=1)
