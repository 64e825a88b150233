"""Feeding cubes to torch.

A cube that fits the memory budget is read once and batches are picked out of it; a larger one is streamed, in the same
order, with no more than a window of it in memory (`neurosde.datasets.blocks`, `neurosde.datasets.reading`).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, get_args, overload

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from neurosde.datasets.blocks import BlockShuffle, Order, WindowedBatch
from neurosde.datasets.reading import CubeFiles
from neurosde.datasets.statistics import PARAMETERS, batch_statistics, experiment
from neurosde.validation import check_count

Split = Literal["train", "validation", "test"]
Units = Literal["W", "J"]
BLOCK_BYTES = 2**22  # of consecutive networks: some milliseconds of any disk, so that seeks do not count
WINDOW_BYTES = 2**26  # within which networks are shuffled
_J_POWERS = {"weights": -1, "precision": 2, "cross": 1}  # of s0, by which a quantity goes over into J units


class Networks(Sequence[dict[str, Tensor]]):
    """Some networks read together: a sequence of items, whose tensors lie one after the other.

    Attributes:
        batch: the tensors of all of them, each with a leading axis of networks.
    """

    def __init__(self, batch: dict[str, Tensor]) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return len(next(iter(self.batch.values())))

    @overload
    def __getitem__(self, k: int) -> dict[str, Tensor]: ...
    @overload
    def __getitem__(self, k: slice) -> list[dict[str, Tensor]]: ...
    def __getitem__(self, k: int | slice) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Item k, or a list of items."""
        if isinstance(k, slice):
            return [self[i] for i in range(*k.indices(len(self)))]
        return {name: values[k] for name, values in self.batch.items()}


