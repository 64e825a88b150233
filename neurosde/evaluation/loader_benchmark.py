"""`neurosde benchmark loader`: how fast a cube reaches torch, beside other ways to read it.

Every method gives the same batches of weights and activity, in the same block-shuffled order, as torch tensors. The
methods take turns, round after round, a new epoch each. The rest of the memory is free for the page cache, so after the
first epoch nothing comes from the disk, unless `cold` drops the cube's pages before each epoch. The floor of a streamed
cube is numpy's memmap of the bare arrays, that of a cube in memory is index_select on two tensors.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
import time
from abc import ABC, abstractmethod
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import netCDF4
import numpy as np
import torch
import xarray as xr
from torch import Tensor
from tqdm import tqdm

from neurosde.datasets.build_dataset import DatasetConfig, build_dataset
from neurosde.datasets.files import open_netcdf
from neurosde.datasets.loaders import CubeLoader, loader
from neurosde.datasets.shards import shards_of
from neurosde.evaluation import stream_benchmark, writing_benchmark
from neurosde.evaluation.resident import peak, reset_peak
from neurosde.evaluation.stream_benchmark import stream_cube
from neurosde.evaluation.timing import hardware, machine, torch_threads
from neurosde.options import from_options
from neurosde.provenance import global_attributes, whole_file
from neurosde.validation import check_count, optional_package

VARIABLES = ("weights", "activity")
MEMORY = 2**27  # that streaming may take
STREAMED = "streamed, block-shuffled (neurosde)"
IN_MEMORY = "in memory (neurosde)"
MEMMAP, INDEX_SELECT, XARRAY = "numpy memmap of npy files", "index_select in memory", "xarray isel per network"

Batch = tuple[Tensor, Tensor]  # weights, activity


@dataclass(frozen=True)
class LoaderBenchmark:
    """The cube and how often to read it, or a cube that is there already."""

    networks: int = field(default=2000, metadata={"help": "networks of the cube"})
    neurons: int = field(default=50, metadata={"help": "neurons per network"})
    trials: int = field(default=10, metadata={"help": "trials per network"})
    times: int = field(default=100, metadata={"help": "times per trial"})
    batch_size: int = field(default=32, metadata={"help": "networks per batch"})
    repeats: int = field(default=7, metadata={"help": "epochs that are timed, after one that is not"})
    threads: int | None = field(default=None, metadata={"help": "threads of torch (default as many as it has)"})
    cold: bool = field(default=False, metadata={"help": "drop the files from the page cache before each epoch"})
    seed: int = field(default=0, metadata={"help": "seed of the cube and of the order"})
    cube: Path | None = field(
        default=None, metadata={"help": "stream this cube once instead, however large, and tell the peak of memory"}
    )
    out: Path = field(default=Path("results/loader.nc"), metadata={"help": "data file"})

    def __post_init__(self) -> None:
        for name in ("networks", "neurons", "trials", "batch_size", "repeats"):
            check_count(getattr(self, name), name)
        check_count(self.times, "times", 2)
        check_count(self.seed, "seed", 0)
        if self.threads is not None:
            check_count(self.threads, "threads")
        if self.cold and not hasattr(os, "posix_fadvise"):
            raise ValueError(
                "cold needs a system that can drop files from its page cache, such as Linux; leave it out."
            )

    @property
    def network_bytes(self) -> int:
        """Bytes of the weights and activity of a network."""
        return 4 * self.neurons * (self.neurons + self.trials * self.times)

    @property
    def budget(self) -> int:
        """Memory that streaming may take: less than the cube, at least a batch, at most 128 MB of the default cube."""
        return max(self.batch_size * self.network_bytes, min(MEMORY, self.networks * self.network_bytes // 2))


class Reader(ABC):
    """A way to read batches of a cube, opened when it is made."""

    name: str

    @abstractmethod
    def batch(self, networks: Sequence[int]) -> Batch:
        """Weights (network, post, pre) and activity (network, trial, time, neuron) of some networks."""

    def epoch(self, batches: Sequence[Sequence[int]], epoch: int) -> Batch:
        """Read all batches of an epoch; return the last one."""
        last: Batch | None = None
        for networks in batches:
            last = self.batch(networks)
        assert last is not None
        return last

    def close(self) -> None:  # noqa: B027 - most have nothing to close
        """Close what is open."""


class _Ours(Reader):
    def __init__(self, path: Path, config: LoaderBenchmark, memory: int | None) -> None:
        self.loader = our_loader(path, config, memory)

    def batch(self, networks: Sequence[int]) -> Batch:
        found = self.loader.cube.__getitems__(networks).batch
        return found["weights"], found["activity"]

    def epoch(self, batches: Sequence[Sequence[int]], epoch: int) -> Batch:
        self.loader.set_epoch(epoch)
        last: dict[str, Tensor] = {}
        for batch in self.loader:
            last = batch
        return last["weights"], last["activity"]

    def close(self) -> None:
        self.loader.cube.close()


class Streamed(_Ours):
    """The loader with less memory than the cube."""

    name = STREAMED

    def __init__(self, path: Path, config: LoaderBenchmark) -> None:
        super().__init__(path, config, config.budget)


class InMemory(_Ours):
    """The loader with the cube in memory."""

    name = IN_MEMORY

    def __init__(self, path: Path, config: LoaderBenchmark) -> None:
        super().__init__(path, config, 2 * config.networks * config.network_bytes)


class IndexSelect(Reader):
    """Two tensors in memory."""

    name = INDEX_SELECT

    def __init__(self, path: Path, config: LoaderBenchmark) -> None:
        with open_netcdf(path) as cube:
            self.arrays = [torch.from_numpy(cube[name].to_numpy()) for name in VARIABLES]

    def batch(self, networks: Sequence[int]) -> Batch:
        """Read one batch."""
        chosen = torch.tensor(networks)
        weights, activity = (values.index_select(0, chosen) for values in self.arrays)
        return weights, activity


class Memmap(Reader):
    """Bare arrays in npy files beside the cube, mapped by numpy."""

    name = MEMMAP

    def __init__(self, path: Path, config: LoaderBenchmark) -> None:
        for name in VARIABLES:
            if not path.with_name(f"{name}.npy").exists():
                with netCDF4.Dataset(path) as file:
                    file.set_auto_maskandscale(False)
                    np.save(path.with_name(f"{name}.npy"), file[name][:])
        self.path = path
        self.arrays: list[np.ndarray] = []

    def batch(self, networks: Sequence[int]) -> Batch:
        """Read one batch."""
        if not self.arrays:
            self.arrays = [np.load(self.path.with_name(f"{name}.npy"), mmap_mode="r") for name in VARIABLES]
        weights, activity = (torch.from_numpy(values[networks]) for values in self.arrays)
        return weights, activity

    def close(self) -> None:
        """Let go of the mappings; the next batch maps the files again."""
        self.arrays = []


class Xarray(Reader):
    """One `isel` per network and variable, as a plain torch dataset on xarray does."""

    name = XARRAY

    def __init__(self, path: Path, config: LoaderBenchmark) -> None:
        self.cube = open_netcdf(path)

    def batch(self, networks: Sequence[int]) -> Batch:
        """Read one batch."""
        weights, activity = (
            torch.stack([torch.from_numpy(self.cube[name].isel(network=k).to_numpy()) for k in networks])
            for name in VARIABLES
        )
        return weights, activity

    def close(self) -> None:
        """Close the file."""
        self.cube.close()


class NetCDF(Reader):
    """One netCDF4 slice per network and variable."""

    name = "netCDF4 per network"

    def __init__(self, path: Path, config: LoaderBenchmark) -> None:
        self.file = netCDF4.Dataset(path)
        self.file.set_auto_maskandscale(False)

    def batch(self, networks: Sequence[int]) -> Batch:
        """Read one batch."""
        weights, activity = (
            torch.stack([torch.from_numpy(self.file[name][k]) for k in networks]) for name in VARIABLES
        )
        return weights, activity

    def close(self) -> None:
        """Close the file."""
        self.file.close()


class Xbatcher(Reader):
    """One xbatcher batch per network, stacked: it knows no other random order."""

    name = "xbatcher"

    def __init__(self, path: Path, config: LoaderBenchmark) -> None:
        xbatcher: Any = optional_package("xbatcher", "peers")
        self.cube = open_netcdf(path)
        sizes = {str(dim): size for dim, size in self.cube[list(VARIABLES)].sizes.items()} | {"network": 1}
        self.generator = xbatcher.BatchGenerator(self.cube[list(VARIABLES)], input_dims=sizes, preload_batch=False)

    def batch(self, networks: Sequence[int]) -> Batch:
        """Read one batch."""
        items = [self.generator[k] for k in networks]
        weights, activity = (
            torch.cat([torch.from_numpy(item[name].to_numpy()) for item in items]) for name in VARIABLES
        )
        return weights, activity

    def close(self) -> None:
        """Close the file."""
        self.cube.close()


READERS: tuple[type[Streamed | InMemory | IndexSelect | Memmap | Xarray | NetCDF | Xbatcher], ...] = (
    Streamed, Memmap, NetCDF, Xarray, Xbatcher, InMemory, IndexSelect
)  # fmt: skip


def our_loader(path: Path, config: LoaderBenchmark, memory: int | None) -> CubeLoader:
    """Return the loader with that memory."""
    return loader(path, VARIABLES, batch_size=config.batch_size, shuffle=True, seed=config.seed, memory=memory)


def loader_benchmark(config: LoaderBenchmark) -> xr.Dataset:
    """Run the benchmark in a temporary folder beside the data file.

    Returns:
        networks_per_second (loader, repeat), and memory (loader): how much the resident set grew at its peak from
        before the method was opened to the end of its first epoch, less two batches, in bytes; NaN where the system
        does not tell; written (writer, repeat): bytes per second of writing the cube, and a bare file.
    """
    config.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=config.out.parent) as folder, torch_threads(config.threads):
        dataset = DatasetConfig(
            Path(folder, "cube"), config.networks, config.neurons, config.trials, config.times, seed=config.seed,
            shard_size=config.networks,
        )  # fmt: skip
        (path,) = build_dataset(dataset).glob("network=*.nc")
        results = _measure(path, config)
        shutil.rmtree(path.parent)
        dataset = replace(dataset, out_dir=Path(folder, "writing"))
        return results.assign(written=writing_benchmark.writing_speed(dataset, config.repeats))


def _measure(path: Path, config: LoaderBenchmark) -> xr.Dataset:
    order = our_loader(path, config, config.budget).blocks
    readers: dict[str, Reader] = {}
    memory: dict[str, float] = {}
    left_out = []
    for kind in READERS:
        try:
            reader, memory[kind.name] = _opened(kind, path, config, list(order))
        except ImportError as error:
            left_out.append(f"{kind.name}: {error}")
            continue
        readers[kind.name] = reader
    rates = np.full((len(readers), config.repeats), math.nan)
    with tqdm(total=rates.size, unit="epoch", disable=None) as progress:
        for repeat in range(config.repeats):
            order.epoch = repeat + 1
            batches = list(order)
            for k, reader in enumerate(readers.values()):
                if config.cold:
                    readers[MEMMAP].close()  # pages that are mapped stay
                    for file in path.parent.iterdir():
                        _drop(file)
                start = time.perf_counter()
                reader.epoch(batches, order.epoch)
                rates[k, repeat] = config.networks / (time.perf_counter() - start)
                progress.update()
    for reader in readers.values():
        reader.close()
    attributes = global_attributes(
        "Speed of loaders",
        f"Networks per second, {config.networks} networks of {config.network_bytes} bytes; {cache_state(config)}.",
        config,
        config.seed,
    )
    return xr.Dataset(
        {
            "networks_per_second": (
                ("loader", "repeat"), rates, {"long_name": "networks read and batched per second", "units": "s-1"}
            ),
            "memory": (
                "loader", [memory[name] for name in readers],
                {"long_name": "peak growth of the resident set, less two batches", "units": "byte"},
            ),
        },
        coords={"loader": list(readers)},
        attrs=attributes | machine() | {"left_out": "; ".join(left_out), "network_bytes": config.network_bytes},
    )  # fmt: skip


def cache_state(config: LoaderBenchmark) -> str:
    """Say where the data come from."""
    return "read from the disk (page cache dropped)" if config.cold else "all files in the page cache (warm)"


def _opened(
    kind: type[Any], path: Path, config: LoaderBenchmark, batches: Sequence[Sequence[int]]
) -> tuple[Reader, float]:
    """Open a reader, check its first batch against the file, read an epoch; return it and the memory that took."""
    if kind is Memmap:
        Memmap(path, config)  # writes its files
    before = reset_peak()
    reader = kind(path, config)
    reader.epoch(batches, 0)
    grown = max(0.0, peak() - before - 2 * config.batch_size * config.network_bytes)
    with open_netcdf(path) as cube:
        for name, values in zip(VARIABLES, reader.batch(batches[0]), strict=True):
            if not np.array_equal(values, cube[name].isel(network=list(batches[0]))):
                raise ValueError(f"{kind.name} gives other {name} than the file holds.")
    return reader, grown


def _drop(path: Path) -> None:
    """Drop a file from the page cache; it is on the disk already, or is synced first."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _streamed(path: Path, config: LoaderBenchmark) -> xr.Dataset:
    """Stream a cube that is there already."""
    if config.cold:
        for shard in shards_of(path):
            _drop(shard.path)
    with torch_threads(config.threads):
        results = stream_cube(path, VARIABLES, config.batch_size, MEMORY, config.seed)
    attributes = global_attributes("Streaming of a cube", f"{path}, read once, shuffled.", config, config.seed)
    return results.assign_attrs(attributes | machine())


