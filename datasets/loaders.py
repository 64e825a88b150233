"""Feeding cubes to torch.

Each worker process opens the file for itself: netCDF handles must not be shared between threads or across a fork.
"""

from __future__ import annotations

import os
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
        self._handle: tuple[int, netCDF4.Dataset] | None = None
        file = self._file()
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
        file = self._file()
        return {name: torch.as_tensor(np.asarray(file[name][k % len(self)])) for name in self.variables}

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Tensor]]:
        """Read a batch, in the file's order, and return it in the order asked for."""
        read = {k: self[k] for k in sorted(set(indices))}
        return [read[k] for k in indices]

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_handle": None}

    def _file(self) -> netCDF4.Dataset:
        if self._handle is None or self._handle[0] != os.getpid():
            file = netCDF4.Dataset(self.path, "r")
            file.set_auto_maskandscale(False)
            self._handle = (os.getpid(), file)
        return self._handle[1]


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
        num_workers: reading processes; 0 reads in this one, which is the fastest for local files.

    Returns:
        A loader of dicts, each variable with a leading axis of networks: weights (network, post, pre), activity
        (network, trial, time, neuron).

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a whole cube, an unknown variable, or counts out of range.
    """
    return DataLoader(
        CubeDataset(path, variables),
        batch_size=check_count(batch_size, "batch_size"),
        shuffle=shuffle,
        num_workers=check_count(num_workers, "num_workers", 0),
        generator=torch.Generator().manual_seed(seed),
    )
