"""Recordings to train a posterior on: from cubes, or simulated on the device of the network.

A simulation makes the recordings of `reuse` steps, of other networks each. It is of one dt and of as many trials for
all its networks, whose ensemble, gain, noise and input differ; each network is seen at several lengths of its
recording. All that a posterior needs of a recording are Λ and B (`neurosde.likelihood`), and in units where σ is known
it is the same whatever dt and τ are: so τ = 1 here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from neurosde.brownian import BrownianPath
from neurosde.datasets.ensembles import Ensemble, base_of
from neurosde.datasets.entry_law import EntryLaw
from neurosde.datasets.loaders import CubeDataset
from neurosde.models.edm import Evidence
from neurosde.models.empirical_bayes import evidence_gain
from neurosde.models.network_denoiser import Told
from neurosde.models.training_config import PosteriorTraining
from neurosde.models.training_data import VALIDATION_MATRICES, CubeMatrices, DrawnMatrices, Examples
from neurosde.solve import simulate_rate_network

LENGTHS = 4  # of the recording of each network
_CHUNK = {"cpu": 2**20, "cuda": 2**25}  # voltages simulated at a time


@dataclass(frozen=True)
class Recordings:
    """Recordings of one simulation.

    Attributes:
        weights: W (recording, post, pre), float64.
        evidence: of each recording, in units of W.
        family: 1 + index of the ensemble of each, shape (recording,).
        gain: root mean square gain √(N E W²) of its ensemble, given its gain, shape (recording,).
        law: of the entries of each, given gain and structure, in units of W; None where that is not known.
    """

    weights: Tensor
    evidence: Evidence
    family: Tensor
    gain: Tensor
    law: EntryLaw | None = None


class SimulatedRecordings(DrawnMatrices):
    """Networks drawn from the ensembles of a training, and recordings of them.

    Attributes:
        gains: smallest and largest root mean square gain √(N E W²) of the ensembles.
    """

    config: PosteriorTraining

    def __init__(self, config: PosteriorTraining) -> None:
        super().__init__(config)
        self.gains = _range_of_gains(self.ensembles, [max(self.sizes)] * len(self.ensembles))
        self._kept: dict[tuple[int, int], Recordings] = {}  # by size and number of the simulation

    def batches(self, start: int, rank: int, world_size: int) -> Iterator[dict[str, Any]]:
        """Numbers of steps, with what to simulate for each."""
        seen = dict.fromkeys(range(len(self.sizes)), 0)
        for step, k in enumerate(self.order().tolist()):
            if step >= start:
                N = self.sizes[k]
                number, part = divmod(seen[k], self.config.reuse)
                count = self.batch_size(N, world_size)
                yield {"step": step, "N": N, "count": count, "number": number, "part": part, "rank": rank}
            seen[k] += 1

    def validation(self) -> list[dict[str, Any]]:
        """Other recordings than those trained on: their generators have another key."""
        count = VALIDATION_MATRICES
        return [{"N": N, "count": count, "number": -1, "part": 0, "rank": 0} for N in self.sizes]

    def examples(self, batch: dict[str, Any], generator: torch.Generator) -> Examples:
        """Take a share of a simulation, in units of each recording's own gain or of the one that is told."""
        one = self._recordings(batch, generator.device)
        some = torch.arange(int(batch["part"]), len(one.weights), self.config.reuse, device=generator.device)
        law = None if one.law is None else one.law[some]
        share = Recordings(one.weights[some], one.evidence[some], one.family[some], one.gain[some], law)
        return _examples(share, self.config, self.gains, generator)

    def _recordings(self, batch: dict[str, Any], device: torch.device) -> Recordings:
        N, number = int(batch["N"]), int(batch["number"])
        if (N, number) not in self._kept:
            if number >= 0:  # the validation's, −1, is kept
                self._kept = {one: kept for one, kept in self._kept.items() if one[0] != N or one[1] < 0}
            # Validation has the number −1, which a seed sequence cannot hold. How long a simulation is, is the same in
            # all processes, which wait for each other.
            key = (self.config.seed, 3, N, number + 1)
            seed = np.random.SeedSequence((*key, int(batch["rank"]))).generate_state(1, np.uint64)[0]
            generator = torch.Generator(device).manual_seed(int(seed >> np.uint64(1)))
            count = int(batch["count"]) * self.config.reuse
            self._kept[N, number] = self._simulate(N, count, np.random.default_rng(key), generator)
        return self._kept[N, number]

    def _simulate(self, N: int, count: int, shared: np.random.Generator, generator: torch.Generator) -> Recordings:
        c, device = self.config, generator.device
        T, trials, dt = (math.exp(shared.uniform(*np.log(limits))) for limits in (c.times, c.trials, c.dt))
        times = round(T)
        lengths = np.unique(np.geomspace(min(c.times[0], times), times, LENGTHS).round().astype(int)).tolist()
        networks = self.drawn(N, -(-count // len(lengths)), generator)
        networks = networks[torch.randperm(len(networks.weights), generator=generator, device=device)]
        weights, family = networks.weights, networks.family
        share, spread = torch.rand(2, len(weights), generator=generator, dtype=torch.float64, device=device)
        low, high = np.log(c.noise_std)
        noise = (low + share * (high - low)).exp()
        current = torch.randn(len(weights), N, generator=generator, dtype=torch.float64, device=device)
        current *= c.input_std * spread.unsqueeze(-1)
        number = max(1, min(round(trials), c.transitions // times))
        xx, yx = simulated_sums(weights, number, lengths, dt, noise, current, generator)
        copies = len(lengths)
        evidence = Evidence.of(xx.flatten(0, 1), yx.flatten(0, 1))
        of_each = torch.stack([base_of(kind).rms_gain(N, networks.gain) for kind in self.ensembles])
        gain = of_each.gather(0, (family - 1).unsqueeze(0))[0]
        law = EntryLaw.cat([networks.law] * copies)
        return Recordings(weights.repeat(copies, 1, 1), evidence, family.repeat(copies), gain.repeat(copies), law)


class CubeRecordings(CubeMatrices):
    """Networks of cubes and their recordings, whole, through their loaders.

    Attributes:
        gains: smallest and largest root mean square gain √(N E W²) of the cubes' ensembles.
    """

    config: PosteriorTraining
    variables = ("weights", "gain")
    statistics = True

    def __init__(self, config: PosteriorTraining) -> None:
        super().__init__(config)
        self.ensembles = []
        for path in config.dataset:
            cube = CubeDataset(path, ("weights",), statistics=True)
            if cube.experiment.ensemble is None:
                raise ValueError(f"{path} does not say which ensemble it is of; build it with neurosde build-dataset.")
            if cube.experiment.observation is not None:
                raise ValueError(f"{path} shows what an experiment saw; a posterior is trained on whole recordings.")
            self.ensembles.append(cube.experiment.ensemble)
            cube[0]  # statistics can be had
            cube.close()
        names = tuple(dict.fromkeys(kind.name for kind in self.ensembles))
        self.families = names if len(names) > 1 else ()
        self._family = [1 + names.index(kind.name) for kind in self.ensembles]
        self.gains = _range_of_gains(self.ensembles, self.sizes)

    def examples(self, batch: dict[str, Any], generator: torch.Generator) -> Examples:
        """Decompose what each recording says, in units of its own gain or of the one that is told."""
        W, precision, cross = (batch[name].to(generator.device).double() for name in ("weights", "precision", "cross"))
        k = int(batch["cube"])
        family = torch.full((len(W),), self._family[k], device=W.device)
        gain = base_of(self.ensembles[k]).rms_gain(W.shape[-1], batch["gain"].to(W))
        return _examples(Recordings(W, Evidence.of(precision, cross), family, gain), self.config, self.gains, generator)


def recorded_data(config: PosteriorTraining) -> SimulatedRecordings | CubeRecordings:
    """Return the recordings that a training names.

    Raises:
        FileNotFoundError: a cube is not there.
        ValueError: a file is no cube, or one without an ensemble, hidden neurons, or too few networks.
    """
    return CubeRecordings(config) if config.dataset else SimulatedRecordings(config)


def _examples(
    one: Recordings, c: PosteriorTraining, gains: tuple[float, float], generator: torch.Generator
) -> Examples:
    """Leave out the recordings of some, and what is told of others."""
    count, N = one.weights.shape[:2]

    def happens(share: float) -> Tensor:
        return torch.rand(count, generator=generator, device=generator.device) < share

    evidence = one.evidence.scaled(torch.where(happens(c.recording_dropout), 0.0, 1.0).double())
    gain_known = ~happens(c.gain_dropout)
    gain = torch.where(gain_known, one.gain, evidence_gain(evidence, *gains))
    scale = gain / math.sqrt(N)
    told, unit = Told(one.family, gain, gain_known), scale[:, None, None]
    law = None if one.law is None else one.law.scaled(1 / unit)
    if law is not None:
        law = law.of_gains(*(torch.where(gain_known, 1.0, end) for end in law.gains.unbind(-1)))
    return Examples(one.weights / unit, evidence.scaled(scale), told, one.family, law)


def simulated_sums(
    weights: Tensor,
    trials: int,
    lengths: list[int],
    dt: float,
    noise_std: Tensor,
    current: Tensor,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Simulate networks from random states, and sum up their transitions: Λ and B at several lengths, τ = 1.

    Args:
        weights: W (network, post, pre).
        trials: trials of each network.
        lengths: numbers of times, rising.
        dt: step.
        noise_std: σ of each network, shape (network,).
        current: constant input (network, neuron).
        generator: of initial states and noise, on the device of the weights.

    Returns:
        Λ and B, shape (length, network, neuron, neuron) each, float64.
    """  # fmt: skip
    count, N = current.shape
    device = weights.device
    variance = (noise_std.square() / dt).view(-1, 1, 1)
    W, current32 = weights.float().unsqueeze(1), current.float().unsqueeze(1)
    sigma = noise_std.float().view(-1, 1, 1)
    h = torch.randn(count, trials, N, generator=generator, device=device)
    xx = torch.zeros(count, N, N, dtype=torch.float64, device=device)
    yx = torch.zeros_like(xx)
    found, time = [], 0
    most = max(1, _CHUNK.get(device.type, _CHUNK["cpu"]) // (count * trials * N))
    for length in lengths:
        while time < length - 1:
            steps = min(length - 1 - time, most)
            noise = torch.randn(steps, count, trials, N, generator=generator, device=device).mul_(math.sqrt(dt))
            with torch.autocast(device.type, enabled=False):  # a training's: bfloat16 is for networks
                x, voltage = simulate_rate_network(
                    W,
                    h,
                    steps + 1,
                    dt,
                    1.0,
                    current32,
                    sigma,
                    return_h=True,
                    engine="torch",
                    bm=BrownianPath(noise, dt),
                )
            phi = x[..., :-1, :].flatten(1, 2).double()
            v = voltage.double()
            y = ((v[..., 1:, :] - (1 - dt) * v[..., :-1, :]) / dt).flatten(1, 2) - current.unsqueeze(1)
            xx += phi.mT @ phi
            yx += y.mT @ phi
            h, time = voltage[..., -1, :].contiguous(), time + steps
        found.append((xx / variance, yx / variance))
    return torch.stack([one[0] for one in found]), torch.stack([one[1] for one in found])


def _range_of_gains(ensembles: Sequence[Ensemble], sizes: Sequence[int]) -> tuple[float, float]:
    """Smallest and largest root mean square gain of ensembles, each at a number of neurons."""
    ends = [
        base_of(kind).rms_gain(N, torch.tensor(kind.gain_range, dtype=torch.float64))
        for kind, N in zip(ensembles, sizes, strict=True)
    ]
    return min(float(low) for low, _ in ends), max(float(high) for _, high in ends)
