"""Denoisers of structured weights with an unknown gain, against densities, brute force and exact limits."""

import itertools
import math

import pytest
import torch
from problems import D, normal, number
from torch.distributions import Normal

from neurosde.datasets.ensembles import Dale, LowRank, Sparse, make_ensemble
from neurosde.models import (
    DaleDenoiser,
    Evidence,
    ScaleMixtureDenoiser,
    SpikeAndSlabDenoiser,
    SpikeAndSlabMixtureDenoiser,
    SpikedDenoiser,
    analytic,
    analytic_dale,
    best_denoiser,
)

GAINS = torch.tensor([0.5, 0.9, 1.3], dtype=D)
CHANCES = torch.tensor([0.3, 0.2, 0.5], dtype=D)


@pytest.mark.parametrize("s", [0.1, 1.0, 20.0])
def test_sparse_weights_of_unknown_gain_by_tweedies_formula(s):
    density, variances = 0.3, GAINS.square() / 0.3
    x = (1.2 * normal(5, 4, 4)).requires_grad_()
    logs = []
    for v, p in zip(variances.tolist(), CHANCES.tolist(), strict=True):
        slab, spike = (Normal(number(0.0), sd).log_prob(x) for sd in (math.sqrt(v + s**2), s))
        entries = torch.logaddexp(math.log(density) + slab, math.log(1 - density) + spike)
        logs.append(math.log(p) + entries.sum((-1, -2)))
    (slope,) = torch.autograd.grad(torch.stack(logs).logsumexp(0).sum(), x)
    found = SpikeAndSlabMixtureDenoiser(density, variances, CHANCES)(x.detach(), number(s))
    torch.testing.assert_close(found, (x + s**2 * slope).detach(), rtol=1e-8, atol=1e-9)


def test_sparse_weights_of_one_gain():
    x, s = normal(2, 3, 6, 6), torch.tensor([0.3, 1.0, 4.0], dtype=D)
    known = SpikeAndSlabDenoiser(0.2, 1.5)
    torch.testing.assert_close(SpikeAndSlabMixtureDenoiser(0.2, torch.tensor([1.5]))(x, s), known(x, s))


def test_nearly_full_sparse_weights_are_a_scale_mixture():
    x = normal(3, 6, 6)
    found = SpikeAndSlabMixtureDenoiser(1 - 1e-12, GAINS.square(), CHANCES)(x, number(0.8))
    torch.testing.assert_close(found, ScaleMixtureDenoiser(GAINS.square(), CHANCES)(x, number(0.8)))


def orthogonal(denoise, J, s, seed):
    """Whether the error has no correlation with functions of what was seen, within four standard errors."""
    x = J + s * normal(*J.shape, seed=seed)
    mean = denoise(x, number(s))
    for f in (x, x**3, x.mT, x @ x.mT @ x, mean, x * x.square().mean((-1, -2), keepdim=True)):
        each = ((mean - J) * f).mean((-1, -2))
        assert abs(float(each.mean())) < 4 * float(each.std()) / math.sqrt(len(each))


@pytest.mark.parametrize("s", [0.4, 1.5])
def test_errors_for_the_sparse_ensemble_are_orthogonal_to_the_data(s):
    N, count = 8, 1500
    generator = torch.Generator().manual_seed(1)
    gains = (0.8 + 1.2 * torch.rand(count, generator=generator)).tolist()
    J = torch.stack([math.sqrt(N) * Sparse(g, density=0.2).sample(N, generator).weights for g in gains])
    orthogonal(SpikeAndSlabMixtureDenoiser.of_gains(0.8, 2.0, 0.2), J, s, seed=2)


@pytest.mark.parametrize("known", [1e2, 1e8, 1e15])
def test_a_gain_is_found_however_precise_a_recording_is(known):
    """Half of the directions are recorded: their weights tell the gain as a sample does, the others as W_s does."""
    N, s, v = 6, 1.0, torch.logspace(-1, 1, 300, dtype=D)
    precision = torch.tensor([known] * 3 + [0.0] * 3, dtype=D)
    J, x = 0.8 * normal(N, N, seed=5), normal(N, N, seed=6)
    found = ScaleMixtureDenoiser(v, None, Evidence(precision, None, J * precision))(x, number(s))
    noise = torch.tensor([1 / (known + s**-2)] * 3 + [s**2] * 3, dtype=D)
    seen = torch.cat([(J * known + x / s**2)[:, :3] / (known + s**-2), x[:, 3:]], 1)
    logs = Normal(0.0, (v.view(-1, 1, 1) + noise).sqrt()).log_prob(seen).sum((1, 2))
    share = (logs.softmax(0)[:, None] * v[:, None] / (v[:, None] + noise)).sum(0)
    torch.testing.assert_close(found, share * seen, rtol=1e-9, atol=1e-9)