def markdown_table(results: xr.Dataset) -> str:
    """Medians and ranges over the epochs, and ratios to the floors, as a markdown table."""
    rates = results["networks_per_second"]
    medians = rates.median("repeat")
    lines = [
        "| loader | networks/s | range | GB/s | of memmap | of index_select | memory, MB |",
        "|---" * 7 + "|",
    ]
    for name in results["loader"].values:
        rate, every = float(medians.sel(loader=name)), rates.sel(loader=name)
        ratios = (rate / float(medians.sel(loader=floor)) for floor in (MEMMAP, INDEX_SELECT))
        lines.append(
            f"| {name} | {rate:.0f} | {float(every.min()):.0f} … {float(every.max()):.0f} "
            f"| {1e-9 * rate * results.attrs['network_bytes']:.2f} | "
            + " | ".join(f"{ratio:.2f}" for ratio in ratios)
            + f" | {float(results['memory'].sel(loader=name)) / 1e6:.0f} |"
        )
    return "\n".join(lines)


def run(options: Namespace) -> int:
    """Run the benchmark, print its table, write its data."""
    config = from_options(LoaderBenchmark, options)
    results = loader_benchmark(config) if config.cube is None else _streamed(config.cube, config)
    with whole_file(config.out) as temporary:
        results.to_netcdf(temporary, engine="netcdf4")
    if config.cube is not None:
        print(f"{stream_benchmark.summary(results)}\n{hardware(results.attrs)}\nData: {config.out}")
        return 0
    print(markdown_table(results))
    speedup = results["networks_per_second"].median("repeat")
    ratio = float(speedup.sel(loader=STREAMED) / speedup.sel(loader=XARRAY))
    print(f"\nStreamed is {ratio:.1f} times as fast as xarray isel per network; {cache_state(config)}.")
    print(f"{config.networks} networks of {config.network_bytes} bytes; medians of {config.repeats} epochs after one.")
    print(writing_benchmark.summary(results["written"]))
    if results.attrs["left_out"]:
        print(f"left out: {results.attrs['left_out']}")
    print(f"{hardware(results.attrs)}\nData: {config.out}")
    return 0
