"""Building a dataset: draw networks from an ensemble, simulate their activity, store both as a cube.

Run as `neurosde build-dataset …` or `python -m neurosde.datasets.build_dataset …`. The same command again resumes an
interrupted build, or says that it is complete.

Network k depends on the root seed and on k alone. Its weights and its dynamics have a generator each, spawned by
numpy's SeedSequence, so any block can be made anywhere, in any order and on any engine. To the last bit this holds for
one engine: `auto` is settled once, for the whole dataset, and torch gets one thread, because how threads share a batch
decides how its products are rounded. Parallel work is the business of `--workers`.

A large dataset is a folder of shards (`neurosde.datasets.shards`). Each is made under a temporary name, synced and
renamed, so that what is finished stays finished; any number of processes and machines may make shards of one folder.
"""

from __future__ import annotations

import math
import os
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from tqdm import tqdm

from neurosde.brownian import BrownianSeeds
from neurosde.datasets.ensemble_options import (
    PARAMETER_NAMES,
    add_ensemble_options,
    ensemble_from_options,
    plain_parameters,
)
from neurosde.datasets.ensembles import Ensemble, Gaussian
from neurosde.datasets.execution import Execution, run_tasks
from neurosde.datasets.manifest import MANIFEST_NAME, ShardRecord, digest_of, write_manifest
from neurosde.datasets.schema import SCHEMA_VERSION
from neurosde.datasets.shards import CUBE_NAME, Shard, shard_name
from neurosde.datasets.store import CubeFile, CubeWriter, check_space, layout_bytes, lock_file, sync_folder
from neurosde.datasets.verify import check_shard, finished_shards, verify_cube
from neurosde.engines import EngineName, Work, select_engine
from neurosde.options import OptionParser, add_options, command_words, from_options, run_safely
from neurosde.provenance import config_json, make_folder, whole_file
from neurosde.rate_sde import Drive
from neurosde.solve import simulate_rate_network
from neurosde.validation import check_count, check_positive, check_time_step

BLOCK_BYTES = 2**26  # of activity: large enough to batch the simulation, small enough to lose little
SINGLE_BYTES = 2**31  # of data: up to here a cube is one file, unless asked otherwise
SHARD_BYTES = 2**28

NOISE = "philox4x32-7"  # generator of the dynamics' noise; another one makes another cube