def test_components_are_many_at_a_time_or_one(monkeypatch):
    x = normal(4, 6, 6)
    some = (
        ScaleMixtureDenoiser(GAINS.square(), CHANCES),
        SpikeAndSlabMixtureDenoiser(0.2, GAINS.square(), CHANCES),
        DaleDenoiser(Dale(), GAINS, CHANCES),
    )
    together = [denoise(x, number(0.7)) for denoise in some]
    for module in (analytic, analytic_dale):
        monkeypatch.setattr(module, "COMPONENT_ENTRIES", 1)
    for denoise, expected in zip(some, together, strict=True):
        torch.testing.assert_close(denoise(x, number(0.7)), expected)


@pytest.mark.parametrize("s", [0.05, 1.0, 20.0])
def test_dales_law_by_tweedies_formula(s):
    """W_s has the density of all gains and all sets of inhibitory neurons: so many normal laws cut off at 0."""
    kind, N = Dale(excitatory_fraction=0.6, balance=1.4), 5
    columns = (kind.column_scales(N) * math.sqrt(N)).tolist()
    assert sum(scale < 0 for scale in columns) == 2
    x = normal(5, N, N).requires_grad_()
    logs = []
    for gain, p in zip(GAINS.tolist(), CHANCES.tolist(), strict=True):
        for order in set(itertools.permutations(columns)):
            scale = gain * torch.tensor(order, dtype=D)
            sd = (scale.square() + s**2).sqrt()
            positive = torch.special.log_ndtr(scale * x / (sd * s))
            logs.append(math.log(p) + (math.log(2) + Normal(0, sd).log_prob(x) + positive).sum((-1, -2)))
    (slope,) = torch.autograd.grad(torch.stack(logs).logsumexp(0).sum(), x)
    found = DaleDenoiser(kind, GAINS, CHANCES)(x.detach(), number(s))
    torch.testing.assert_close(found, (x + s**2 * slope).detach(), rtol=1e-8, atol=1e-9)


def test_columns_far_from_both_signs_are_finite():
    """Odds of e^±1000 and more: of a column all of one sign, or of both; two of eight neurons inhibit all the same."""
    x = 30 * normal(3, 8, 8, seed=4)
    x[0] = x[0].abs()
    found = DaleDenoiser.of_gains(0.5, 1.5, Dale())(x, number(0.1))
    assert bool(found.isfinite().all())
    x.requires_grad_()  # guidances differentiate it
    assert bool(torch.autograd.grad(DaleDenoiser(Dale(), GAINS)(x, number(0.1)).sum(), x)[0].isfinite().all())
    signs = found.sign()
    assert bool((signs == signs[..., :1, :]).all()) and (signs[:, 0] < 0).sum(-1).tolist() == [2, 2, 2]


@pytest.mark.parametrize("s", [0.4, 1.5])
def test_errors_for_dales_law_are_orthogonal_to_the_data(s):
    N, count = 8, 1500
    generator = torch.Generator().manual_seed(1)
    J = math.sqrt(N) * make_ensemble("dale", 2.0, gain=0.8).sample_weights(count, N, generator)
    orthogonal(DaleDenoiser.of_gains(0.8, 2.0, Dale()), J, s, seed=2)


@pytest.mark.parametrize("s", [1.0, 3.0])
def test_errors_for_the_low_rank_ensemble_are_orthogonal_to_the_data(s):
    N, count = 8, 300
    generator = torch.Generator().manual_seed(3)
    gains = (0.5 + torch.rand(count, generator=generator)).tolist()
    J = torch.stack([math.sqrt(N) * LowRank(g, rank=2, strength=1.5).sample(N, generator).weights for g in gains])
    orthogonal(SpikedDenoiser.of_gains(0.5, 1.5, 1.5, rank=2, points=16, burn_in=15, sweeps=25), J, s, seed=4)


@pytest.mark.parametrize(("N", "rank", "s"), [(2, 1, 0.8), (2, 3, 0.8), (3, 1, 1.5)])
def test_low_rank_structure_by_importance_sampling(N, rank, s):
    """Draws of the prior, weighted by how well they explain x; errors by the delta method and from the chains."""
    count, strength = 1_000_000, 0.9
    generator = torch.Generator().manual_seed(5)
    gains = GAINS[torch.multinomial(CHANCES, count, replacement=True, generator=generator)].view(-1, 1, 1)
    m, n = normal(2, count, N, rank, seed=6)
    prior = gains * normal(count, N, N, seed=7) + strength / math.sqrt(rank) * m @ n.mT
    x = 1.5 * normal(2, N, N, seed=8 + N)
    denoise = SpikedDenoiser(GAINS.square(), strength, rank, CHANCES, sweeps=300)
    found, error = denoise.with_error(x, number(s))
    for i, one in enumerate(x):
        weight = (-(prior - one).square().sum((-1, -2)) / (2 * s**2)).softmax(0).view(-1, 1, 1)
        mean = (weight * prior).sum(0)
        variance = (weight * (prior - mean)).square().sum(0) + error[i]
        assert float(variance.sqrt().max()) < 0.02  # that the comparison says something
        assert bool(((found[i] - mean).abs() < 5 * variance.sqrt()).all())


