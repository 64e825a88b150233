"""A trained prior over weight matrices: its network, what it was trained on, and draws from it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neurosde.brownian import as_generator
from neurosde.models.denoiser import PairNetwork, PairNetworkConfig
from neurosde.models.edm import noise_levels
from neurosde.models.graphed_network import GraphedNetwork
from neurosde.models.model_files import load_model, save_model
from neurosde.models.network_denoiser import NetworkDenoiser
from neurosde.models.resolution import resolved
from neurosde.models.samplers import Method, sample
from neurosde.validation import check_count

STEPS = 28  # noise levels of draws by a trained network, of up to STEPS_NEURONS neurons
STEPS_NEURONS = 50
# Peaks of the density of levels, where structure is decided and where clusters are, and what it is elsewhere; see
# `noise_levels`. By 28 levels the last steps, of 0.59 in log s, are just below `samplers.SHORT`, and so corrected.
DECIDED, CLUSTERED, UNDECIDED = (1.0, 0.5, 1.5), (0.7, 0.7, 0.5), 0.85


@dataclass(frozen=True)
class PriorConfig:
    """What a prior is, apart from its weights.

    Attributes:
        network: sizes of the network.
        gain_rms: g_rms; weights are W = J g_rms/√N, and J is what the network denoises.
        sizes: numbers of neurons N that it was trained with.
        sigma_max: noise level that sampling starts from.
        sparse: whether exact zeros were among the weights it was trained with.
        training: how it was trained, as plain values.
    """

    network: PairNetworkConfig
    gain_rms: float
    sizes: tuple[int, ...]
    sigma_max: float = 80.0
    sparse: bool = False
    training: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ensembles(self) -> list[dict[str, Any]]:
        """Parameters of the ensembles it was trained on, of a posterior those of its cubes, too."""
        return [*self.training.get("ensembles", ()), *self.training.get("of_cubes", ())]


class DiffusionPrior:
    """A prior over weights of any number of neurons.

    Args:
        network: the pair network.
        config: what it was trained for.
    """

    def __init__(self, network: PairNetwork, config: PriorConfig) -> None:
        self.network = network.eval()
        self.config = config

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.network.parameters()).device

    @property
    def families(self) -> tuple[str, ...]:
        """Names of the ensembles that it can be told; none where it is of one."""
        return self.config.network.families

    def scale(self, N: int) -> float:
        """s₀ = g_rms/√N, the unit of the network's matrices: W = s₀ J."""
        return self.config.gain_rms / math.sqrt(check_count(N, "N", 2))

    def denoiser(self, family: str | None = None) -> NetworkDenoiser:
        """Return the prior's denoiser, in J units.

        Args:
            family: name of the ensemble, for a prior that knows several; None leaves it open.

        Raises:
            ValueError: a family that this prior does not know.
        """
        known = self.families
        if family is not None and family not in known:
            raise ValueError(
                f"family must be one of {sorted(known)}; got {family!r}."
                if known
                else f"this prior knows one ensemble only, and takes no family; got {family!r}. Leave it out."
            )
        return NetworkDenoiser(GraphedNetwork(self.network), 0 if family is None else 1 + known.index(family))

    def sample(
        self,
        num: int,
        N: int,
        *,
        family: str | None = None,
        steps: int | None = None,
        method: Method = "multistep",
        generator: int | torch.Generator | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Draw weight matrices.

        Weights below 5 σ_min = 0.01 s₀ cannot be told from none; a matrix with more of them than a density without an
        atom at 0 would have is a sparse one, and they are set to 0, but for the few that are weak ones. Of a prior that
        has seen no sparse ones, or is told another family, none are. Under Dale's law, of a prior that is told it or
        was trained on that ensemble alone, they have the sign of their column's sum.

        Args:
            num: number of matrices.
            N: neurons.
            family: name of the ensemble, for a prior that knows several.
            steps: noise levels; by default 28, of N > 50 neurons N/50 times as many.
            method: see `sample`.
            generator: seed or generator, on the prior's device.
            progress: show a progress bar, on a terminal.

        Returns:
            W (draw, post, pre), shape (num, N, N), float64.

        Raises:
            ValueError: no such family, or numbers out of range.
            MemoryError: the GPU is too small.
        """
        num, scale = check_count(num, "num"), self.scale(N)
        low, high = min(self.config.sizes), max(self.config.sizes)
        if not low / 2 <= N <= 2 * high:
            warnings.warn(
                f"this prior was trained with {low} to {high} neurons; what it draws for N = {N} is untested.",
                stacklevel=2,
            )
        source = as_generator(generator, self.device)
        J = sample(
            self.denoiser(family), (num, N, N), method=method,
            sigmas=weight_levels(N, steps, self.config.sigma_max), generator=source, device=self.device,
            progress=progress,
        )  # fmt: skip
        return scale * resolved(J, self.config, family, source)

    def save(self, path: str | Path, dtype: torch.dtype = torch.float32) -> Path:
        """Write the prior to one file, which appears when it is whole.

        Args:
            path: the file, NAME.safetensors.
            dtype: of the stored weights; float16 halves the file and rounds them to 3 digits.

        Raises:
            ValueError: another suffix.
            OSError: the file cannot be written.
        """
        return save_model(path, "prior", self.network, self.config, dtype)


def default_steps(N: int) -> int:
    """Noise levels of draws by a trained network: 28, of N > 50 neurons N/50 times as many."""
    return round(STEPS * max(1.0, N / STEPS_NEURONS))


def weight_levels(N: int, steps: int | None = None, sigma_max: float = 80.0) -> Tensor:
    """Noise levels of draws of weights, from σ_max to 0; shape (steps + 1,), float64.

    Beside the range in which all structure is decided they are dense between s = 4 and 1, too, where clusters are. The
    more neurons there are, the narrower is the range of each decision, so that there are more levels. Beside 160 levels
    |W| of multistep's draws of trained priors, from the same noise, is off by

        N     levels                      clusters         Dale's law       low rank         sparse
        50    28                          −0.43 ± 0.03 %   −0.35 ± 0.06 %   −0.01 ± 0.01 %   −0.16 ± 0.02 %
        50    40 of a flatter density     −0.13 ± 0.01 %   −0.06 ± 0.01 %   −0.01 ± 0.01 %   −0.040 ± 0.002 %
        100   56                          −0.09 ± 0.03 %   −0.05 ± 0.01 %   +0.00 ± 0.01 %   −0.006 ± 0.003 %

    A recording leaves less to decide. Given two trials of 100 times, and beside 128 levels, |W| of `base`'s draws of 50
    neurons by 28 is off by less than 0.1 %, of a posterior spread of 3 to 5 %.

    Args:
        N: neurons.
        steps: number of levels but 0; `default_steps(N)` unless given.
        sigma_max: the first.

    Raises:
        ValueError: fewer than two steps, or levels that do not fall.
    """
    return noise_levels(
        default_steps(N) if steps is None else steps, sigma_max, peaks=(DECIDED, CLUSTERED), elsewhere=UNDECIDED
    )


def load_prior(path: str | Path, device: torch.device | str = "cpu") -> DiffusionPrior:
    """Read a prior.

    Args:
        path: file or folder that `neurosde train prior` wrote, or the name of a prior that comes with neurosde.
        device: where to put the network.

    Raises:
        FileNotFoundError: no such file, and no prior of that name.
        ValueError: not a prior, or one of another format version; no such device.
    """
    return DiffusionPrior(*load_model(path, "prior", PriorConfig, device))
