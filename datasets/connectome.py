"""Measured weight matrices, from files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from neurosde.datasets.files import read_array
from neurosde.validation import check_positive, check_square


def load_connectome(
    path: str | Path,
    *,
    variable: str | None = None,
    spectral_radius: float | None = None,
    transpose: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Read a weight matrix from a npy, npz, csv, netCDF or MATLAB file.

    Args:
        path: the file; csv with or without a header line and a column of names.
        variable: which array of a npz, netCDF or MATLAB file; None takes `weights`, else the only one there is.
        spectral_radius: scale the matrix to this largest |eigenvalue|; None leaves it as it is.
        transpose: the file stores (pre, post), as many anatomists do; neurosde wants (post, pre).
        dtype: dtype of the result.

    Returns:
        W (post, pre), shape (neuron, neuron).

    Raises:
        FileNotFoundError: no such file.
        ValueError: unknown kind of file or variable, not a square finite matrix, or a spectral radius of zero.
    """
    matrix = read_array(path, variable, preferred=("weights", "W", "connectome"))
    check_square(matrix.shape, f"the matrix in {path}")
    if matrix.ndim != 2:
        raise ValueError(f"{path} must hold one (post, pre) matrix; got shape {matrix.shape}.")
    if not np.isfinite(matrix).all():
        raise ValueError(f"the matrix in {path} must be finite; got {int((~np.isfinite(matrix)).sum())} NaN or inf.")
    weights = matrix.T if transpose else matrix
    if spectral_radius is not None:
        radius = float(np.abs(np.linalg.eigvals(weights)).max())
        # Eigenvalues of a nilpotent matrix are rounded to about eps^(1/N) of its norm, never to exact zeros.
        if radius <= 1e-8 * np.linalg.norm(weights):
            raise ValueError(f"the matrix in {path} has no loops (spectral radius 0), so it cannot be scaled to one.")
        weights = weights * (check_positive(spectral_radius, "spectral_radius") / radius)
    return torch.as_tensor(np.ascontiguousarray(weights), dtype=dtype)