def test_the_error_of_the_chains_is_what_it_says():
    """Many seeds scatter about their mean by the error that each states."""
    x, s = 2 * normal(4, 6, 6), torch.tensor([0.5, 1.0, 2.0, 4.0], dtype=D)
    runs = [SpikedDenoiser(GAINS.square(), 1.2, burn_in=10, sweeps=10, seed=i).with_error(x, s) for i in range(40)]
    means, errors = (torch.stack(each) for each in zip(*runs, strict=True))
    torch.testing.assert_close(means.var(0).mean((-1, -2)), errors.mean(0), rtol=0.25, atol=0)


def test_without_structure_it_is_the_scale_mixture():
    x, s = normal(2, 3, 7, 7), torch.tensor([0.2, 1.0, 9.0], dtype=D)
    mean, error = SpikedDenoiser(GAINS.square(), 0.0, 2, CHANCES, burn_in=1, sweeps=2).with_error(x, s)
    torch.testing.assert_close(mean, ScaleMixtureDenoiser(GAINS.square(), CHANCES)(x, s.view(3)))
    assert float(error.max()) < 1e-25
    weak = SpikedDenoiser(GAINS.square(), 1e-4, 2, CHANCES, burn_in=1, sweeps=2)(x, s)
    torch.testing.assert_close(weak, mean, rtol=0, atol=1e-6)


def test_clear_structure_is_found():
    """Far above the threshold what is left of the noise on the structure is its share on r rows and columns."""
    N, rank, s = 40, 2, 0.3
    m, n = normal(2, 5, N, rank)
    structure = m @ n.mT / math.sqrt(rank)
    denoise = SpikedDenoiser(torch.tensor([1e-6]), 1.0, rank, sweeps=50)
    mean, error = denoise.with_error(structure + s * normal(5, N, N, seed=1), number(s))
    left = float((mean - structure).square().mean())
    assert left == pytest.approx(s**2 * (2 * N * rank - rank**2) / N**2, rel=0.2)
    assert float(error.mean()) < 0.01 * left


def test_it_is_a_function():
    denoise, x = SpikedDenoiser(GAINS.square(), 1.0, sweeps=5), normal(2, 4, 4)
    assert torch.equal(denoise(x, number(1.0)), denoise(x, number(1.0)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_the_gpu():
    x, s = 2 * normal(3, 8, 8), number(1.0)
    sparse = SpikeAndSlabMixtureDenoiser.of_gains(0.5, 1.5, 0.2)
    torch.testing.assert_close(sparse(x.cuda(), s.cuda()).cpu(), sparse(x, s))
    for name in ("dale", "sparse"):
        best = best_denoiser(make_ensemble(name, 1.5, gain=0.5), 1.0)
        torch.testing.assert_close(best(x.cuda(), s.cuda()).cpu(), best(x, s))
    spiked = SpikedDenoiser.of_gains(0.5, 1.5, 1.0)
    (here, error), (there, other) = spiked.with_error(x, s), spiked.with_error(x.cuda(), s.cuda())
    assert bool(((here - there.cpu()).square().mean((-1, -2)) < 9 * (error + other.cpu())).all())


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: SpikeAndSlabMixtureDenoiser(1.0, torch.ones(1)), r"lie in \(0, 1\); got 1"),
        (lambda: SpikeAndSlabMixtureDenoiser(0.2, torch.zeros(1)), "positive"),
        (lambda: SpikeAndSlabMixtureDenoiser.of_gains(2.0, 1.0, 0.2), "must exceed low"),
        (lambda: SpikedDenoiser(torch.ones(2), 1.0, 2, torch.ones(3)), "one for each of the variances"),
        (lambda: DaleDenoiser(Dale(), -torch.ones(2)), "gains must be a vector of positive"),
        (lambda: DaleDenoiser(Dale(), torch.ones(2), torch.ones(3)), "one for each of the gains"),
        (lambda: SpikedDenoiser(torch.ones(2), -1.0), "strength must"),
        (lambda: SpikedDenoiser(torch.ones(2), 1.0, 0), "rank must"),
        (lambda: SpikedDenoiser(torch.ones(2), 1.0, chains=1), "at least 2; got 1"),
        (lambda: SpikedDenoiser(torch.ones(2), 1.0, sweeps=0), "sweeps must"),
        (lambda: SpikedDenoiser.of_gains(2.0, 1.0, 1.0), "must exceed low"),
    ],
)
def test_bad_input_says_what_was_expected(call, match):
    with pytest.raises(ValueError, match=match):
        call()