class CubeDataset(Dataset[dict[str, Tensor]]):
    """The networks of a cube as a torch dataset: item k is a dict of tensors, one for each variable.

    Args:
        path: the cube: one file, or a folder of shards.
        variables: which of its variables to read; each must vary over networks. An empty tuple with `statistics`.
        split: which networks to take; None takes all.
        statistics: add `precision`, Λ (pre, pre), and `cross`, B (post, pre), of each network's transitions, float64.
            They are computed as networks are read; from the voltage where the cube has it.
        units: "J" divides weights by s0 = g_rms/√N and multiplies Λ by s0², B by s0.

    Attributes:
        scale: s0, or None where the cube does not tell.
        positions: place in the cube of each network of this dataset, shape (network,).

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a whole cube, a missing shard, an unknown variable or split, or an empty one.
    """

    def __init__(
        self,
        path: str | Path,
        variables: Sequence[str] = ("weights", "activity"),
        *,
        split: Split | None = None,
        statistics: bool = False,
        units: Units = "W",
    ) -> None:
        if units not in get_args(Units):
            raise ValueError(f"units must be W or J; got {units!r}.")
        if isinstance(variables, str):
            raise TypeError(f"variables must be a sequence of names; got {variables!r}. Write ({variables!r},).")
        self.path = Path(path)
        self.files = CubeFiles(path)
        self.variables = tuple(variables)
        self.statistics = statistics
        self.units = units
        unknown = [name for name in self.variables if name not in self.files.stored]
        if unknown:
            raise ValueError(f"{path} has the variables {sorted(self.files.stored)}; got {unknown}.")
        if not self.variables and not statistics:
            raise ValueError("variables must name at least one variable; got none.")
        self.source = "voltage" if "voltage" in self.files.stored else "activity"
        self.positions = self._selected(split)
        self.experiment = experiment(self.files.number(0)[0])
        self.scale = self.experiment.scale
        if statistics and self.experiment.observation is not None:
            warnings.warn(
                f"{path} shows what an experiment saw ({self.experiment.observation}); its statistics take that for "
                "all there is: unseen neurons for absent, filtered and binned rates for those of the model.",
                stacklevel=3,
            )
        if units == "J" and self.scale is None:
            raise ValueError(f"{path} has neither an ensemble nor gains, which J units need; use units='W'.")
        self._checked = np.zeros(len(self), dtype=bool)
        self._memory: dict[str, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def read_names(self) -> tuple[str, ...]:
        """Variables that are read for an item: those asked for, and what statistics are computed from."""
        extra = (self.source, *PARAMETERS) if self.statistics else ()
        return tuple(dict.fromkeys(self.variables + extra))

    @property
    def read_bytes(self) -> int:
        """Bytes that are read for an item."""
        return sum(self.files.stored[name].nbytes for name in self.read_names)

    @property
    def item_bytes(self) -> int:
        """Bytes of an item."""
        asked = sum(self.files.stored[name].nbytes for name in self.variables)
        return asked + (2 * 8 * self.experiment.neurons**2 if self.statistics else 0)

    @property
    def in_memory(self) -> bool:
        """Whether all items have been loaded."""
        return self._memory is not None

    def __getitem__(self, k: int) -> dict[str, Tensor]:
        """Read one network; arrays as in the cube without its first axis.

        Raises:
            IndexError: there are fewer networks.
            ValueError: NaN or infinite values, or no statistics; the message names file and network.
        """
        if not -len(self) <= k < len(self):
            raise IndexError(f"network {k} of a cube of {len(self)}")
        return self.__getitems__([k % len(self)])[0]

    def __getitems__(self, indices: Sequence[int]) -> Networks:
        """Read several networks; as `__getitem__`.

        A batch of `BlockShuffle` brings its window along, which is made ready when its first batch arrives.
        """
        rows = np.asarray(indices, dtype=np.int64)
        if self._memory is not None:
            chosen = torch.from_numpy(rows)
            return Networks({name: values.index_select(0, chosen) for name, values in self._memory.items()})
        if isinstance(indices, WindowedBatch) and not self.files.entered(self.positions[rows]):
            self.files.enter(self.positions[indices.window], self.read_names)
        return Networks(self._read(rows))

    def load(self) -> None:
        """Read everything into memory, once and for all."""
        if self._memory is not None:
            return
        step = max(1, BLOCK_BYTES // max(1, self.read_bytes))
        memory: dict[str, Tensor] = {}
        for first in range(0, len(self), step):
            rows = np.arange(first, min(first + step, len(self)))
            for name, values in self._read(rows).items():
                if first == 0:
                    memory[name] = torch.empty(len(self), *values.shape[1:], dtype=values.dtype)
                memory[name][first : first + len(rows)] = values
        self.close()
        self._memory = memory

    def close(self) -> None:
        """Close the files; the next read opens them again."""
        self.files.close()

    def _selected(self, split: Split | None) -> np.ndarray:
        everything = np.arange(len(self.files))
        if split is None:
            return everything
        if split not in get_args(Split):
            raise ValueError(f"split must be one of {', '.join(get_args(Split))}; got {split!r}.")
        if "split" not in self.files.stored:
            raise ValueError(f"{self.path} has no variable split(network); build it with splits, or leave split out.")
        chosen = everything[self.files.take("split", everything) == get_args(Split).index(split)]
        self.files.close()
        if not len(chosen):
            raise ValueError(f"{self.path} has no {split} networks; leave split out, or build it with splits.")
        return chosen

    def _read(self, rows: np.ndarray) -> dict[str, Tensor]:
        positions = self.positions[rows]
        arrays = {name: self.files.take(name, positions) for name in self.read_names}
        if not self._checked[rows].all():
            self._check_finite(arrays, positions)
            self._checked[rows] = True
        batch = {name: torch.from_numpy(arrays[name]) for name in self.variables}
        if self.statistics:
            names = ["{}, network {}".format(*self.files.number(position)) for position in positions.tolist()]
            batch |= batch_statistics(self.experiment, self.source, arrays, names)
        if self.units == "J" and self.scale is not None:
            for name in batch.keys() & _J_POWERS.keys():
                batch[name] *= self.scale ** _J_POWERS[name]
        return batch

    def _check_finite(self, arrays: dict[str, np.ndarray], positions: np.ndarray) -> None:
        """Look at networks that are read for the first time; a sum is quick, and finite where everything is."""
        for name, values in arrays.items():
            if values.dtype.kind != "f" or bool(torch.isfinite(torch.from_numpy(values).sum())):
                continue
            wrong = ~np.isfinite(values).reshape(len(values), -1)
            if wrong.any():
                k = int(np.flatnonzero(wrong.any(1))[0])
                file, number = self.files.number(int(positions[k]))
                raise ValueError(
                    f"{name} of network {number} in {file} must be finite; got {int(wrong[k].sum())} NaN or infinite "
                    "values. Delete the file and build it again, or leave the variable out."
                )


class CubeLoader(DataLoader[dict[str, Tensor]]):
    """A torch DataLoader over the networks of a cube, as `loader` makes it.

    Each pass over it is an epoch, with an order of its own. An epoch that was left half-way is started again by the
    next pass; `state_dict` and `load_state_dict` go on where it was left, without reading what was given already.

    Args:
        dataset: the networks.
        order: how to visit them.
        num_workers: reading processes.
        context: how they are started.
        pin_memory: give tensors in pinned memory.
    """

    def __init__(
        self,
        dataset: CubeDataset,
        order: Order,
        num_workers: int = 0,
        context: str | None = None,
        pin_memory: bool = False,
    ) -> None:
        self.cube = dataset
        self.blocks = BlockShuffle(order)
        self._given = 0
        super().__init__(
            dataset,
            batch_sampler=self.blocks,
            collate_fn=_batch,
            num_workers=num_workers,
            multiprocessing_context=context if num_workers else None,
            pin_memory=pin_memory,
            generator=torch.Generator().manual_seed(order.seed),  # leaves torch's global one alone
        )

    @property
    def epoch(self) -> int:
        """The epoch that is being visited, or is next."""
        return self.blocks.epoch

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next pass; the present one leaves a state that was loaded for it as it is."""
        if check_count(epoch, "epoch", 0) != self.blocks.epoch:
            self.blocks.epoch, self.blocks.start, self._given = epoch, 0, 0

    def __iter__(self) -> Iterator[dict[str, Tensor]]:  # type: ignore[override]
        self._given = self.blocks.start
        for batch in super().__iter__():
            self._given += 1
            yield batch
        self.set_epoch(self.epoch + 1)

    def state_dict(self) -> dict[str, Any]:
        """Where this loader is: the epoch, the batches of it that were given, and what the order depends on."""
        ended = self._given == len(self)
        order = asdict(self.blocks.order)
        del order["rank"]
        return {"epoch": self.epoch + ended, "batch": 0 if ended else self._given, "order": order}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a loader of the same cube, made in the same way, was.

        Raises:
            ValueError: it was made in another way.
        """
        there, here = state["order"], self.state_dict()["order"]
        differing = [name for name in here if there.get(name) != here[name]]
        if differing:
            raise ValueError(
                "the state must be of a loader made in the same way; got "
                + ", ".join(f"{name} = {there.get(name)} there and {here[name]} here" for name in differing)
                + "."
            )
        self.blocks.epoch = check_count(state["epoch"], "epoch", 0)
        self.blocks.start = self._given = check_count(state["batch"], "batch", 0)


def _batch(networks: Any) -> dict[str, Tensor]:
    return networks.batch


def loader(
    path: str | Path,
    variables: Sequence[str] = ("weights", "activity"),
    *,
    batch_size: int = 32,
    split: Split | None = None,
    shuffle: bool = False,
    seed: int = 0,
    drop_last: bool = False,
    memory: int | None = None,
    statistics: bool = False,
    units: Units = "W",
    num_workers: int = 0,
    context: Literal["fork", "spawn", "forkserver"] = "spawn",
    pin_memory: bool = False,
    rank: int = 0,
    world_size: int = 1,
) -> CubeLoader:
    """Return a torch DataLoader over the networks of a cube.

    The order is a function of (seed, epoch), whatever the number of workers and whether or not the cube fits in memory:
    blocks of consecutive networks are shuffled, then networks within windows of 64 MB, or of `memory` if that is less.

    Args:
        path: the cube: one file, or a folder of shards.
        variables: which of its variables to read, such as weights, activity, gain, observed or network.
        batch_size: networks per batch.
        split: take only networks for training, validation or test.
        shuffle: visit the networks in a random order, another one in each epoch.
        seed: seed of that order.
        drop_last: leave out a last batch that is smaller than the others.
        memory: bytes that may be used besides the batch; the cube is held in memory if it fits. None is a quarter of
            the memory that is available now, divided by world_size.
        statistics: add `precision`, Λ (network, pre, pre), and `cross`, B (network, post, pre): see `CubeDataset`.
        units: "J" gives weights, Λ and B in units of s0 = g_rms/√N.
        num_workers: reading processes while streaming; 0 reads in this one, which is the fastest unless statistics are
            asked for. A cube in memory takes none.
        context: how they are started. A fork is quicker, but unsafe while other code has the cube open through HDF5.
        pin_memory: give batches in pinned memory, from which copies to a GPU are quicker and need not be waited for.
        rank: which share of each epoch's networks to visit, of world_size shares of equal size.
        world_size: number of shares; networks beyond a multiple of it are left out, other ones in each epoch.

    Returns:
        A loader of dicts, each variable with a leading axis of networks: weights (network, post, pre), activity
        (network, trial, time, neuron).

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a whole cube, a missing shard, an unknown variable or split, counts out of range, or a memory
            that does not hold a batch.
    """
    batch_size = check_count(batch_size, "batch_size")
    workers = check_count(num_workers, "num_workers", 0)
    world_size = check_count(world_size, "world_size")
    budget = available_memory() // 4 // world_size if memory is None else check_count(memory, "memory")
    dataset = CubeDataset(path, variables, split=split, statistics=statistics, units=units)
    each = max(1, dataset.read_bytes)
    fits = len(dataset) * dataset.item_bytes <= budget
    window = max(1, (WINDOW_BYTES if fits else min(WINDOW_BYTES, budget)) // (each * batch_size))
    if not fits and budget < min(batch_size, len(dataset)) * each:
        raise ValueError(
            f"memory must hold the batch of {batch_size} networks that is read at once from {path}, "
            f"{batch_size * each} bytes; got {budget}. Give more, or a smaller batch_size."
        )
    order = Order(
        len(dataset), batch_size, min(max(1, BLOCK_BYTES // each), window * batch_size), window, shuffle, seed, rank,
        world_size, drop_last,
    )  # fmt: skip
    if fits:
        dataset.load()
    return CubeLoader(dataset, order, 0 if fits else workers, context, pin_memory)


def available_memory() -> int:
    """Return the bytes of memory that this process may still take; 2 GB where the system does not tell."""
    found = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()  # of a container
        found += [int(limit)] if limit.isdigit() else []
    except OSError:
        pass
    if not found and hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2]
    return min(found, default=2**31)
