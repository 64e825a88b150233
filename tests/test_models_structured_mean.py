"""The mean of W given its structure: against integration, dense algebra, and as an unbiased target."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from neurosde.datasets.ensembles import make_ensemble
from neurosde.datasets.entry_law import EntryLaw
from neurosde.models import ScaleMixtureDenoiser
from neurosde.models.edm import Evidence, fold
from neurosde.models.structured_mean import entry_mean, entry_means, structured_mean

D = torch.float64
FAMILIES = ("gaussian", "dale", "sparse", "low-rank", "block")


def drawn(family, count, N, seed=0):
    """Matrices in J units, and the law of their entries."""
    kind = make_ensemble(family, 2.0, gain=0.5, **({"num_blocks": 2} if family == "block" else {}))
    generator = torch.Generator().manual_seed(seed)
    W, law = kind.draw_matrices(kind.sample_gains(count, generator), N, generator)
    scale = math.sqrt(kind.variance(N))
    return W / scale, law.expand(count, N).scaled(1 / scale)


def measured(J, seed=1, activity=4.0):
    """Noisy matrices, their noise levels, and what recordings of so many transitions say: Λ and B, and both at once."""
    generator = torch.Generator().manual_seed(seed)
    count, N = J.shape[:2]
    phi = torch.randn(count, 3, N, generator=generator, dtype=D)
    y = phi @ J.mT + torch.randn(count, 3, N, generator=generator, dtype=D) / math.sqrt(activity)
    precision, cross = activity * phi.mT @ phi, activity * y.mT @ phi
    sigma = torch.rand(count, generator=generator, dtype=D) * 1.5 + 0.1
    x = J + sigma[:, None, None] * torch.randn(J.shape, generator=generator, dtype=D)
    return x, sigma, precision, cross


def prior_density(law, k, i, j, w):
    """Density of an entry's law on a grid without 0, and its probability of exactly 0."""
    mean, scale = float(law.mean[k, i, j]), float(law.scale[k, i, j])
    normal = np.exp(-0.5 * ((w - mean) / scale) ** 2) / math.sqrt(2 * math.pi) / abs(scale)
    if law.one_sided[k]:
        return 2 * normal * (np.sign(w) == np.sign(scale)), 0.0
    return float(law.density[k]) * normal, 1 - float(law.density[k])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recorded", [False, True])
def test_each_entry_by_integration(family, recorded):
    """Given gain, structure and, of laws that are not normal, the rest of its row, an entry is one integral."""
    N, k = 4, 1
    J, law = drawn(family, 3, N)
    law = law.of_gains(torch.ones(3, dtype=D), torch.ones(3, dtype=D))
    x, sigma, precision, cross = measured(J)
    if not recorded:
        precision, cross = torch.zeros_like(precision), torch.zeros_like(cross)
    evidence = Evidence.of(precision, cross) if recorded else Evidence.none(N).expand((3,))
    normal = family in ("gaussian", "low-rank", "block")
    found = (structured_mean if normal else entry_means)(law, J, x, sigma, evidence)[k]
    s, w = float(sigma[k]), np.linspace(-14, 14, 560_000)
    step = w[1] - w[0]
    for i in range(N):
        if normal and recorded:  # the whole row at once, from its own normal equations
            total = precision[k] + torch.diag(s**-2 + law.scale[k, i].square().reciprocal())
            right = cross[k, i] + x[k, i] / s**2 + law.mean[k, i] / law.scale[k, i].square()
            torch.testing.assert_close(found[i], torch.linalg.solve(total, right), rtol=1e-8, atol=1e-10)
            continue
        for j in range(N):
            tie = float(cross[k, i, j] - sum(J[k, i, n] * precision[k, n, j] for n in range(N) if n != j))

            def log_likelihood(v, i=i, j=j, tie=tie):
                return tie * v - 0.5 * float(precision[k, j, j]) * v**2 - 0.5 * (float(x[k, i, j]) - v) ** 2 / s**2

            density, at_zero = prior_density(law, k, i, j, w)
            weight = density * np.exp(log_likelihood(w)) * step
            expected = (w * weight).sum() / (weight.sum() + at_zero * np.exp(log_likelihood(0.0)))
            assert float(found[i, j]) == pytest.approx(expected, abs=2e-4)  # the grid's step at the cut is 5e-5


