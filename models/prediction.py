"""What the draws of an inference would have done: activity simulated from the recorded initial states.

Where the constant input is estimated it is I = ȳ − W x̄ + s ξ/√n, with ȳ and x̄ the means over the n transitions and s
their noise: each draw of W has a draw of I.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from neurosde.datasets.recordings import Recording
from neurosde.likelihood import TransitionStatistics
from neurosde.models.gaussian_posterior import GaussianPosterior
from neurosde.models.inference_config import InferenceConfig
from neurosde.solve import simulate_rate_network

PREDICTIVE_BYTES = 2**28  # of simulated activity kept in memory and in the posterior file


def kept_draws(recording: Recording, wanted: int) -> int:
    """How many of the draws that are wanted are simulated and kept, to bound the memory."""
    return min(wanted, PREDICTIVE_BYTES // (4 * recording.activity.size))


def predict(
    recording: Recording,
    statistics: TransitionStatistics,
    noise_std: float,
    mean: Tensor,
    W: Tensor,
    config: InferenceConfig,
    generator: torch.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Simulate what each draw would have done from the recorded initial states; float32 (draw, trial, time, neuron)."""
    assert recording.dt is not None and recording.tau is not None and recording.drive is not None
    trials, samples, N = recording.activity.shape
    if recording.voltage is None:
        h0 = torch.atanh(torch.as_tensor(recording.activity[:, 0], dtype=torch.float64))
    else:
        h0 = torch.as_tensor(recording.voltage[:, 0], dtype=torch.float64)
    known = torch.zeros(N) if recording.input is None else torch.as_tensor(recording.input)
    constant = known.double().numpy() if known.ndim == 1 else np.zeros(N)
    current = (known[None, None] if known.ndim == 1 else known.expand(trials, samples, N)).double().unsqueeze(0)
    if config.estimate_input:
        mean_x, mean_y = statistics.x / statistics.count, statistics.y / statistics.count
        constant = constant + (mean_y - mean @ mean_x).numpy()
        spread = statistics.noise_scale(noise_std) / math.sqrt(statistics.count)
        offset = mean_y - W @ mean_x + spread * torch.randn(len(W), N, generator=generator, dtype=torch.float64)
        current = current + offset[:, None, None]
    predicted = np.empty((len(W), trials, samples, N), dtype=np.float32)
    with torch.no_grad():
        for one, weights in enumerate(W):  # one at a time: memory holds one draw's path beside what is kept
            x = simulate_rate_network(
                weights,
                h0,
                samples,
                recording.dt,
                recording.tau,
                current[one if len(current) > 1 else 0].expand(trials, -1, N),
                noise_std,
                drive=recording.drive,
                generator=generator,
            )
            predicted[one] = x.numpy()
    return constant, predicted


def input_spread(statistics: TransitionStatistics, posterior: GaussianPosterior) -> float:
    """I = ȳ − W x̄ + s ξ/√n: of the mean of the noise, and of W along the mean rates."""
    mean_x = statistics.x / statistics.count
    of_noise = statistics.noise_scale(posterior.noise_std) ** 2 / statistics.count
    return math.sqrt(of_noise + float((mean_x @ posterior.factor).square().sum()))