@dataclass(frozen=True)
class DatasetConfig:
    """Everything that a dataset's contents depend on, and where it goes."""

    out_dir: Path = field(metadata={"help": "folder of the dataset: cube.nc, or shards and their manifest.json"})
    num_networks: int = field(default=100, metadata={"help": "number of networks"})
    N: int = field(default=50, metadata={"help": "neurons per network", "flags": ("--N",)})
    num_trials: int = field(default=10, metadata={"help": "trials per network"})
    T: int = field(default=100, metadata={"help": "times per trial", "flags": ("--T",)})
    dt: float = field(default=0.1, metadata={"help": "step, in units of tau's unit of time"})
    tau: float = field(default=1.0, metadata={"help": "time constant"})
    noise_std: float = field(default=0.1, metadata={"help": "noise sigma per square root of time"})
    initial_std: float = field(default=1.0, metadata={"help": "standard deviation of the initial voltage"})
    input_std: float = field(default=0.0, metadata={"help": "standard deviation of a constant input per neuron"})
    burn_in: int = field(default=0, metadata={"help": "steps simulated and dropped before each trial"})
    drive: Drive = field(default="scaled", metadata={"help": "(-h + W phi(h) + I)/tau, or -h/tau + W phi(h) + I"})
    seed: int = field(default=0, metadata={"help": "root seed"})
    time_unit: str | None = field(default=None, metadata={"help": "unit of dt and tau, such as s (default tau itself)"})
    voltage: bool = field(default=False, metadata={"help": "store voltages beside the rates"})
    engine: EngineName = field(default="auto", metadata={"help": "who simulates"})
    split: tuple[float, ...] = field(
        default=(0.8, 0.1, 0.1), metadata={"help": "shares of networks for training, validation and test"}
    )
    shard_size: int | None = field(
        default=None, metadata={"help": "networks per shard (default one file up to 2 GiB, else shards of 256 MB)"}
    )
    ensemble: Ensemble = field(default_factory=Gaussian)

    def __post_init__(self) -> None:
        for name in ("num_networks", "num_trials", "N"):
            check_count(getattr(self, name), name)
        check_count(self.T, "T", 2)
        check_count(self.burn_in, "burn_in", 0)
        check_count(self.seed, "seed", 0)
        check_positive(self.tau, "tau")
        check_time_step(self.dt, self.tau)
        for name in ("noise_std", "initial_std", "input_std"):
            check_positive(getattr(self, name), name, zero_ok=True)
        if self.shard_size is not None:
            check_count(self.shard_size, "shard_size")
        object.__setattr__(self, "split", tuple(check_positive(share, "split", zero_ok=True) for share in self.split))
        if len(self.split) != 3 or not math.isclose(sum(self.split), 1):
            raise ValueError(f"split must be three shares that add up to 1, such as 0.8 0.1 0.1; got {self.split}.")
        self.ensemble.variance(self.N)  # refuses sizes that the ensemble cannot have

    @property
    def path(self) -> Path:
        """The cube: its file, or the folder of its shards."""
        return Path(self.out_dir) if self.networks_per_shard else Path(self.out_dir) / CUBE_NAME

    @property
    def networks_per_shard(self) -> int | None:
        """Networks of each shard but the last; None for a single file."""
        total = layout_bytes(self.sizes(self.num_networks), self.voltage)
        if self.shard_size is None and total > SINGLE_BYTES:
            return max(1, SHARD_BYTES * self.num_networks // total)
        return self.shard_size

    def sizes(self, count: int) -> dict[str, int]:
        """Length of each dimension of a file of that many networks."""
        return {
            "network": count, "trial": self.num_trials, "time": self.T, "neuron": self.N, "post": self.N, "pre": self.N
        }  # fmt: skip

    def contents(self) -> dict[str, Any]:
        """What the cube's contents depend on, as plain values; not where it lies, nor who computes it."""
        plain = asdict(self)
        del plain["out_dir"], plain["engine"], plain["shard_size"]
        return plain | {"ensemble": plain_parameters(self.ensemble), "noise": NOISE}

    def description(self, count: int) -> dict[str, Any]:
        """What the file of that many of the networks is to be told (`CubeFile.create`)."""
        return {
            "config": self.contents(),
            "sizes": self.sizes(count),
            "dt": self.dt,
            "time_unit": self.time_unit or ("tau" if self.tau == 1 else "1"),
            "seed": self.seed,
            "title": f"Activity of {self.num_networks} {self.ensemble.name} rate networks of {self.N} neurons",
            "summary": (
                f"Recurrent weights drawn from the {self.ensemble.name} ensemble and {self.num_trials} simulated "
                f"trials of {self.T} times each, tau dh = (-h + W tanh(h) + I) dt + tau sigma dB, x = tanh(h)."
            ),
            "voltage": self.voltage,
        }

    @property
    def block_size(self) -> int:
        """Networks simulated and written at a time."""
        per_network = 4 * self.num_trials * (self.T + self.burn_in) * self.N
        return max(1, min(self.num_networks, BLOCK_BYTES // per_network))


def build_dataset(config: DatasetConfig, execution: Execution | None = None) -> Path:
    """Build a cube, or what is missing of it; memory is bounded by a block whatever its size.

    Args:
        config: what to build, and where.
        execution: who makes the shards; by default this process.

    Returns:
        Path of the cube: a file, or the folder of its shards.

    Raises:
        ValueError: a cube made with another configuration is there, or there are workers but no shards for them.
        OSError: the disk is full, the folder cannot be written, or workers died again and again.
        ImportError: dask is wanted and not installed.
    """
    execution = execution or Execution()
    if config.networks_per_shard is not None:
        return _build_shards(config, execution)
    if not execution.alone:
        raise ValueError(
            f"workers make shards, but {config.path} is a single file; give --shard-size, such as "
            f"{max(1, config.num_networks // 8)}, or leave the workers out."
        )
    return _build_single(config)


def _build_single(config: DatasetConfig) -> Path:
    c = config
    _check_alone(c, list(Path(c.out_dir).glob("network=*.nc")))
    with CubeWriter(c.path, **c.description(c.num_networks)) as writer:
        if writer.finished:
            return c.path
        c = replace(c, engine=settled_engine(c))
        progress = tqdm(total=c.num_networks, initial=int(writer.complete.sum()), unit="network", disable=None)
        with progress:
            for first in range(0, c.num_networks, c.block_size):
                count = min(c.block_size, c.num_networks - first)
                if not writer.complete[first : first + count].all():
                    writer.write(first, simulate_block(c, first, count))
                    progress.update(count)
        writer.finish()
    return c.path


def _check_alone(config: DatasetConfig, others: Sequence[Path]) -> None:
    """Refuse to put a cube of the one kind beside a cube of the other."""
    there = [path for path in others if path.exists()]
    if there:
        raise ValueError(f"{there[0]} is there already; choose its --shard-size, or another --out-dir.")


def planned_shards(config: DatasetConfig) -> list[Shard]:
    """List the shards that a dataset will have, in order; none if it is a single file."""
    size, total = config.networks_per_shard, config.num_networks
    if size is None:
        return []
    counts = ((first, min(size, total - first)) for first in range(0, total, size))
    return [Shard(Path(config.out_dir) / shard_name(first, count), first, count) for first, count in counts]


def _build_shards(c: DatasetConfig, execution: Execution) -> Path:
    folder = Path(c.out_dir)
    _check_alone(c, [folder / CUBE_NAME, folder / (CUBE_NAME + ".partial")])
    make_folder(folder / MANIFEST_NAME)
    there = sum(path.stat().st_size for path in folder.glob("network=*.nc"))
    check_space(folder / "network=*.nc", layout_bytes(c.sizes(c.num_networks), c.voltage) - there)
    shards = planned_shards(c)
    known = finished_shards(folder, shards, config_json(c.contents()))
    waiting = [shard for shard in shards if shard not in known]
    if not waiting:
        return folder
    c = replace(c, engine=settled_engine(c))
    there = c.num_networks - sum(shard.count for shard in waiting)
    with tqdm(total=c.num_networks, initial=there, unit="network", disable=None) as progress:
        while waiting:
            for shard, record in run_tasks(partial(make_shard, c), waiting, execution):
                if record is not None:
                    known[shard] = record
                    progress.update(shard.count)
            waiting = [shard for shard in shards if shard not in known]
            execution = Execution()  # what others are at now is soon there, or left to us
            if waiting:
                time.sleep(0.5)
    for path in folder.glob(".network=*.nc.*"):  # left by processes that died just after they had made a shard
        with lock_file(folder / (path.name[1:].partition(".nc")[0] + ".nc")):
            pass
    write_manifest(folder, c.contents(), SCHEMA_VERSION, [known[shard] for shard in shards])
    return folder


def make_shard(config: DatasetConfig, shard: Shard) -> ShardRecord | None:
    """Make a shard if it is not there, and say what is in it; None if another live process is making it.

    Raises:
        ValueError: what is there has another configuration, or is not whole.
        OSError: the disk is full, or the folder cannot be written.
    """
    c = config
    with _netcdf, lock_file(shard.path) as mine:
        if shard.path.exists():
            check_shard(shard, config_json(c.contents()))
            digest = digest_of(shard.path)
        elif not mine:
            return None
        else:
            with (
                whole_file(shard.path) as temporary,
                CubeFile.create(temporary, first=shard.first, **c.description(shard.count)) as file,
            ):
                for start in range(0, shard.count, c.block_size):
                    count = min(c.block_size, shard.count - start)
                    file.write(start, simulate_block(c, shard.first + start, count))
                digest = file.finish()
            sync_folder(shard.path.parent)
        return ShardRecord(shard.path.name, shard.first, shard.count, shard.path.stat().st_size, digest)


_netcdf = threading.Lock()  # netCDF is for one thread at a time; a dask worker may have several


def settled_engine(config: DatasetConfig) -> EngineName:
    """Return who simulates a dataset: one engine for all of it, so that no block depends on who made the others."""
    c = config
    work = Work(
        c.num_networks, c.num_networks * c.num_trials, c.N, c.burn_in + c.T - 1, c.noise_std > 0, False, False, "tanh",
        torch.float32, torch.device("cpu"),
    )  # fmt: skip
    return cast(EngineName, select_engine(c.engine, work, whole=True).name)


@contextmanager
def _one_thread(engine: EngineName) -> Iterator[None]:
    """Let torch's own engines compute with one thread: they round the same then, whatever the block."""
    threads = torch.get_num_threads()
    torch.set_num_threads(threads if engine == "julia" else 1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def network_seeds(root_seed: int, k: int) -> tuple[int, int]:
    """Seeds of the weights and of the dynamics of network k."""
    words = np.random.SeedSequence(root_seed, spawn_key=(k,)).generate_state(2, np.uint64)
    return int(words[0] >> np.uint64(1)), int(words[1] >> np.uint64(1))  # 63 bits: they are stored as int64


def network_split(root_seed: int, k: int, shares: Sequence[float]) -> int:
    """Say what network k is for: 0 training, 1 validation, 2 test, with these probabilities.

    It depends on the root seed and k alone, so that another dataset of the same seed splits the same.
    """
    word = np.random.SeedSequence(root_seed, spawn_key=(k,)).generate_state(3, np.uint64)[2]
    return int(np.searchsorted(np.cumsum(shares)[:-1], word / 2.0**64, side="right"))


def simulate_block(c: DatasetConfig, first: int, count: int) -> dict[str, np.ndarray]:
    """Draw and simulate networks first … first + count − 1 in one batched call: the cube's variables, named."""
    seeds = [network_seeds(c.seed, k) for k in range(first, first + count)]
    draws = [c.ensemble.sample(c.N, torch.Generator().manual_seed(of_weights)) for of_weights, _ in seeds]
    h0 = torch.empty(count, c.num_trials, c.N)
    current = torch.zeros(count, 1, c.N)
    for row, (_, of_dynamics) in enumerate(seeds):
        generator = torch.Generator().manual_seed(of_dynamics)
        h0[row] = c.initial_std * torch.randn(c.num_trials, c.N, generator=generator)
        if c.input_std > 0:
            current[row] = c.input_std * torch.randn(1, c.N, generator=generator)
    weights = torch.stack([draw.weights for draw in draws]).float()
    simulate = partial(
        simulate_rate_network, weights.unsqueeze(1), h0, c.burn_in + c.T, c.dt, c.tau,
        current if c.input_std > 0 else None, c.noise_std, drive=c.drive, engine=c.engine,
        bm=BrownianSeeds([of_dynamics for _, of_dynamics in seeds]) if c.noise_std > 0 else None,
    )  # fmt: skip
    with torch.no_grad(), _one_thread(c.engine):
        x, h = simulate(return_h=True) if c.voltage or c.burn_in > 0 else (simulate(), None)
    arrays = {
        "weights": weights.numpy(),
        "activity": x[..., c.burn_in :, :].contiguous().numpy(),
        "initial_state": (h0 if h is None else h[..., c.burn_in, :]).numpy(),
        "input": current.squeeze(1).numpy(),
        "gain": np.array([draw.gain for draw in draws]),
        "noise_std": np.full(count, c.noise_std),
        "tau": np.full(count, c.tau),
        "seed": np.array([of_dynamics for _, of_dynamics in seeds], dtype=np.int64),
        "cell_type": torch.stack([draw.cell_type for draw in draws]).numpy(),
        "block": torch.stack([draw.block for draw in draws]).numpy(),
        "observed": np.ones((count, c.N), dtype=np.int8),
        "split": np.array([network_split(c.seed, k, c.split) for k in range(first, first + count)], dtype=np.int8),
    }
    if c.voltage and h is not None:
        arrays["voltage"] = h[..., c.burn_in :, :].contiguous().numpy()
    return arrays


def add_arguments(parser: OptionParser) -> None:
    """Add the options of build-dataset to a parser: the configuration's, and each ensemble's own."""
    add_options(parser, DatasetConfig, skip=("ensemble",))
    parser.add_argument("--verify", action="store_true", help="check what is in --out-dir instead: nothing is built")
    add_options(parser.add_argument_group("execution"), Execution)
    add_ensemble_options(parser)


def run(options: Namespace) -> int:
    """Build what the options say and tell where it is; or verify what is there."""
    if options.verify:
        return _verify(options)
    config = from_options(DatasetConfig, options, ensemble=ensemble_from_options(options))
    execution = from_options(Execution, options)
    last = config.path if config.networks_per_shard is None else config.path / MANIFEST_NAME  # what is written last
    before = last.stat() if last.exists() else None
    path = build_dataset(config, execution)
    if before is not None and os.path.samestat(before, last.stat()):
        print(f"{path} is complete already ({config.num_networks} networks).")
        return 0
    size = sum(file.stat().st_size for file in (path.glob("network=*.nc") if path.is_dir() else [path]))
    print(f"{path}: {config.num_networks} networks x {config.num_trials} trials, {size / 1e6:.1f} MB")
    return 0


def _verify(options: Namespace) -> int:
    names = {item.name for kind in (DatasetConfig, Execution) for item in fields(kind)}
    others = sorted((names | PARAMETER_NAMES) & vars(options).keys() - {"out_dir"})
    if others:
        raise ValueError(f"--verify takes --out-dir only; got {', '.join(others)}. Leave the rest out.")
    print(f"{options.out_dir}: {verify_cube(options.out_dir)}")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run as a module."""
    parser = OptionParser(prog="python -m neurosde.datasets.build_dataset", description=__doc__)
    add_arguments(parser)
    return run_safely(run, parser.parse_args(command_words(arguments)))


if __name__ == "__main__":
    sys.exit(main())
