"""Labels of clusters: given weights, given a recording with weights summed over, and both by enumeration."""

import itertools
import math

import pytest
import torch
from problems import DEVICES, D, normal
from scipy.stats import chisquare

from neurosde.datasets.ensembles import Block, make_ensemble
from neurosde.models import Evidence
from neurosde.models.analytic import uniform_gains
from neurosde.models.cluster_exchanges import SummedLabels
from neurosde.models.exact_posterior import gain_nodes
from neurosde.models.gibbs_clusters import ClusterChains


def partitions(ensemble, N):
    """Labels of all partitions of N neurons into clusters of the ensemble's sizes, (partition, neuron)."""
    found = {}
    for labels in set(itertools.permutations(ensemble.profile(N)[1].tolist())):
        found[tuple(labels.index(one) for one in labels)] = labels  # named by each cluster's first neuron
    return torch.tensor(list(found.values()))


def together(labels):
    return labels.unsqueeze(-1) == labels.unsqueeze(-2)


# Of 2 + 2, 2 + 2 + 2, 2 + 1 + 1 + 1 and 2 + 1 + 2 neurons: with clusters of several sizes, these must move.
@pytest.mark.parametrize(("N", "clusters"), [(4, 2), (6, 3), (5, 4), (5, 3)])
def test_clusters_by_enumeration(N, clusters):
    """Each partition has a known likelihood at each gain, and a known mean."""
    ensemble = Block(1.0, num_blocks=clusters)
    x = normal(6, N, seed=1)
    precision = 1.5 * x.mT @ x
    W = ensemble.sample_weights(1, N, torch.Generator().manual_seed(5))[0]
    evidence = Evidence.of(precision, W @ precision + math.sqrt(1.5) * normal(N, 6, seed=2) @ x)
    B = evidence.cross @ evidence.vectors.mT
    gains, chances = gain_nodes(make_ensemble("block", 2.0, gain=0.4, num_blocks=clusters))
    profile = ensemble.profile(N)[0]
    labels = partitions(ensemble, N)
    sd = torch.where(together(labels), profile.max(), profile.min()) * gains[:, None, None, None]
    prior = torch.diag_embed(sd.square().reciprocal())  # (gain, partition, row, pre, pre)
    C = torch.linalg.inv(precision + prior)
    means = (C @ B.unsqueeze(-1)).squeeze(-1)
    of_rows = 0.5 * (means * B).sum(-1) + 0.5 * torch.logdet(C) + 0.5 * torch.logdet(prior)
    share = (of_rows.sum(-1) + chances.log().unsqueeze(-1)).flatten().softmax(0).view(len(gains), -1)
    want = torch.einsum("gp,gpij->ij", share, means)
    paired = torch.einsum("gp,pij->ij", share, together(labels).double())
    pair = tuple(torch.triu_indices(N, N, 1))
    assert ((paired[pair] > 0.03) & (paired[pair] < 0.97)).any()  # something is open
    chains = 500
    g = torch.Generator().manual_seed(0)
    anywhere = ensemble.sample_weights(chains, N, g)
    some = ClusterChains(ensemble, gains, chances, evidence.expand((chains,)), g, anywhere)
    drawn, labels = [], []
    for sweep in range(100):
        drawn.append(some.sweep())
        labels.append(together(some.labels).double())
        if sweep < 20:
            drawn.clear(), labels.clear()
    of_chains, found = torch.stack(drawn).mean(0), torch.stack(labels).mean(0)
    for estimate, truth in ((of_chains.flatten(1), want.flatten()), (found[:, *pair], paired[pair])):
        z = (estimate.mean(0) - truth) / (estimate.std(0) / math.sqrt(chains)).clamp(min=1e-4)
        assert z.abs().max() < 4.5, z  # at most 51 numbers


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("N", "clusters"), [(6, 3), (5, 4), (5, 3)])
def test_labels_given_weights_by_enumeration(N, clusters, device):
    """So little is told apart by a contrast of 1.5 that all partitions have their share."""
    ensemble, chains = Block(1.0, num_blocks=clusters, contrast=1.5), 4000
    W = ensemble.sample_weights(1, N, torch.Generator().manual_seed(1))
    one, none = torch.ones(1, dtype=D), Evidence.none(N, device).expand((chains,))
    given = W.to(device).expand(chains, N, N)
    some = ClusterChains(ensemble, one, one, none, torch.Generator(device).manual_seed(0), given)
    for _ in range(12):
        some._draw_labels(given)
    labels, profile = partitions(ensemble, N), ensemble.profile(N)[0]
    sd = torch.where(together(labels), profile.max(), profile.min())
    share = (-sd.log() - 0.5 * (W / sd).square()).sum((1, 2)).softmax(0)
    same = (together(some.labels.cpu()).unsqueeze(1) == together(labels)).all(-1).all(-1)
    assert (same.sum(1) == 1).all()
    assert chisquare(same.sum(0).numpy(), (share * chains).numpy()).pvalue > 1e-3


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("N", "clusters", "contrast"), [(6, 3, 3.0), (5, 4, 3.0), (5, 3, 0.3)])
def test_labels_given_a_recording_by_enumeration(N, clusters, contrast, device):
    """Exchanges with weights summed over: each partition has a known likelihood at the one gain."""
    ensemble, chains = Block(1.0, num_blocks=clusters, contrast=contrast), 4000
    g = torch.Generator().manual_seed(4)
    x = torch.randn(6, N, generator=g, dtype=D)
    W = ensemble.sample_weights(1, N, g)[0]
    precision = x.mT @ x
    evidence = Evidence.of(precision, W @ precision + torch.randn(N, 6, generator=g, dtype=D) @ x)
    labels, profile = partitions(ensemble, N), ensemble.profile(N)[0]
    within, between = profile[0, 0], profile[0, -1]
    prior = torch.diag_embed(torch.where(together(labels), within, between).square().reciprocal())
    B = evidence.cross @ evidence.vectors.mT
    C = torch.linalg.inv(precision + prior)  # (partition, row, pre, pre)
    of_rows = (B.unsqueeze(-2) @ C @ B.unsqueeze(-1)).squeeze((-1, -2)) + torch.logdet(C) + torch.logdet(prior)
    share = (0.5 * of_rows.sum(-1)).softmax(0)
    assert share.max() < 0.8 and (share * chains > 5).sum() > 2  # something is open
    one, source = torch.ones(1, dtype=D), torch.Generator(device).manual_seed(0)
    begin = ensemble.sample_weights(chains, N, g).to(device)
    some = ClusterChains(ensemble, one, one, evidence.to(device).expand((chains,)), source, begin)
    for _ in range(30):
        some._exchange()
    same = (together(some.labels.cpu()).unsqueeze(1) == together(labels)).all(-1).all(-1)
    assert (same.sum(1) == 1).all()
    rank = share.argsort(descending=True)
    cells = int((share * chains > 10).sum())  # and the others together, if they are as many
    kinds = torch.cat([torch.arange(cells), torch.full((len(share) - cells,), cells)])
    expected = torch.zeros(cells + 1, dtype=D).index_add(0, kinds, (share * chains)[rank])
    counts = torch.zeros(cells + 1, dtype=D).index_add(0, kinds, same.sum(0).double()[rank])
    seen = expected > 10
    scale = counts[seen].sum() / expected[seen].sum()
    assert chisquare(counts[seen].numpy(), (expected[seen] * scale).numpy()).pvalue > 1e-3


