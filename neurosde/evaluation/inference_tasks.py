"""What `neurosde benchmark inference` infers: networks of an ensemble, and recordings of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from neurosde.datasets.ensembles import ENSEMBLES, Ensemble, make_ensemble
from neurosde.likelihood import TransitionStatistics, transition_statistics
from neurosde.solve import simulate_rate_network
from neurosde.validation import check_count, check_positive

Suite = Literal["quick", "paper"]
DT = 0.1  # in units of τ = 1
_HELD_OUT = 1  # trials that no method sees


@dataclass(frozen=True, order=True)
class Task:
    """Networks of one ensemble, size and gain, and how they are recorded.

    Attributes:
        ensemble: its name, with the ensemble's own parameters at their defaults.
        neurons: N.
        times: of each trial.
        trials: of each network.
        gain: g, which methods are not told.
        noise_std: σ, which they are.
        observed: fraction of the neurons that is recorded.
    """

    ensemble: str
    neurons: int
    times: int
    trials: int = 2
    gain: float = 1.5
    noise_std: float = 0.3
    observed: float = 1.0

    def __post_init__(self) -> None:
        if self.ensemble not in ENSEMBLES:
            raise ValueError(f"ensemble must be one of {', '.join(ENSEMBLES)}; got {self.ensemble!r}.")
        check_count(self.neurons, "neurons", 4)
        check_count(self.times, "times", 3)
        check_count(self.trials, "trials")
        check_positive(self.gain, "gain")
        check_positive(self.noise_std, "noise_std")
        if self.observed != 1:
            raise ValueError(f"observed must be 1: no method infers hidden neurons; got {self.observed}.")

    @property
    def name(self) -> str:
        """A name that is one of a file, too."""
        parts = (f"N{self.neurons}", f"T{self.times}x{self.trials}", f"g{self.gain:g}", f"sigma{self.noise_std:g}")
        return "-".join([self.ensemble, *parts])

    @property
    def kind(self) -> Ensemble:
        """The ensemble."""
        return make_ensemble(self.ensemble, gain=self.gain)


@dataclass(frozen=True)
class Recorded:
    """Recordings of a task's networks, a network for each seed.

    Attributes:
        task: the task.
        seeds: of each network.
        weights: W (seed, post, pre), float64.
        voltage: h (seed, trial, time, neuron).
        statistics: sums over the transitions of each network.
        held_out: the same of a trial that no method sees.
    """

    task: Task
    seeds: tuple[int, ...]
    weights: Tensor
    voltage: Tensor
    statistics: list[TransitionStatistics]
    held_out: list[TransitionStatistics]

    @property
    def activity(self) -> Tensor:
        """Firing rate (seed, trial, time, neuron)."""
        return torch.tanh(self.voltage)


def record(task: Task, seeds: tuple[int, ...]) -> Recorded:
    """Draw and simulate a task's networks; each depends on the task and its own seed alone."""
    weights, voltages = [], []
    for seed in seeds:
        key = np.frombuffer(task.name.encode(), dtype=np.uint8).tolist()
        state = np.random.SeedSequence((seed, *key), spawn_key=(3,)).generate_state(1, np.uint64)[0]
        generator = torch.Generator().manual_seed(int(state >> np.uint64(1)))
        W = task.kind.sample_weights(1, task.neurons, generator)[0]
        h0 = torch.randn(task.trials + _HELD_OUT, task.neurons, generator=generator, dtype=torch.float64)
        _, h = simulate_rate_network(
            W, h0, task.times, DT, 1.0, noise_std=task.noise_std, generator=generator, return_h=True
        )
        weights.append(W)
        voltages.append(h)
    h = torch.stack(voltages)
    seen, unseen = h[:, _HELD_OUT:], h[:, :_HELD_OUT]
    return Recorded(
        task, seeds, torch.stack(weights), seen,
        [transition_statistics(voltage=one, dt=DT) for one in seen],
        [transition_statistics(voltage=one, dt=DT) for one in unseen],
    )  # fmt: skip


def suite_tasks(suite: Suite) -> tuple[Task, ...]:
    """Tasks of a suite: `quick` takes minutes, `paper` covers the grid of sizes, lengths, trials, gains and noise."""
    if suite == "quick":
        small = [Task(name, 10, 100) for name in ENSEMBLES]
        return (*small, Task("gaussian", 20, 1000), Task("dale", 20, 1000), Task("sparse", 20, 1000))
    grid = product(ENSEMBLES, (10, 20, 50, 100), (100, 1000), (1, 10), (0.8, 1.5, 2.5), (0.1, 0.3))
    return tuple(Task(*values) for values in grid)


def unit(task: Task) -> float:
    """s₀, root mean square of a weight of the task's ensemble."""
    return math.sqrt(task.kind.variance(task.neurons))
