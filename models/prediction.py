"""What the draws of an inference would have done: activity simulated from the recorded initial states.

Where the constant input is estimated it is I = ȳ − W x̄ + s ξ/√n, with ȳ and x̄ the means over the n transitions and s
their noise: each draw of W has a draw of I. A draw that has a time constant and noise of its own is simulated with
them.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from neurosde.datasets.recordings import Recording
from neurosde.likelihood import TransitionStatistics
from neurosde.models.dynamics import Dynamics
from neurosde.models.gaussian_posterior import GaussianPosterior
from neurosde.models.inference_config import InferenceConfig
from neurosde.solve import simulate_rate_network
from neurosde.time_constant import TimeConstantStatistics

PREDICTIVE_BYTES = 2**28  # of simulated activity kept in memory and in the posterior file


def kept_draws(recording: Recording, wanted: int) -> int:
    """How many of the draws that are wanted are simulated and kept, to bound the memory."""
    return min(wanted, PREDICTIVE_BYTES // (4 * recording.activity.size))


def predict(
    recording: Recording,
    statistics: TransitionStatistics,
    of_any_tau: TimeConstantStatistics | None,
    noise_std: float,
    mean: Tensor,
    W: Tensor,
    dynamics: Dynamics | None,
    config: InferenceConfig,
    generator: torch.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Simulate what each draw would have done from the recorded initial states.

    Args:
        recording: the recording, with dt, tau and drive settled.
        statistics: sums over its transitions.
        of_any_tau: the same for any time constant, where it is not known.
        noise_std: σ, of draws that have none of their own.
        mean: the estimate of W (post, pre).
        W: draws (draw, post, pre).
        dynamics: τ and σ of each draw, and maybe of more draws, or None.
        config: the settings.
        generator: of the noise.

    Returns:
        Constant input (neuron,), known or estimated; and rates, float32 (draw, trial, time, neuron).
    """
    assert recording.dt is not None and recording.tau is not None and recording.drive is not None
    trials, samples, N = recording.activity.shape
    if recording.voltage is None:
        h0 = torch.atanh(torch.as_tensor(recording.activity[:, 0], dtype=torch.float64))
    else:
        h0 = torch.as_tensor(recording.voltage[:, 0], dtype=torch.float64)
    known = torch.zeros(N) if recording.input is None else torch.as_tensor(recording.input)
    constant = known.double().numpy() if known.ndim == 1 else np.zeros(N)
    known = (known[None, None] if known.ndim == 1 else known.expand(trials, samples, N)).double()
    if config.estimate_input:
        constant = constant + _input_given(mean, statistics).numpy()
    noise = torch.randn(len(W), N, generator=generator, dtype=torch.float64) if config.estimate_input else None
    predicted = np.empty((len(W), trials, samples, N), dtype=np.float32)
    with torch.no_grad():
        for one, weights in enumerate(W):  # one at a time: memory holds one draw's path beside what is kept
            tau, sigma, current, of_draw = recording.tau, noise_std, known, statistics
            if dynamics is not None:
                sigma = float(dynamics.noise_std[one])
                if of_any_tau is not None:
                    tau = float(dynamics.tau[one])
                    of_draw = of_any_tau.at(tau)
            if noise is not None:
                spread = of_draw.noise_scale(sigma) / math.sqrt(of_draw.count)
                current = current + _input_given(weights, of_draw) + spread * noise[one]
            x = simulate_rate_network(
                weights,
                h0,
                samples,
                recording.dt,
                tau,
                current.expand(trials, -1, N),
                sigma,
                drive=recording.drive,
                generator=generator,
            )
            predicted[one] = x.numpy()
    return constant, predicted


def _input_given(W: Tensor, statistics: TransitionStatistics) -> Tensor:
    """Mean of the constant input given W, ȳ − W x̄."""
    return (statistics.y - W @ statistics.x) / statistics.count


def input_spread(statistics: TransitionStatistics, posterior: GaussianPosterior) -> float:
    """Return the sd of a neuron's I = ȳ − W x̄ + s ξ/√n: of the mean noise, and of W along the mean rates."""
    mean_x = statistics.x / statistics.count
    of_noise = statistics.noise_scale(posterior.noise_std) ** 2 / statistics.count
    return math.sqrt(of_noise + float((mean_x @ posterior.factor).square().sum()))