@pytest.mark.parametrize("strength", [1.0, 1e6, 1e12])
@pytest.mark.parametrize("seen", [4, 14])
def test_exchanges_gain_what_the_density_of_the_recording_says(strength, seen):
    """One after the other; by the density of Y = X Wᵀ + noise, or, of what is hardly noisy, of its limit."""
    N, chains, within, between = 7, 5, 0.9, 0.3
    x, variance = normal(chains, seen, N, seed=1), normal(chains, seed=3).exp()
    Y = normal(chains, N, seen, seed=2) @ x @ torch.linalg.pinv(x) + normal(chains, N, seen, seed=5) / strength**0.5
    evidence = Evidence.of(strength * x.mT @ x, strength * Y @ x)
    sizes = torch.tensor([3, 2, 2])
    orders = torch.rand(chains, N, generator=torch.Generator().manual_seed(4)).argsort(-1)

    def log_likelihood(labels):
        """Of what is seen of Y, along the left singular vectors of X: so that noise matters nowhere else."""
        left, values, right = torch.linalg.svd(x, full_matrices=False)
        z = Y @ left
        same = labels.unsqueeze(-1) == labels.unsqueeze(-2)
        D_i = (between + (within - between) * same.double()).square() * variance[:, None, None]
        mixed = values.unsqueeze(-1) * right  # of the weights, z is a sum of these
        C = torch.einsum("cka,cia,cla->cikl", mixed, D_i, mixed) + torch.eye(z.shape[-1], dtype=D) / strength
        explained = (z.unsqueeze(-2) @ torch.linalg.solve(C, z.unsqueeze(-1))).squeeze((-1, -2))
        return -0.5 * (explained + torch.logdet(C)).sum(-1)

    labels = torch.arange(3).repeat_interleave(sizes)[orders]
    moved = SummedLabels.of(labels, evidence, variance, within, between, sizes)
    for a in (0, 3, 6, 1, 0):
        offers, before = moved.offers(a), moved.labels
        b = offers.index_fill(-1, torch.tensor([a]), -math.inf).argmax(-1)
        moved = moved.exchanged(a, b)
        gained = log_likelihood(moved.labels) - log_likelihood(before)
        torch.testing.assert_close(offers.gather(-1, b.unsqueeze(-1)).squeeze(-1), gained, rtol=1e-9, atol=1e-9)
    fresh = SummedLabels.of(moved.labels, evidence, variance, within, between, sizes)
    for mine, new in zip(moved, fresh, strict=True):
        torch.testing.assert_close(mine, new, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("N", [20, 30, 50])
def test_labels_are_those_of_the_weights(N):
    """Of 30 neurons clusters are of 8, 7, 8 and 7, and of 50 of 13, 12, 13 and 12. Gains are any."""
    kind = make_ensemble("block", 3.0, gain=0.3)
    g = torch.Generator().manual_seed(0)
    gains = kind.sample_gains(40, g)
    W, law = kind.draw_matrices(gains, N, g)
    order = torch.rand(40, N, generator=torch.Generator().manual_seed(1)).argsort(-1)
    W = W.gather(1, order.unsqueeze(-1).expand_as(W)).gather(2, order.unsqueeze(1).expand_as(W))
    squares, log_chances = uniform_gains(*torch.tensor([0.3, 3.0], dtype=D))
    none = Evidence.none(N).expand((40,))
    chains = ClusterChains(kind.base, squares.sqrt(), log_chances.exp(), none, g, W)
    truth = kind.base.profile(N)[1][order]
    right = [(together(chains.labels) == together(truth)).all(-1).all(-1)]
    for _ in range(2):
        chains._draw_labels(W)
        right.append((together(chains.labels) == together(truth)).all(-1).all(-1))
        assert all(torch.bincount(one, minlength=4).tolist() == chains.sizes for one in chains.labels)
    # A neuron of 20 is misplaced by what its 38 weights say in about one of 1000.
    assert all(one.double().mean() > 0.9 for one in right)
    chains.sweep()  # without weights nothing tells labels, for nothing is recorded
    assert not (together(chains.labels) == together(truth)).all(-1).all(-1).any()