@pytest.mark.parametrize("recorded", [False, True])
def test_where_all_variances_are_one_the_gain_is_averaged_over(recorded):
    """Of Gaussian weights nothing else is open: T is the best denoiser. Beside a structure it is that of the rest."""
    N, count = 12, 5
    J, law = drawn("gaussian", count, N)
    x, sigma, precision, cross = measured(J)
    evidence = Evidence.of(precision, cross) if recorded else Evidence.none(N).expand((count,))
    unit = math.sqrt(N * make_ensemble("gaussian", 2.0, gain=0.5).variance(N))
    best = ScaleMixtureDenoiser.of_gains(0.5 / unit, 2.0 / unit, 200, evidence if recorded else None)
    expected = best(x, sigma)
    found = structured_mean(law, J, x, sigma, evidence)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    known = structured_mean(law.of_gains(*torch.ones(2, count, dtype=D)), J, x, sigma, evidence)
    assert float((known - expected).norm()) > 30 * float((found - expected).norm())
    shift = torch.linspace(-1.0, 1.0, N, dtype=D).expand(count, N, N)
    moved = Evidence.of(precision, cross + shift @ precision) if recorded else evidence
    beside = structured_mean(replace(law, mean=shift), J + shift, x + shift, sigma, moved)
    torch.testing.assert_close(beside, found + shift, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("recorded", [False, True])
def test_of_any_variances_the_gain_is_averaged_over(recorded):
    """By dense algebra for each of many gains: the mean, and the likelihood of what was seen."""
    N, count, k = 6, 4, 2
    J, law = drawn("block", count, N)
    x, sigma, precision, cross = measured(J)
    if not recorded:
        precision, cross = torch.zeros_like(precision), torch.zeros_like(cross)
    evidence = Evidence.of(precision, cross) if recorded else Evidence.none(N).expand((count,))
    told = law.gains.clone()
    told[0] = 1.0  # of one of them
    found = structured_mean(replace(law, gains=told), J, x, sigma, evidence)[k]
    low, high = (float(end) for end in law.gains[k])
    total = precision[k] + torch.eye(N, dtype=D) / sigma[k] ** 2
    right = cross[k] + x[k] / sigma[k] ** 2
    means, log_odds = [], []
    for gain in np.linspace(low, high, 4001):
        spread = gain * law.scale[k]
        systems = total + torch.diag_embed(spread**-2)
        mean = torch.linalg.solve(systems, right.unsqueeze(-1)).squeeze(-1)
        means.append(mean)
        log_odds.append(0.5 * (right * mean).sum() - 0.5 * systems.logdet().sum() - spread.abs().log().sum())
    chances = torch.stack(log_odds).softmax(0)
    expected = (chances[:, None, None] * torch.stack(means)).sum(0)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    known = structured_mean(law.of_gains(*torch.ones(2, count, dtype=D)), J, x, sigma, evidence)[k]
    assert float((known - expected).norm()) > 30 * float((found - expected).norm())


@pytest.mark.parametrize("recorded", [False, True])
def test_sparse_weights_whose_connections_are_all_there_are_gaussian(recorded):
    """Of one gain: each row by its normal equations."""
    N, count, kind = 5, 3, make_ensemble("sparse", gain=1.2, density=1.0)
    J, law = kind.draw_matrices(kind.sample_gains(count), N, None)
    x, sigma, precision, cross = measured(J)
    if not recorded:
        precision, cross = torch.zeros_like(precision), torch.zeros_like(cross)
    evidence = Evidence.of(precision, cross) if recorded else Evidence.none(N).expand((count,))
    noise = sigma.square()[:, None, None]
    total = precision + torch.eye(N, dtype=D) * (1 / noise + N / 1.2**2)
    expected = torch.linalg.solve(total, (cross + x / noise).mT).mT
    found = structured_mean(law.expand(count, N), J, x, sigma, evidence)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_unbiased_target_that_scatters_less(family):
    """T and W have one mean given what the denoiser sees: their difference is uncorrelated with any function of it."""
    count, N = 4000, 6
    J, law = drawn(family, count, N)
    x, sigma, precision, cross = measured(J)
    evidence = Evidence.of(precision, cross)
    T = structured_mean(law, J, x, sigma, evidence)
    folded = fold(x, sigma, evidence)
    D0 = folded.posterior_mean
    for seen in (torch.ones_like(x), D0, D0.abs(), D0.pow(3), x * x.mean((1, 2), keepdim=True), D0.mT):
        product = ((T - J) * seen).mean((1, 2)) / seen.square().mean((1, 2)).sqrt()
        assert abs(float(product.mean())) < 4 * float(product.std()) / math.sqrt(count)
    less = (folded.whitened(J - D0).square() - folded.whitened(T - D0).square()).mean((1, 2))
    assert float(less.mean()) > 4 * float(less.std()) / math.sqrt(count)


def test_normal_entries_far_on_the_wrong_side():
    """A one-sided weight whose measurement is of the other sign is next to 0, without cancellation."""
    law = EntryLaw.of(torch.full((1, 1, 1), -0.7, dtype=D), one_sided=True)
    far, variance = torch.tensor([[[1e1, 1e2, 1e3]]], dtype=D), 1e-2
    found = entry_mean(law, far, torch.full((1, 1, 1), variance, dtype=D))
    # Beyond a far cut a normal law is exponential: its mean is variance over distance, less 2 (sd/distance)² of that.
    torch.testing.assert_close(found, -variance / far, rtol=3 * variance / 1e2, atol=0.0)
