"""Eigendecompositions by threads, as by one call."""

import torch

from neurosde.models.eigen import _by_threads, eigh_of_many


def test_threads_decompose_as_one_does():
    phi = torch.randn(37, 3, 9, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    matrices, threads = phi.mT @ phi, torch.get_num_threads()
    for one, other in zip(eigh_of_many(matrices), _by_threads(matrices), strict=True):
        torch.testing.assert_close(one, other)
    assert torch.get_num_threads() == threads
