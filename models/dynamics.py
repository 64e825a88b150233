"""What is not known of a recording beside its weights: the time constant τ and the noise σ, of each draw of W its own.

    p(W, τ, σ | x) = p(τ, σ | x) p(W | τ, σ, x),

where for the first factor that of a Gaussian prior of W is taken (`neurosde.models.empirical_bayes`), an approximation
for all others, and the second holds the recording's evidence as it is for this τ and σ. What is known of them is the
same in all draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from neurosde.likelihood import TransitionStatistics
from neurosde.models.edm import Evidence
from neurosde.models.empirical_bayes import sample_noise_scales, sample_time_constants
from neurosde.models.recorded import recording_evidence
from neurosde.time_constant import TimeConstantStatistics

Statistics = TransitionStatistics | TimeConstantStatistics


@dataclass(frozen=True)
class Dynamics:
    """τ and σ of each draw, float64, on the CPU.

    Attributes:
        tau: time constant, shape (draw,), of several recordings (draw, recording); NaN where the statistics are of a
            known one.
        noise_std: σ per √time, of the same shape.
    """

    tau: Tensor
    noise_std: Tensor

    def __len__(self) -> int:
        return len(self.tau)

    def squeezed(self) -> Dynamics:
        """Return those of one recording, shape (draw,)."""
        return Dynamics(self.tau.squeeze(-1), self.noise_std.squeeze(-1))


def draw_dynamics(
    recordings: Sequence[Statistics],
    count: int,
    gains: tuple[float, float],
    noise_std: float | None = None,
    generator: torch.Generator | None = None,
) -> Dynamics:
    """Draw τ and σ from their posterior, shape (count, recording).

    Args:
        recordings: sums over the transitions of each recording, for a known τ or for any of a range.
        count: number of draws.
        gains: range of the gain of the prior of W.
        noise_std: σ, where it is known; it is the floor of rounding at least.
        generator: of the draws.

    Raises:
        ValueError: a recording that is silent.
    """
    taus, sigmas = [], []
    for one in recordings:
        if isinstance(one, TimeConstantStatistics):
            tau, scales = sample_time_constants(one, count, gains, noise_std, generator)
            sigma = [one.at(float(t)).noise_std(float(s)) for t, s in zip(tau, scales, strict=True)]
        else:
            tau = torch.full((count,), torch.nan, dtype=torch.float64)
            if noise_std is None:
                sigma = [one.noise_std(float(s)) for s in sample_noise_scales(one, count, gains, generator)]
            else:
                sigma = [max(noise_std, one.noise_floor)] * count
        taus.append(tau)
        sigmas.append(torch.tensor(sigma, dtype=torch.float64))
    return Dynamics(torch.stack(taus, 1), torch.stack(sigmas, 1))


def evidence_given(recordings: Sequence[Statistics], dynamics: Dynamics) -> Evidence:
    """Evidence of recordings about W, in its units, for τ and σ of each draw, shape (draw, recording)."""
    each = []
    for one, taus, sigmas in zip(recordings, dynamics.tau.mT, dynamics.noise_std.mT, strict=True):
        if isinstance(one, TimeConstantStatistics):
            statistics = [one.at(float(tau)) for tau in taus]
            evidence = recording_evidence(statistics)
        else:
            statistics = [one] * len(dynamics)
            evidence = recording_evidence([one])[0].expand((len(dynamics),))
        scales = [at.noise_scale(float(sigma)) for at, sigma in zip(statistics, sigmas, strict=True)]
        each.append(evidence.over_noise(torch.tensor(scales, dtype=torch.float64).square()))
    vectors = [one.vectors for one in each if one.vectors is not None]
    return Evidence(
        torch.stack([one.eigenvalues for one in each], 1),
        torch.stack(vectors, 1),
        torch.stack([one.cross for one in each], 1),
    )
