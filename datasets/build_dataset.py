"""Building a dataset: draw networks from an ensemble, simulate their activity, store both as one cube.

Run as `neurosde build-dataset …` or `python -m neurosde.datasets.build_dataset …`. The same command again resumes an
interrupted build, or says that it is complete.

Network k depends on the root seed and on k alone. Its weights and its dynamics have a generator each, spawned by
numpy's SeedSequence, so any block can be made anywhere, in any order and on any engine.
"""

from __future__ import annotations

import sys
from argparse import SUPPRESS, Namespace
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from neurosde.brownian import BrownianSeeds
from neurosde.datasets.ensembles import ENSEMBLES, Ensemble, Gaussian, make_ensemble
from neurosde.datasets.store import CubeWriter
from neurosde.engines import EngineName
from neurosde.options import OptionParser, add_options, command_words, from_options, run_safely
from neurosde.rate_sde import Drive
from neurosde.solve import simulate_rate_network
from neurosde.validation import check_count, check_positive, check_time_step

CUBE_NAME = "cube.nc"
BLOCK_BYTES = 2**26  # of activity: large enough to batch the simulation, small enough to lose little

NOISE = "philox4x32-7"  # generator of the dynamics' noise; another one makes another cube


@dataclass(frozen=True)
class DatasetConfig:
    """Everything that a dataset's contents depend on, and where it goes."""

    out_dir: Path = field(metadata={"help": "folder of the dataset; the cube is cube.nc in it"})
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
        self.ensemble.variance(self.N)  # refuses sizes that the ensemble cannot have

    @property
    def path(self) -> Path:
        """The cube."""
        return Path(self.out_dir) / CUBE_NAME

    def contents(self) -> dict[str, Any]:
        """What the cube's contents depend on, as plain values; not where it lies nor who computes it."""
        plain = asdict(self)
        del plain["out_dir"], plain["engine"]
        parameters = plain["ensemble"]
        parameters |= parameters.pop("base", {})  # of a gain mixture
        parameters["name"] = self.ensemble.name
        plain["noise"] = NOISE
        return plain

    @property
    def block_size(self) -> int:
        """Networks simulated and written at a time."""
        per_network = 4 * self.num_trials * (self.T + self.burn_in) * self.N
        return max(1, min(self.num_networks, BLOCK_BYTES // per_network))


def build_dataset(config: DatasetConfig) -> Path:
    """Build a cube, or what is missing of it; memory is bounded by a block whatever its size.

    Returns:
        Path of the cube.

    Raises:
        ValueError: a cube made with another configuration is there.
        OSError: the disk is full, or the folder cannot be written.
    """
    c = config
    sizes = {
        "network": c.num_networks, "trial": c.num_trials, "time": c.T, "neuron": c.N, "post": c.N, "pre": c.N
    }  # fmt: skip
    writer = CubeWriter(
        c.path,
        c.contents(),
        sizes,
        dt=c.dt,
        time_unit=c.time_unit or ("tau" if c.tau == 1 else "1"),
        seed=c.seed,
        title=f"Activity of {c.num_networks} {c.ensemble.name} rate networks of {c.N} neurons",
        summary=(
            f"Recurrent weights drawn from the {c.ensemble.name} ensemble and {c.num_trials} simulated trials of "
            f"{c.T} times each, tau dh = (-h + W tanh(h) + I) dt + tau sigma dB, x = tanh(h)."
        ),
        voltage=c.voltage,
    )
    with writer:
        if writer.finished:
            return c.path
        progress = tqdm(total=c.num_networks, initial=int(writer.complete.sum()), unit="network", disable=None)
        with progress:
            for first in range(0, c.num_networks, c.block_size):
                count = min(c.block_size, c.num_networks - first)
                if not writer.complete[first : first + count].all():
                    writer.write(first, simulate_block(c, first, count))
                    progress.update(count)
        writer.finish()
    return c.path


def network_seeds(root_seed: int, k: int) -> tuple[int, int]:
    """Seeds of the weights and of the dynamics of network k."""
    words = np.random.SeedSequence(root_seed, spawn_key=(k,)).generate_state(2, np.uint64)
    return int(words[0] >> np.uint64(1)), int(words[1] >> np.uint64(1))  # 63 bits: they are stored as int64


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
    with torch.no_grad():
        x, h = simulate(return_h=True) if c.voltage or c.burn_in > 0 else (simulate(), None)
    arrays = {
        "weights": weights.numpy(),
        "activity": x[..., c.burn_in :, :].numpy(),
        "initial_state": (h0 if h is None else h[..., c.burn_in, :]).numpy(),
        "input": current.squeeze(1).numpy(),
        "gain": np.array([draw.gain for draw in draws]),
        "noise_std": np.full(count, c.noise_std),
        "tau": np.full(count, c.tau),
        "seed": np.array([of_dynamics for _, of_dynamics in seeds], dtype=np.int64),
        "cell_type": torch.stack([draw.cell_type for draw in draws]).numpy(),
        "block": torch.stack([draw.block for draw in draws]).numpy(),
        "observed": np.ones((count, c.N), dtype=np.int8),
    }
    if c.voltage and h is not None:
        arrays["voltage"] = h[..., c.burn_in :, :].numpy()
    return arrays


def add_arguments(parser: OptionParser) -> None:
    """Add the options of build-dataset to a parser: the configuration's, and each ensemble's own."""
    add_options(parser, DatasetConfig, skip=("ensemble",))
    group = parser.add_argument_group("ensemble")
    group.add_argument(
        "--ensemble", dest="ensemble_name", choices=sorted(ENSEMBLES), default="gaussian", help="(default gaussian)"
    )
    add_options(group, Gaussian)  # the gain, which all of them have
    group.add_argument("--g-high", dest="gain_high", type=float, default=SUPPRESS, help="draw gains from [g, g-high]")
    for kind in ENSEMBLES.values():
        add_options(parser.add_argument_group(f"{kind.name} ensemble"), kind, skip=("gain",))


def run(options: Namespace) -> int:
    """Build what the options say and tell where it is."""
    names = {item.name for kind in ENSEMBLES.values() for item in fields(kind)} | {"gain_high"}
    given = {name: value for name, value in vars(options).items() if name in names}
    config = from_options(DatasetConfig, options, ensemble=make_ensemble(options.ensemble_name, **given))
    there = config.path.exists()
    path = build_dataset(config)
    if there:
        print(f"{path} is complete already ({config.num_networks} networks).")
        return 0
    print(f"{path}: {config.num_networks} networks x {config.num_trials} trials, {path.stat().st_size / 1e6:.1f} MB")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run as a module."""
    parser = OptionParser(prog="python -m neurosde.datasets.build_dataset", description=__doc__)
    add_arguments(parser)
    return run_safely(run, parser.parse_args(command_words(arguments)))


if __name__ == "__main__":
    sys.exit(main())
