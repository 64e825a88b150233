"""Eigendecompositions by threads, as by one call."""

import pytest
import torch

from neurosde.models.eigen import _by_threads, eigh_of_many


def test_threads_decompose_as_one_does():
    phi = torch.randn(37, 3, 9, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    matrices, threads = phi.mT @ phi, torch.get_num_threads()
    for one, other in zip(eigh_of_many(matrices), _by_threads(matrices), strict=True):
        torch.testing.assert_close(one, other)
    assert torch.get_num_threads() == threads


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("N", [8, 40])
def test_on_the_gpu(N):
    phi = torch.randn(5, 60, N, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).cuda()
    matrices = phi.mT @ phi
    values, vectors = eigh_of_many(matrices)
    torch.testing.assert_close((vectors * values.unsqueeze(-2)) @ vectors.mT, matrices)
