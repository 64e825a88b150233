"""The transitions of a recording, and their statistics."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

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


def recording_evidence(statistics: Sequence[TransitionStatistics]) -> Evidence:
    """Evidence of recordings of as many neurons, were the noise of a transition 1; see `Evidence.over_noise`."""
    eigenvalues, vectors, cross = zip(*(one.spectrum() for one in statistics), strict=True)
    return Evidence(torch.stack(eigenvalues), torch.stack(vectors), torch.stack(cross))


def _settings(recording: Recording) -> dict[str, Any]:
    if recording.dt is None or recording.tau is None or recording.drive is None:
        raise ValueError(f"{recording.source} has no dt, tau or drive; settle them with merge_settings.")
    names = ("activity", "dt", "tau", "voltage", "input", "drive")
    return {name: getattr(recording, name) for name in names}
