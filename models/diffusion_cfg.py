"""The posterior over weights given a recording, by a denoiser that was trained once on recordings of many networks.

A recording enters through Λ and B alone (`neurosde.likelihood`), which say all about W that it says where σ is known.
They are folded into the denoiser (`neurosde.models.edm`): what a Gaussian prior would make of the recording is exact,
and the network adds what the ensembles that it was trained on have beyond a Gaussian. Where weights are told to be
Gaussian, of the range of gains that it was trained on, that is nothing but the gain, over which the mean is taken in
closed form, without the network; and where they are told to obey Dale's law or to be sparse, the prior without a
recording is known in closed form, too (`neurosde.models.conditioned_denoiser`). Weights are measured by s₀ = ĝ/√N,
where ĝ is the gain that is told or else the one that the recording makes most probable: a function of the recording, so
that nothing is approximated by it. Draws of ensembles whose conditionals are known end with sweeps of Gibbs sampling,
which mend what the network is wrong about given the structure that it found (`neurosde.models.closing`).

σ is known, or drawn anew for each draw of W from its own posterior, for a Gaussian prior of W.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from neurosde.datasets.recordings import Recording, merge_settings, read_recording
from neurosde.likelihood import TransitionStatistics
from neurosde.models.denoiser import PairNetwork
from neurosde.models.diffusion_prior import PriorConfig
from neurosde.models.dynamics import Statistics
from neurosde.models.model_files import load_model, save_model
from neurosde.models.recorded import recording_statistics, recording_time_constants
from neurosde.models.weight_posterior import WeightPosterior
from neurosde.time_constant import TimeConstantStatistics
from neurosde.validation import check_positive

Observed = Recording | Statistics | str | Path


@dataclass(frozen=True)
class PosteriorConfig(PriorConfig):
    """What a posterior is, apart from its weights; see `PriorConfig`.

    Attributes:
        gains: smallest and largest root mean square gain √(N E W²) of the networks it was trained on.
    """

    gains: tuple[float, float] = (0.1, 10.0)


class CFGPosterior:
    """Posteriors over the weights of any number of neurons, given recordings of them.

    Args:
        network: the pair network.
        config: what it was trained for.
    """

    def __init__(self, network: PairNetwork, config: PosteriorConfig) -> None:
        self.network = network.eval()
        self.config = config

    @classmethod
    def from_pretrained(cls, path: str | Path = "base", device: torch.device | str = "cpu") -> CFGPosterior:
        """Read a trained posterior.

        Args:
            path: name of one that comes with neurosde, or file or folder that `neurosde train cfg` wrote.
            device: where to put the network.

        Raises:
            FileNotFoundError: no such file, and none of that name.
            ValueError: not a posterior, or one of another format version; no such device.
        """
        return cls(*load_model(path, "posterior", PosteriorConfig, device))

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.network.parameters()).device

    @property
    def families(self) -> tuple[str, ...]:
        """Names of the ensembles that it knows."""
        return self.config.network.families

    def save(self, path: str | Path, dtype: torch.dtype = torch.float32) -> Path:
        """Write it to one file, NAME.safetensors, which appears when it is whole.

        Raises:
            ValueError: another suffix.
            OSError: the file cannot be written.
        """
        return save_model(path, "posterior", self.network, self.config, dtype)

    def condition(
        self,
        recording: Observed | Sequence[Observed],
        *,
        noise_std: float | None = None,
        gain: float | None = None,
        family: str | None = None,
        tau: tuple[float, float] | None = None,
        estimate_input: bool = False,
    ) -> WeightPosterior:
        """Return the posterior given a recording.

        Args:
            recording: a recording with its dt, the path of one, or the statistics of its transitions; or several, of
                other networks of as many neurons.
            noise_std: σ per √time; None draws it from its posterior.
            gain: root mean square gain, √(N E W²), where it is known.
            family: name of the ensemble, where it is known.
            tau: range of the time constant, where it is not known: each draw has its own, drawn from its posterior. For
                recordings only, not for statistics, and in the unit of their dt.
            estimate_input: an unknown constant input drives each neuron (where no statistics are given).

        Raises:
            FileNotFoundError: no such file.
            ValueError: recordings of different numbers of neurons, an unknown family, numbers out of range, or a
                recording that is silent.
        """
        if alone := isinstance(recording, Recording | TransitionStatistics | TimeConstantStatistics | str | Path):
            statistics = [_statistics(recording, tau, estimate_input)]
        else:
            statistics = [_statistics(one, tau, estimate_input) for one in recording]
        sizes = {one.num_neurons for one in statistics}
        if len(sizes) != 1:
            raise ValueError(f"recordings must be of networks of one size; got {sorted(sizes)} neurons.")
        if family is not None and family not in self.families:
            raise ValueError(f"family must be one of {sorted(self.families)}; got {family!r}.")
        if noise_std is not None:
            check_positive(noise_std, "noise_std", zero_ok=True)
        if gain is not None:
            check_positive(gain, "gain")
        return WeightPosterior(self, statistics, noise_std, gain, family, not alone)


def _statistics(one: Observed, tau: tuple[float, float] | None, estimate_input: bool) -> Statistics:
    if isinstance(one, TransitionStatistics | TimeConstantStatistics):
        if tau is not None:
            raise ValueError("tau is for recordings; statistics have their own. See neurosde.time_constant.")
        return one
    recording = one if isinstance(one, Recording) else read_recording(one)
    if tau is not None and recording.tau is not None:
        raise ValueError(f"{recording.source} says tau = {recording.tau:.6g}; leave the range of tau out.")
    recording = merge_settings(recording, dt=None, tau=None, drive=None)
    if tau is None:
        return recording_statistics(recording, estimate_input=estimate_input)
    return recording_time_constants(recording, tau, estimate_input=estimate_input)
