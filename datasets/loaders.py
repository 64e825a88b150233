"""Feeding cubes to torch.

Each worker process opens the file for itself. HDF5 keeps one table of open files per process, so that a child forked
while its parent has the file open reads through the parent's handle, and fails at random. Datasets therefore close
their handle before a fork and open it again when needed, and `loader` spawns its workers, which inherit nothing.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from pathlib import Path

import netCDF4
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from neurosde.datasets.schema import validate_cube
from neurosde.validation import check_count


class CubeDataset(Dataset[dict[str, Tensor]]):
    """The networks of a cube as a torch dataset: item k is a dict of tensors, one for each variable.

    Args:
        path: the cube.
        variables: which of its variables to read; each must vary over networks.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a whole cube, or an unknown variable.
    """

    def __init__(self, path: str | Path, variables: Sequence[str] = ("weights", "activity")) -> None:
        validate_cube(path)
        self.path = Path(path)
        self.variables = tuple(variables)
        self._file: netCDF4.Dataset | None = None
        _OPEN.add(self)
        file = self._opened()
        known = [name for name, variable in file.variables.items() if variable.dimensions[:1] == ("network",)]
        unknown = [name for name in self.variables if name not in known]
        if unknown:
            raise ValueError(f"{path} has the variables {sorted(known)}; got {unknown}.")
        self._length = len(file.dimensions["network"])

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, k: int) -> dict[str, Tensor]:
        """Read one network; arrays as in the cube without its first axis."""
        if not -len(self) <= k < len(self):
            raise IndexError(f"network {k} of a cube of {len(self)}")
        file = self._opened()
        return {name: torch.as_tensor(np.asarray(file[name][k % len(self)])) for name in self.variables}

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Tensor]]:
        """Read a batch, in the file's order, and return it in the order asked for."""
        read = {k: self[k] for k in sorted(set(indices))}
        return [read[k] for k in indices]

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_file": None}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__ |= state
        _OPEN.add(self)

    def close(self) -> None:
        """Close the file; the next read opens it again."""
        if self._file is not None:
            file, self._file = self._file, None
            file.close()

    def _opened(self) -> netCDF4.Dataset:
        if self._file is None:
            self._file = netCDF4.Dataset(self.path, "r")
            self._file.set_auto_maskandscale(False)
        return self._file


_OPEN: weakref.WeakSet[CubeDataset] = weakref.WeakSet()


def _close_all() -> None:
    for dataset in list(_OPEN):
        dataset.close()


if hasattr(os, "register_at_fork"):  # Windows does not fork
    os.register_at_fork(before=_close_all)


def loader(
    path: str | Path,
    variables: Sequence[str] = ("weights", "activity"),
    *,
    batch_size: int = 32,
    shuffle: bool = False,
    seed: int = 0,
    num_workers: int = 0,
) -> DataLoader[dict[str, Tensor]]:
    """Return a torch DataLoader over the networks of a cube.

    Args:
        path: the cube.
        variables: which of its variables to read.
        batch_size: networks per batch.
        shuffle: visit the networks in a random order, the same one for the same seed.
        seed: seed of that order.
        num_workers: spawned reading processes; 0 reads in this one, which is the fastest for local files.

    Returns:
        A loader of dicts, each variable with a leading axis of networks: weights (network, post, pre), activity
        (network, trial, time, neuron).

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a whole cube, an unknown variable, or counts out of range.
    """
    workers = check_count(num_workers, "num_workers", 0)
    return DataLoader(
        CubeDataset(path, variables),
        batch_size=check_count(batch_size, "batch_size"),
        shuffle=shuffle,
        num_workers=workers,
        multiprocessing_context="spawn" if workers else None,
        generator=torch.Generator().manual_seed(seed),
    )
