"""sbi's estimators as baselines: what they are given, that they learn from it, and what is refused."""

import math
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from neurosde.datasets.ensembles import Gaussian, Sparse
from neurosde.evaluation import sbi_baselines
from neurosde.evaluation.sbi_baselines import SBI_METHODS, features, sbi_draws
from neurosde.likelihood import transition_statistics
from neurosde.models.gaussian_posterior import GaussianPosterior
from neurosde.solve import simulate_rate_network

N, T, DT, SIGMA = 2, 60, 0.1, 0.3
ENSEMBLE = Gaussian(1.5)
KNOWN = {"noise_std": SIGMA, "dt": DT, "trials": 1, "T": T}


def recordings(count, neurons=N, seed=1, ensemble=ENSEMBLE):
    generator = torch.Generator().manual_seed(seed)
    W = ensemble.sample_weights(count, neurons, generator)
    h0 = torch.randn(count, 1, neurons, generator=generator, dtype=torch.float64)
    _, h = simulate_rate_network(W[:, None], h0, T, DT, 1.0, noise_std=SIGMA, generator=generator, return_h=True)
    return [transition_statistics(voltage=one, dt=DT) for one in h]


def test_features_determine_the_sufficient_statistics():
    given, variance = recordings(3, neurons=3), ENSEMBLE.variance(3)
    for one, found in zip(given, features(given, SIGMA, variance), strict=True):
        mean, sd, correlations = found[:9].view(3, 3) * math.sqrt(variance), found[9:12].exp(), found[12:]
        C = torch.eye(3, dtype=torch.float64)
        C[[0, 0, 1], [1, 2, 2]] = C[[1, 2, 2], [0, 0, 1]] = correlations
        precision = torch.linalg.inv(variance * C * sd * sd[:, None])
        lam, b = one.precision(SIGMA)
        torch.testing.assert_close(precision - torch.eye(3) / variance, lam, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(mean @ precision, b, rtol=1e-8, atol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("method", SBI_METHODS)
def test_an_estimator_learns_the_exact_posterior_quietly(method, tmp_path, monkeypatch, capfd):
    pytest.importorskip("sbi", reason="takes sbi: pip install 'neurosde[sbi]'")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sbi_baselines, "_SIMULATED", 300 * T * N)
    monkeypatch.setattr(sbi_baselines, "_SAMPLED", 1000)  # so that simulations and draws are made in several parts
    count, draws = 64, 50
    given, variance = recordings(count), ENSEMBLE.variance(N)
    before = torch.get_rng_state()
    found = sbi_draws(method, ENSEMBLE, given, **KNOWN, simulations=2000, draws=draws)
    assert torch.equal(torch.get_rng_state(), before)
    assert not list(tmp_path.iterdir()) and capfd.readouterr() == ("", "")
    assert found.shape == (count, draws, N, N) and found.dtype == torch.float64 and found.isfinite().all()

    exact = [GaussianPosterior.from_statistics(one, SIGMA, variance) for one in given]
    mean, spread = (torch.stack([getattr(one, name) for one in exact]) for name in ("mean", "sd"))
    # Of draws that have nothing to do with the recording, the correlation with the exact means is normal about zero
    # with a standard error of 1/√n, and its square expects 1/n: five standard errors.
    n = count * N * N
    assert np.corrcoef(found.mean(1).flatten(), mean.flatten())[0, 1] > 5 / math.sqrt(n)
    # Nor are they nearer to the exact means than the prior's, whose squares about them are v + mean² on average. Exact
    # ones have those of the posterior; half way between the two lies beyond any doubt of n values.
    squares = (found - mean[:, None]).square().mean()
    assert squares < (spread.square().mean() + variance + mean.square().mean()) / 2


def test_the_seed_decides():
    pytest.importorskip("sbi", reason="takes sbi: pip install 'neurosde[sbi]'")
    given = recordings(2)
    first, again, other = (
        sbi_draws("npe", ENSEMBLE, given, **KNOWN, simulations=40, draws=3, seed=seed) for seed in (5, 5, 6)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("method", ["npe", "fmpe"])
def test_sparse_weights_bring_no_warning(method):
    pytest.importorskip("sbi", reason="takes sbi: pip install 'neurosde[sbi]'")
    sparse = Sparse(1.5, density=0.1)
    given = recordings(2, 3, ensemble=sparse)
    assert sbi_draws(method, sparse, given, **KNOWN, simulations=40, draws=3).shape == (2, 3, 3, 3)


@pytest.mark.parametrize(
    ("method", "options", "match"),
    [
        ("snpe", {}, "method must be one of npe, npse, fmpe; got 'snpe'"),
        ("npe", {"noise_std": 0.0}, "noise_std must be positive"),
        ("npe", {"dt": -0.1}, "dt must be positive"),
        ("npe", {"simulations": 5}, "simulations must be at least 20"),
        ("npe", {"draws": 0}, "draws must be at least 1"),
        ("npe", {"seed": -1}, "seed must be at least 0"),
        ("npe", {"T": 100}, r"statistics must be of 1 x 100 samples .* got 59 transitions"),
        ("npe", {"trials": 2}, "must be of 2 x 60 samples"),
        ("npe", {"dt": 0.05}, "dt = 0.05, .* got 59 transitions, dt = 0.1"),
    ],
)
def test_what_cannot_be_done_is_refused(method, options, match):
    with pytest.raises(ValueError, match=match):
        sbi_draws(method, ENSEMBLE, recordings(1), **(KNOWN | options))


def test_recordings_unlike_the_simulated_ones_are_refused():
    (one,) = recordings(1)
    with pytest.raises(ValueError, match="at least one recording; got none"):
        sbi_draws("npe", ENSEMBLE, [], **KNOWN)
    with pytest.raises(ValueError, match=r"one number of neurons; got \[2, 3\]"):
        sbi_draws("npe", ENSEMBLE, [one, *recordings(1, neurons=3)], **KNOWN)
    with pytest.raises(ValueError, match="free_input = True for recording 1"):
        sbi_draws("npe", ENSEMBLE, [one, one.without_input()], **KNOWN)
    with pytest.raises(ValueError, match="tau = 2,"):
        sbi_draws("npe", ENSEMBLE, [replace(one, gain=DT / 2)], **KNOWN)


def test_without_sbi_it_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "sbi", None)
    with pytest.raises(ImportError, match=r"sbi is needed .* pip install 'neurosde\[sbi\]'"):
        sbi_draws("npe", ENSEMBLE, recordings(1), **KNOWN)
