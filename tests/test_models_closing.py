"""Sweeps of Gibbs sampling that close a diffusion: what they leave as it is, what they mend, and against other ways."""

import itertools
import math

import numpy as np
import pytest
import torch
from problems import DEVICES, D, normal
from scipy.stats import kstest, truncnorm

from neurosde.cli import main
from neurosde.datasets.ensembles import Dale, make_ensemble
from neurosde.likelihood import transition_statistics
from neurosde.models import CFGPosterior, Evidence, InferenceConfig, load_prior
from neurosde.models.analytic import uniform_gains
from neurosde.models.closing import closed
from neurosde.models.gibbs_dale import DaleChains, normal_above
from neurosde.models.posterior_file import config_of, open_posterior
from neurosde.solve import simulate_rate_network

FAMILIES = ("gaussian", "dale", "sparse", "low-rank", "block")


def of_networks(family, count, N, seed=0, strength=2.0):
    """Networks of an ensemble, neurons in any order, and evidence of a recording of each."""
    g = torch.Generator().manual_seed(seed)
    kind = make_ensemble(family, 3.0, gain=0.3)
    W = kind.sample_weights(count, N, g)
    order = torch.rand(count, N, generator=g).argsort(-1)
    W = W.gather(1, order.unsqueeze(-1).expand_as(W)).gather(2, order.unsqueeze(1).expand_as(W))
    x = torch.randn(count, N // 2, N, generator=g, dtype=D)  # half of all directions are seen
    noise = torch.randn(count, N, N // 2, generator=g, dtype=D)
    return kind, W, Evidence.of(strength * x.mT @ x, W @ (strength * x.mT @ x) + math.sqrt(strength) * noise @ x)


def features(W, evidence):
    square, s = W.square(), torch.linalg.svdvals(W)
    B = evidence.cross @ evidence.vectors.mT
    explained = (B * W).sum((1, 2)) / B.flatten(1).norm(dim=1) / W.flatten(1).norm(dim=1)
    return {
        "log norm": W.flatten(1).norm(dim=1).log(),
        "kurtosis": square.square().mean((1, 2)) / square.mean((1, 2)).square(),
        "first singular value": s[:, 0] / s.norm(dim=1),
        "columns": W.mean(1).square().mean(1) / square.mean((1, 2)),
        "rows": square.mean(2).var(1) / square.mean((1, 2)).square(),
        "explained": explained,
        "zeros": (W == 0).double().mean((1, 2)),
        "pairs": (square + square.mT).amax(2).mean(1) / square.mean((1, 2)),
    }


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("family", "strength"), [*((family, 2.0) for family in FAMILIES), ("block", 1e9)])
def test_draws_of_the_posterior_stay_draws_of_it(family, strength, device):
    """True weights are a draw of the posterior, and have features of the same mean after sweeps."""
    kind, W, evidence = of_networks(family, 2000, 8, strength=strength)
    seen = W.flatten(1).norm(dim=1) > 0  # tiny sparse networks may have no connection at all
    which, g = torch.zeros(2000, device=device), torch.Generator(device).manual_seed(1)
    found = closed(W.to(device), evidence.to(device), [kind], which, sweeps=3, generator=g).cpu()
    kept = seen & (found.flatten(1).norm(dim=1) > 0)
    assert kept.double().mean() > 0.99
    change = (found - W)[kept].flatten(1).norm(dim=1) / W[kept].flatten(1).norm(dim=1)
    assert change.median() > 0.3
    before, after = features(W[kept], evidence[kept]), features(found[kept], evidence[kept])
    for name, one in before.items():
        off = after[name] - one
        # 48 features of all ensembles: that one is beyond 4 standard errors happens in one of 300 such tests.
        assert abs(off.mean()) <= 4 * off.std() / math.sqrt(len(off)), (name, off.mean() / off.std())


@pytest.mark.parametrize("family", ["dale", "block", "low-rank", "sparse"])
def test_draws_that_are_too_small_are_mended(family):
    kind, W, evidence = of_networks(family, 300, 20, seed=3)
    found = closed(0.9 * W, evidence, [kind], torch.zeros(300), generator=torch.Generator().manual_seed(1))
    off = (found.flatten(1).norm(dim=1) / W.flatten(1).norm(dim=1)).log()
    assert abs(off.mean()) < 4 * off.std() / math.sqrt(300)
    assert off.std() / math.sqrt(300) < 0.01  # so that a tenth of what was wrong would show


def test_signed_weights_by_importance():
    """Two neurons, one of each sign, a gain between 0.5 and 2: prior draws weighted by their likelihood."""
    ensemble, low, high = Dale(1.0, excitatory_fraction=0.5), 0.5, 2.0
    precision = torch.tensor([[2.0, 0.8], [0.8, 1.5]], dtype=D)
    B = torch.tensor([[1.5, -0.6], [0.4, -1.8]], dtype=D)
    g = torch.Generator().manual_seed(0)
    gain = low + (high - low) * torch.rand(1_000_000, generator=g, dtype=D)
    scales = ensemble.column_scales(2)
    prior = gain[:, None, None] * scales * torch.randn(1_000_000, 2, 2, generator=g, dtype=D).abs()
    weight = (prior * B).sum((1, 2)) - 0.5 * ((prior @ precision) * prior).sum((1, 2))
    weight = weight.softmax(0)
    chains, sweeps = 4000, 40
    begin = prior[:chains].clone()
    squares, log_chances = uniform_gains(*torch.tensor([low, high], dtype=D))
    evidence = Evidence.of(precision, B).expand((chains,))
    some = DaleChains(ensemble, squares.sqrt(), log_chances.exp(), evidence, g, begin)
    drawn = []
    for _ in range(sweeps):
        W = some.sweep()
        drawn.append(torch.cat([W.flatten(1), some.gains[some.component, None]], 1))
    drawn = torch.stack(drawn)[10:]
    for power in (1, 2):
        numbers = torch.cat([prior.flatten(1), gain[:, None]], 1) ** power
        want = weight @ numbers
        error = (weight.square() @ (numbers - want).square()).sqrt()
        found = (drawn**power).mean(0)
        z = (found.mean(0) - want) / (error.square() + found.var(0) / chains).sqrt()
        assert z.abs().max() < 4, z  # ten numbers


@pytest.mark.parametrize("least", [-40.0, -3.0, 0.0, 4.9, 5.1, 40.0])
def test_numbers_above_a_bound(least):
    u = torch.rand(20_000, generator=torch.Generator().manual_seed(0), dtype=D)
    found = normal_above(torch.full_like(u, least), u)
    assert found.min() >= least
    assert kstest(found.numpy(), truncnorm(least, np.inf).cdf).pvalue > 1e-3
    torch.testing.assert_close(found, torch.from_numpy(truncnorm.isf(u.numpy(), least, np.inf)), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("family", "strength"), list(itertools.product(FAMILIES, [0.0, 1e9])))
def test_no_recording_and_one_that_leaves_nothing_open(family, strength):
    kind, W, evidence = of_networks(family, 20, 6, strength=strength)
    found = closed(W, evidence, [kind], torch.zeros(20), generator=torch.Generator().manual_seed(0))
    assert found.isfinite().all()
    seen = evidence.eigenvalues > 1
    assert int(seen.sum()) == (60 if strength else 0)
    z = (found @ evidence.vectors - evidence.cross / evidence.eigenvalues.unsqueeze(-2)) * evidence.eigenvalues.sqrt()[
        :, None
    ]
    assert (z[seen.unsqueeze(-2).expand_as(z)].abs() < 6).all()  # 360 numbers that are about standard normal


def test_each_draw_is_of_its_own_ensemble():
    """One that is not known here stays as it is, and so does one that cannot have the gain that is told."""
    kinds = [make_ensemble("dale", 3.0, gain=0.3), None, make_ensemble("low-rank", 3.0, gain=0.3)]
    _, W, evidence = of_networks("dale", 6, 6)
    which = torch.tensor([0, 1, 2, 1, 0, 2])
    found = closed(W, evidence, kinds, which, gain=0.9, generator=torch.Generator().manual_seed(0))
    # Low-rank weights of strength 1 have a root mean square gain above 1.
    assert (found != W).flatten(1).any(1).tolist() == [True, False, False, False, True, False]
    assert torch.equal(closed(W, evidence, kinds, which, sweeps=0), W)


@pytest.mark.parametrize("N", [1, 2, 3])
def test_of_few_neurons_those_ensembles_are_closed_that_have_so_few(N):
    """Dale's law needs two neurons, four clusters need four, and rank two is more than one neuron can show."""
    kinds = [make_ensemble(family, 3.0, gain=0.3) for family in FAMILIES]
    evidence = Evidence.of(torch.eye(N, dtype=D), normal(N, N)).expand((50,))
    W = normal(50, N, N, seed=1).abs()
    found = closed(W, evidence, kinds, torch.arange(50) % 5, generator=torch.Generator().manual_seed(0))
    moved = (found != W).flatten(1).any(1).view(10, 5).any(0)
    assert found.isfinite().all() and moved.tolist() == [True, N > 1, True, True, False]


def test_a_gain_that_is_told_is_that_of_the_draws():
    """Of 20 neurons |W| scatters about what the gain says by 1/√800, and more for clusters' two kinds of weights."""
    for family in ("gaussian", "dale", "block"):
        kind, W, _ = of_networks(family, 40, 20)
        nothing = Evidence.none(20).expand((40,))
        found = closed(W, nothing, [kind], torch.zeros(40), gain=1.3, sweeps=2)
        gain = (found.square().mean((1, 2)) * 20).sqrt()
        assert abs(gain.mean() - 1.3) < 5 * gain.std() / math.sqrt(40) and gain.std() < 0.15, family


def recorded_network(family, N, seed=1):
    W = make_ensemble(family, gain=1.0).sample_weights(1, N, torch.Generator().manual_seed(seed))[0]
    g = torch.Generator().manual_seed(0)
    h0 = torch.randn(2, N, generator=g, dtype=D)
    _, h = simulate_rate_network(W, h0, 800, 0.1, 1.0, noise_std=0.3, generator=g, return_h=True)
    return transition_statistics(voltage=h, dt=0.1)


@pytest.fixture(scope="module")
def base():
    return CFGPosterior.from_pretrained("base")


def test_posterior_draws_are_closed_unless_told_otherwise(base):
    statistics = recorded_network("dale", 12)
    given = base.condition(statistics, noise_std=0.3, family="dale")
    options = {"steps": 8}
    plain, mended = (given.sample((4,), closing=one, generator=0, **options) for one in (False, True))
    assert not torch.equal(plain, mended)
    assert torch.equal(plain.sum(-2) < 0, mended.sum(-2) < 0)
    assert ((mended > 0).all(-2) | (mended < 0).all(-2)).all()
    guided = [given.sample((2,), guidance=2.0, closing=one, generator=0, **options) for one in (False, True)]
    assert torch.equal(*guided)


def test_clusters_of_a_recording_without_noise_are_closed(base):
    """Of 16 times, which leave some directions of 20 neurons unseen, and others seen exactly."""
    g = torch.Generator().manual_seed(0)
    W = make_ensemble("block", gain=1.0).sample_weights(1, 20, g)[0]
    h0 = torch.randn(1, 20, generator=g, dtype=D)
    _, voltage = simulate_rate_network(W, h0, 16, 0.1, 1.0, noise_std=0.0, return_h=True)
    given = base.condition(transition_statistics(voltage=voltage, dt=0.1), noise_std=0.0, family="block")
    assert given.sample((4,), steps=4, generator=0).isfinite().all()


def test_untold_draws_are_closed_by_their_own_ensemble(base):
    """Weights of Dale's law and sparse ones would lose their signs and zeros as draws of any other."""
    for family in ("dale", "sparse"):
        given = base.condition(recorded_network(family, 20), noise_std=0.3)
        found = given.sample((6,), steps=12, generator=0)
        assert found.shape == (6, 20, 20)
        if family == "dale":
            assert ((found > 0).all(-2) | (found < 0).all(-2)).all()
        else:
            assert (found == 0).double().mean() > 0.5


def test_refined_draws_are_closed_unless_told_otherwise(base):
    """By the posterior's own prior and by a prior of one ensemble; not where nothing says of which ensemble it is."""
    draws = make_ensemble("block", gain=1.0).sample_weights(4, 8, torch.Generator().manual_seed(3))
    statistics = recorded_network("block", 8)
    options = {"sweeps": 8, "steps": 4, "generator": 0}
    told, untold = (base.condition(statistics, noise_std=0.3, family=family) for family in ("block", None))
    for given, prior, moves in (
        (told, None, True),
        (untold, None, True),
        (untold, load_prior("block"), True),
        (told, load_prior("all"), True),
        (untold, load_prior("all"), False),
    ):
        found = [given.refine(draws, prior=prior, closing=one, **options).draws for one in (True, False)]
        assert found[0].isfinite().all()
        assert torch.equal(*found) != moves
    guided = [told.refine(draws, method="mmps", steps=4, closing=one, generator=0).draws for one in (True, False)]
    assert torch.equal(*guided)


def test_without_trained_draws_there_is_nothing_to_close():
    with pytest.raises(ValueError, match="closing is for method 'cfg'"):
        InferenceConfig(closing=False)
    assert not InferenceConfig(closing=False, refine="gibbs").closing


def test_commands_close_draws_unless_told_otherwise(posteriors, tmp_path):
    def run(*words):
        out = tmp_path / f"{len(list(tmp_path.iterdir()))}.nc"
        assert main([*map(str, words), "--out", str(out)]) == 0
        with open_posterior(out) as tree:
            return out, config_of(tree)["closing"], tree["posterior"]["weights"].to_numpy()

    infer = ("infer", posteriors["cube"], "--network", 1, "--draws", 4, "--predictive-draws", 0, "--method", "cfg")
    first, yes, closed_draws = run(*infer, "--steps", 6)
    plain, no, plain_draws = run(*infer, "--steps", 6, "--no-closing")
    assert yes and not no and not np.array_equal(closed_draws, plain_draws)
    found = [run("refine", plain, "--sweeps", 8, *words) for words in ((), ("--no-closing",), ("--closing",))]
    assert [one for _, one, _ in found] == [False, False, True]
    assert np.array_equal(found[0][2], found[1][2]) and not np.array_equal(found[0][2], found[2][2])


def test_several_recordings_of_unknown_noise_are_closed_each_by_its_own(base):
    """Signs of columns tell whose draws they are, and each draw has its own σ."""
    recordings = [recorded_network("dale", 12, seed) for seed in (1, 2)]
    given = base.condition(recordings, family="dale")
    plain, mended = (given.sample((5,), steps=12, closing=one, generator=0) for one in (False, True))
    assert mended.shape == (5, 2, 12, 12) and torch.equal(plain.sum(-2) < 0, mended.sum(-2) < 0)
    alone = [base.condition(one, family="dale") for one in recordings]
    misfit = torch.empty(2, 2)
    for j, one in enumerate(alone):
        evidence = one._drawn(5, None, None).expand((5, 1)).flat()
        precision, linear = evidence.along_neurons()
        for k in range(2):
            W = mended[:, k]
            misfit[k, j] = (0.5 * ((W @ precision) * W).sum((1, 2)) - (linear * W).sum((1, 2))).mean()
    assert (misfit.diagonal() < misfit.flip(1).diagonal()).all()
