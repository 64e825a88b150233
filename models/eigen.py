"""Eigendecompositions of many symmetric matrices."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

BATCHED = 32  # rows up to which cuSOLVER decomposes many matrices at once
PARTS = 64  # at most, that many matrices are split into for the CPU's threads


def eigh_of_many(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """`torch.linalg.eigh`; from a GPU, many larger matrices on the CPU's threads, which were ten times as fast.

    Args:
        matrices: symmetric, shape (..., row, column).

    Returns:
        Eigenvalues, rising, shape (..., direction), and eigenvectors as columns, shape (..., row, direction).
    """
    N, many = matrices.shape[-1], matrices.shape[:-2].numel() > 1
    if matrices.device.type == "cpu" or not many:
        return _eigh(matrices)
    if N <= BATCHED:
        try:
            return _eigh(matrices)
        except RuntimeError as error:  # seen of 200 000 small matrices, which the CPU decomposed
            if "cusolver" not in str(error):
                raise
    return _by_threads(matrices)


def _eigh(matrices: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(matrices)
    return values, vectors


def _by_threads(matrices: Tensor) -> tuple[Tensor, Tensor]:
    N, batch = matrices.shape[-1], matrices.shape[:-2]
    flat = matrices.reshape(-1, N, N).cpu()
    within = torch.get_num_threads()
    torch.set_num_threads(1)  # of LAPACK in each of the threads, which would else be their number squared
    try:
        with ThreadPoolExecutor() as pool:
            found = list(pool.map(_eigh, flat.chunk(PARTS)))
    finally:
        torch.set_num_threads(within)
    values, vectors = (torch.cat(each).to(matrices.device) for each in zip(*found, strict=True))
    return values.view(*batch, N), vectors.view(*batch, N, N)
