"""Matrices to train a prior on: from cubes, or drawn as they are needed.

Batch k depends on the seed, on k and on the process's rank alone, so that a training can go on anywhere.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from neurosde.datasets.entry_law import EntryLaw
from neurosde.datasets.loaders import CubeDataset, CubeLoader, loader
from neurosde.models.edm import Evidence
from neurosde.models.network_denoiser import Told
from neurosde.models.training_config import PriorTraining

VALIDATION_MATRICES = 64  # of each size


@dataclass(frozen=True)
class Examples:
    """What a step learns from.

    Attributes:
        J: matrices (network, post, pre), float64.
        evidence: what is known of each of them.
        told: what the network may be told of each.
        family: 1 + index of the ensemble of each, 0 where there is but one.
        law: of the entries of each once its gain and structure are known; None where that is not known.
    """

    J: Tensor
    evidence: Evidence
    told: Told
    family: Tensor
    law: EntryLaw | None = None


@dataclass(frozen=True)
class Drawn:
    """Matrices drawn from ensembles.

    Attributes:
        weights: W (matrix, post, pre), float64.
        family: 1 + index of the ensemble of each, shape (matrix,).
        gain: its gain, shape (matrix,).
        law: of the entries of each, given gain and structure.
    """

    weights: Tensor
    family: Tensor
    gain: Tensor
    law: EntryLaw

    def __getitem__(self, index: Any) -> Drawn:
        """Return some of the matrices."""
        return Drawn(self.weights[index], self.family[index], self.gain[index], self.law[index])


class TrainingData(ABC):
    """What a training needs to know of its matrices.

    Attributes:
        sizes: numbers of neurons.
        gain_rms: g_rms, by which W = J g_rms/√N has J of unit mean square.
        families: names of the ensembles, where they are several.
        sparse: whether there are exact zeros among the weights.
    """

    sizes: tuple[int, ...]
    gain_rms: float
    families: tuple[str, ...] = ()
    sparse: bool

    def __init__(self, config: PriorTraining) -> None:
        self.config = config

    def scale(self, N: int) -> float:
        """s₀ = g_rms/√N."""
        return self.gain_rms / math.sqrt(N)

    def order(self) -> np.ndarray:
        """Index of the size that each step has, shape (step,)."""
        source = np.random.default_rng(np.random.SeedSequence((self.config.seed, 0)))
        return source.integers(len(self.sizes), size=self.config.steps)

    def batch_size(self, N: int, world_size: int = 1) -> int:
        """Matrices per step and process."""
        return max(1, self.config.batch_entries // (N**2 * world_size))

    @abstractmethod
    def check_batches(self, world_size: int = 1) -> None:
        """Raise ValueError where there are too few matrices for one batch of each process."""

    @abstractmethod
    def batches(self, start: int, rank: int, world_size: int) -> Iterator[dict[str, Any]]:
        """Batches of the steps from `start` on: `step`, and whatever `examples` takes."""

    @abstractmethod
    def examples(self, batch: dict[str, Any], generator: torch.Generator) -> Examples:
        """What the network is to learn from in this batch."""

    @abstractmethod
    def validation(self) -> list[dict[str, Any]]:
        """Batches that are not trained on, one of each size."""


class DrawnMatrices(TrainingData):
    """Matrices drawn from the ensembles of a training, on the device of the network."""

    def __init__(self, config: PriorTraining) -> None:
        super().__init__(config)
        self.sizes = config.sizes
        self.ensembles = config.ensembles
        squares = [N * kind.variance(N) for N in self.sizes for kind in self.ensembles]
        self.gain_rms = math.sqrt(sum(squares) / len(squares))
        self.families = tuple(kind.name for kind in self.ensembles) if len(self.ensembles) > 1 else ()
        N, generator = max(self.sizes), torch.Generator().manual_seed(config.seed)
        self.sparse = any(bool((kind.sample_weights(1, N, generator) == 0).any()) for kind in self.ensembles)

    def check_batches(self, world_size: int = 1) -> None:
        """Take any: there are as many matrices as are asked for."""

    def batches(self, start: int, rank: int, world_size: int) -> Iterator[dict[str, Any]]:
        """Numbers of steps, with what to draw in each."""
        for step, k in enumerate(self.order().tolist()):
            if step >= start:
                N = self.sizes[k]
                yield {"step": step, "N": N, "count": self.batch_size(N, world_size)}

    def examples(self, batch: dict[str, Any], generator: torch.Generator) -> Examples:
        """Draw as many matrices from each ensemble."""
        drawn = self.drawn(int(batch["N"]), int(batch["count"]), generator)
        scale, family = self.scale(int(batch["N"])), drawn.family if self.families else torch.zeros_like(drawn.family)
        return replace(_of_prior(drawn.weights / scale, family), law=drawn.law.scaled(1 / scale))

    def drawn(self, N: int, count: int, generator: torch.Generator) -> Drawn:
        """Draw as many matrices from each ensemble."""
        first = int(torch.randint(len(self.ensembles), (), generator=generator, device=generator.device))
        counts = [(count + k) // len(self.ensembles) for k in range(len(self.ensembles))]
        counts = counts[first:] + counts[:first]
        weights, laws, gains = [], [], []
        for kind, n in zip(self.ensembles, counts, strict=True):
            if n:
                gains.append(kind.sample_gains(n, generator))
                W, law = kind.draw_matrices(gains[-1], N, generator)
                weights.append(W)
                laws.append(law.expand(n, N))
        family = torch.repeat_interleave(torch.arange(1, len(counts) + 1), torch.as_tensor(counts))
        return Drawn(torch.cat(weights), family.to(generator.device), torch.cat(gains), EntryLaw.cat(laws))

    def validation(self) -> list[dict[str, Any]]:
        """Other draws than those trained on: their generators have another key."""
        return [{"N": N, "count": VALIDATION_MATRICES} for N in self.sizes]


class CubeMatrices(TrainingData):
    """Weights of cubes, through their loaders.

    Attributes:
        variables: what is read of a network.
        statistics: whether Λ and B of its recording are, too.
    """

    variables: tuple[str, ...] = ("weights",)
    statistics = False

    def __init__(self, config: PriorTraining) -> None:
        super().__init__(config)
        cubes = [CubeDataset(path, ("weights",), split="train", units="J") for path in config.dataset]
        self.sizes = tuple(cube.experiment.neurons for cube in cubes)
        self._networks = tuple(len(cube) for cube in cubes)
        scales = [float(cube.scale or math.nan) * math.sqrt(N) for cube, N in zip(cubes, self.sizes, strict=True)]
        self.gain_rms = math.sqrt(float(np.mean(np.square(scales))))
        self.sparse = any(bool((cube[0]["weights"] == 0).any()) for cube in cubes)
        cubes += [CubeDataset(path, ("weights",), split="validation") for path in config.dataset]  # before any work
        for cube in cubes:
            cube.close()

    def check_batches(self, world_size: int = 1) -> None:
        """Raise ValueError where a cube has too few networks for one batch of each process."""
        for path, N, count in zip(self.config.dataset, self.sizes, self._networks, strict=True):
            if count < (needed := world_size * self.batch_size(N, world_size)):
                raise ValueError(
                    f"{path} has {count} networks for training, fewer than the {needed} of one batch; lower "
                    "batch_entries, or build more networks."
                )

    def batches(self, start: int, rank: int, world_size: int) -> Iterator[dict[str, Any]]:
        """Weights of one cube per step."""
        c, order = self.config, self.order()
        loaders = [
            loader(
                path, self.variables, batch_size=self.batch_size(N, world_size), split="train", shuffle=True,
                seed=c.seed, drop_last=True, statistics=self.statistics, rank=rank, world_size=world_size,
            )
            for path, N in zip(c.dataset, self.sizes, strict=True)
        ]  # fmt: skip
        streams = [_endless(one, int((order[:start] == k).sum())) for k, one in enumerate(loaders)]
        for step in range(start, c.steps):
            yield {"step": step, "cube": int(order[step]), **next(streams[order[step]])}

    def examples(self, batch: dict[str, Any], generator: torch.Generator) -> Examples:
        """Bring weights into J units."""
        weights = batch["weights"].to(generator.device).double()
        family = torch.zeros(len(weights), dtype=torch.long, device=weights.device)
        return _of_prior(weights / self.scale(weights.shape[-1]), family)

    def validation(self) -> list[dict[str, Any]]:
        """First networks of the validation split."""
        batches = []
        for k, path in enumerate(self.config.dataset):
            cube = CubeDataset(path, self.variables, split="validation", statistics=self.statistics)
            batches.append({"cube": k, **cube.__getitems__(range(min(VALIDATION_MATRICES, len(cube)))).batch})
            cube.close()
        return batches


def training_data(config: PriorTraining) -> TrainingData:
    """Return the matrices that a training names.

    Raises:
        FileNotFoundError: a cube is not there.
        ValueError: a file is no cube, or has no networks for training or for validation.
    """
    return CubeMatrices(config) if config.dataset else DrawnMatrices(config)


def _of_prior(J: Tensor, family: Tensor) -> Examples:
    """Examples without recordings."""
    told = replace(Told.of(len(J), device=J.device), family=family)
    return Examples(J, Evidence.none(J.shape[-1], J.device).expand(J.shape[:1]), told, family)


def _endless(one: CubeLoader, given: int) -> Iterator[dict[str, Tensor]]:
    """Batches of one epoch after the other, the first `given` of them left out."""
    one.load_state_dict(one.state_dict() | {"epoch": given // len(one), "batch": given % len(one)})
    while True:
        yield from one
