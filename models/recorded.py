"""The transitions of a recording, and their statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from neurosde.activation import Activation, get_activation
from neurosde.datasets.recordings import Recording
from neurosde.likelihood import Transitions, TransitionStatistics, transition_statistics, transitions
from neurosde.models.edm import Evidence
from neurosde.time_constant import TimeConstantStatistics, time_constant_statistics


def recording_statistics(recording: Recording, *, estimate_input: bool = False) -> TransitionStatistics:
    """Statistics of a recording whose dt, tau and drive are settled."""
    statistics = transition_statistics(**_settings(recording))
    return statistics.without_input() if estimate_input else statistics


def recording_time_constants(
    recording: Recording, tau: tuple[float, float], *, estimate_input: bool = False
) -> TimeConstantStatistics:
    """Statistics of a recording whose dt and drive are settled, for time constants of a range."""
    statistics = time_constant_statistics(**(_settings(recording) | {"tau": tau}))
    return statistics.without_input() if estimate_input else statistics


def recording_transitions(recording: Recording) -> Iterator[Transitions]:
    """Transitions of a recording whose dt, tau and drive are settled."""
    return transitions(**_settings(recording))


def recorded_voltage(
    recording: Recording, phi: str | Callable[[Tensor], Tensor] | Activation = "tanh"
) -> tuple[Tensor, Tensor, Tensor | None]:
    """States of a recording whose dt, tau and drive are settled.

    Args:
        recording: the recording.
        phi: the nonlinearity; must be invertible if the voltage was not recorded.

    Returns:
        Voltage (trial, time, neuron) in float64, which transitions have it known well enough (trial, time − 1), see
        `neurosde.likelihood`, and the known input (trial, time, neuron) or None.

    Raises:
        ValueError: a recording that cannot be used.
    """
    trials, samples, N = recording.activity.shape
    good = torch.cat([one.good for one in transitions(**_settings(recording), phi=phi)]).view(trials, samples - 1)
    if recording.voltage is not None:
        voltage = torch.as_tensor(recording.voltage).double()
    else:
        inverse = get_activation(phi).inverse
        assert inverse is not None
        voltage = inverse(torch.as_tensor(recording.activity).double())
    known = recording.input
    current = None if known is None else torch.as_tensor(known).double()
    if current is not None:
        current = (current if current.ndim > 1 else current[None]).expand(trials, samples, N)
    return voltage, good, current


def recording_evidence(statistics: Sequence[TransitionStatistics]) -> Evidence:
    """Evidence of recordings of as many neurons, were the noise of a transition 1; see `Evidence.over_noise`."""
    eigenvalues, vectors, cross = zip(*(one.spectrum() for one in statistics), strict=True)
    return Evidence(torch.stack(eigenvalues), torch.stack(vectors), torch.stack(cross))


def _settings(recording: Recording) -> dict[str, Any]:
    if recording.dt is None or recording.tau is None or recording.drive is None:
        raise ValueError(f"{recording.source} has no dt, tau or drive; settle them with merge_settings.")
    names = ("activity", "dt", "tau", "voltage", "input", "drive")
    return {name: getattr(recording, name) for name in names}
