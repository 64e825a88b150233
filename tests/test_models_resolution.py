"""What draws leave open: zeros and signs of weights that are too small to be told from none."""

import math

import torch
from scipy.stats import kstest

from neurosde.models.resolution import with_exact_zeros, with_one_sign

D = torch.float64


def test_exact_zeros():
    """A tenth of a matrix's weights below 5 σ_min = 0.01 are zeros; one in a hundred is chance."""
    J = torch.full((2, 10, 10), 0.5, dtype=D)
    J[0].view(-1)[:10] = 0.0099
    J[0].view(-1)[10] = 0.0301
    J[1].view(-1)[0] = -0.0099
    found = with_exact_zeros(J, torch.Generator())
    assert int((found[0] == 0).sum()) == 10 and float(found[0].view(-1)[10]) == 0.0301
    assert torch.equal(found[1], J[1])


def test_weak_weights_among_zeros_are_as_many_and_as_strong_as_they_should_be():
    """Of a fifth of weights N(0, 1), 0.0016 are within 5 σ_min; as a denoiser would, these are replaced by next to 0.

    With n weights expected per σ_min, their number has the variance 5 n of what it is drawn with, and 24 n/4 + 7 n of
    the two numbers that its probability is made of.
    """
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(120, 2, 50, 50, generator=generator, dtype=D)
    weights *= torch.rand(weights.shape, generator=generator) < 0.2
    weights[:, 1] = torch.randn(120, 50, 50, generator=generator, dtype=D)  # of another recording, and not sparse
    kept = weights.abs() >= 0.01
    drawn = torch.where(kept, weights, 0.01 * weights)
    found = with_exact_zeros(drawn, generator)
    assert torch.equal(found[:, 1], drawn[:, 1]) and torch.equal(found[kept], weights[kept])
    weak = found[:, 0][(found[:, 0] != 0) & ~kept[:, 0]]
    expected = kept[:, 0].numel() * 0.2 * math.erf(0.01 / math.sqrt(2))
    assert abs(len(weak) - expected) < 3 * math.sqrt(18 / 5 * expected)
    assert kstest(weak.numpy(), "uniform", args=(-0.01, 0.02)).pvalue > 1e-3


def test_weights_too_small_to_be_told_from_none_have_the_sign_of_their_column():
    """5 σ_min is 0.01. Larger ones of the other sign stay: they are what the network drew."""
    J = torch.tensor([[1.0, -2.0, 0.5], [-0.0099, 0.005, 0.004], [-0.0101, -0.001, 0.3]], dtype=D)
    expected = torch.tensor([[1.0, -2.0, 0.5], [0.0099, -0.005, 0.004], [-0.0101, -0.001, 0.3]], dtype=D)
    level = torch.tensor([[0.001], [-0.001]], dtype=D)  # whose sum is 0: still no weight is lost
    assert torch.equal(with_one_sign(level), level.abs())
    assert torch.equal(with_one_sign(J), expected)
    assert torch.equal(with_one_sign(torch.stack([J, -J])), torch.stack([expected, -expected]))
