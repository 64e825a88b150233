"""CURBD's data-constrained recurrent network: J trained until a rate network makes the recorded activity itself.

The network is the one of `RateSDE`, driven by slow noise instead of by the recording's own,

    τ dh/dt = −h + J r + u(t),   r = φ(h),      τ_u du/dt = −u + u₀ √(2τ_u) η(t),

from the recording's first sample on. At every sample J is moved against the error e = r − x by recursive least squares,
which also keeps P, the running estimate of the inverse of Σ r rᵀ:

    P ← P − c (P r)(P r)ᵀ,   c = 1/(1 + rᵀP r),      J ← J − c e (P r)ᵀ,      P = α I at the start.

Passes over the recording are repeated. What is fitted is activity, and many J make the same activity: a high explained
variance is no evidence that J is near the W that made the recording. The published method rescales activity to at most
1; rates of tanh networks are below 1 already and are taken as they are, so that J is in units of W.

References:
    Inferring brain-wide interactions using data-constrained recurrent neural network models (Perich, Arlt, Soares, et
    al., 2021), https://doi.org/10.1101/2020.12.18.423348
    Generating coherent patterns of activity from chaotic neural networks (Sussillo, Abbott, 2009),
    https://doi.org/10.1016/j.neuron.2009.07.018
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor
from tqdm import tqdm

from neurosde.likelihood import as_trials
from neurosde.validation import check_count, check_positive, check_time_step


@dataclass(frozen=True)
class CURBDSettings:
    """How the network is trained.

    Attributes:
        passes: over the recording.
        substeps: steps of the network from sample to sample.
        gain: of the weights that training starts from, N(0, gain²/N).
        learning_rate: α, the inverse of what Σ r rᵀ is taken for at the start.
        noise: standard deviation u₀ of the input noise.
        noise_tau: its time constant, in units of τ.
        seed: of weights and noise.
    """

    passes: int = 100
    substeps: int = 1
    gain: float = 1.5
    learning_rate: float = 1.0
    noise: float = 0.01
    noise_tau: float = 10.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_count(self.passes, "passes")
        check_count(self.substeps, "substeps")
        for name in ("gain", "noise"):
            check_positive(getattr(self, name), name, zero_ok=True)
        for name in ("learning_rate", "noise_tau"):
            check_positive(getattr(self, name), name)


@dataclass(frozen=True)
class CURBDFit:
    """A trained network.

    Attributes:
        weights: J (post, pre), shape (neuron, neuron), float64.
        explained_variance: 1 − Σ(r − x)²/Σ(x − mean x)² of each pass, J learning meanwhile, shape (pass,).
        free_explained_variance: the same of a last pass in which J does not learn.
    """

    weights: np.ndarray
    explained_variance: np.ndarray
    free_explained_variance: float


def curbd(
    activity: ArrayLike | Tensor, dt: float = 0.1, tau: float = 1.0, settings: CURBDSettings | None = None
) -> CURBDFit:
    """Train a tanh network to make the recorded activity.

    Args:
        activity: firing rate, in (−1, 1), shape (time, neuron) or (trial, time, neuron); the network starts every trial
            from its first sample.
        dt: spacing of the samples.
        tau: time constant.
        settings: of the training; None takes those of `CURBDSettings`.

    Raises:
        ValueError: wrong shapes, NaN, rates outside of (−1, 1), or activity that is constant.

    References:
        Inferring brain-wide interactions using data-constrained recurrent neural network models (Perich, Arlt, Soares,
        et al., 2021), https://doi.org/10.1101/2020.12.18.423348
    """
    s = settings or CURBDSettings()
    step = check_time_step(dt, check_positive(tau, "tau")) / s.substeps
    x = as_trials(activity, "activity").double().numpy()
    if np.abs(x).max() >= 1:
        raise ValueError(f"activity must lie in (-1, 1), as that of a tanh network; got |x| up to {np.abs(x).max()}.")
    total = ((x - x.mean((0, 1))) ** 2).sum()
    if total == 0:
        raise ValueError("activity is constant: there is nothing to fit.")
    trials, samples, N = x.shape
    rng = np.random.default_rng(s.seed)
    J = s.gain / math.sqrt(N) * rng.standard_normal((N, N))
    P = s.learning_rate * np.eye(N)
    noise = _filtered_noise(rng, (trials, (samples - 1) * s.substeps, N), step / (s.noise_tau * tau), s.noise)
    explained = np.empty(s.passes + 1)
    for k in tqdm(range(s.passes + 1), unit="pass", disable=None):
        error = 0.0
        for trial in range(trials):
            h = np.arctanh(x[trial, 0])
            for t in range(samples - 1):
                for n in range(t * s.substeps, (t + 1) * s.substeps):
                    h = h + step / tau * (J @ np.tanh(h) - h + noise[trial, n])
                r = np.tanh(h)
                e = r - x[trial, t + 1]
                error += e @ e
                if k < s.passes:
                    gains = P @ r
                    c = 1 / (1 + r @ gains)
                    P -= np.outer(c * gains, gains)
                    J -= np.outer(c * e, gains)
        explained[k] = 1 - error / total
    return CURBDFit(J, explained[:-1], float(explained[-1]))


def _filtered_noise(rng: np.random.Generator, shape: tuple[int, ...], ratio: float, amplitude: float) -> np.ndarray:
    """Stationary Ornstein–Uhlenbeck noise (trial, step, neuron); `ratio` is its step over its time constant."""
    decay = math.exp(-ratio)
    noise = amplitude * rng.standard_normal(shape)
    for t in range(1, shape[1]):
        noise[:, t] = decay * noise[:, t - 1] + math.sqrt(1 - decay**2) * noise[:, t]
    return noise
