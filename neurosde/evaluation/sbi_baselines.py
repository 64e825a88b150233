"""Amortised neural posterior estimators of sbi, as baselines: NPE (a masked autoregressive flow), NPSE and FMPE.

An estimator is trained on simulations of networks that an ensemble draws, σ and the recording's length known, with
sbi's default networks, training and sampling. It learns p(θ | features) of θ = W/s0, s0² the ensemble's variance.

What it is given favours it: the exact posterior for W_ij ~ N(0, s0²) (see `neurosde.models.gaussian_posterior`), which
is what the best linear method knows. Rows of W are independent there with one covariance C, so the features are the
posterior mean over s0, the logarithms of √C_jj/s0, and the correlations of C. They determine Λ and B of the recording,
so nothing is lost for any ensemble; sbi standardises them. Given the sums over transitions themselves, the estimators
have to learn to invert matrices, and do much worse.

References:
    sbi reloaded: a toolkit for simulation-based inference workflows (Boelts, Deistler, et al., 2025),
    https://doi.org/10.21105/joss.07754
    Masked autoregressive flow for density estimation (Papamakarios, Pavlakou, Murray, 2017),
    https://arxiv.org/abs/1705.07057
    Compositional score modeling for simulation-based inference (Geffner, Papamakarios, Mnih, 2023),
    https://arxiv.org/abs/2209.14249
    Flow matching for scalable simulation-based inference (Dax, Wildberger, et al., 2023),
    https://arxiv.org/abs/2305.17161
"""

from __future__ import annotations

import importlib
import io
import math
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Independent, Normal

from neurosde.brownian import as_seed
from neurosde.datasets.ensembles import Ensemble
from neurosde.likelihood import TransitionStatistics, transition_statistics
from neurosde.models.gaussian_posterior import GaussianPosterior
from neurosde.solve import simulate_rate_network
from neurosde.validation import check_count, check_positive, check_time_step, optional_package

SBI_METHODS = ("npe", "npse", "fmpe")
_TAU = 1.0
_SIMULATED = 2**22  # voltages held at a time
_SAMPLED = 2**16  # draws made at a time


def sbi_draws(
    method: str,
    ensemble: Ensemble,
    statistics: Sequence[TransitionStatistics],
    *,
    noise_std: float,
    dt: float,
    trials: int,
    T: int,
    simulations: int = 10_000,
    draws: int = 256,
    seed: int = 0,
    progress: bool = False,
) -> Float[Tensor, "recording draw post pre"]:
    """Train one of sbi's estimators on simulations, and draw weights from it for each of the recordings.

    Simulations begin at standard normal voltages, τ = 1. Training runs on the CPU until sbi finds it converged. No file
    is written and torch's global generator is left as it was.

    Args:
        method: npe, npse or fmpe.
        ensemble: prior over W, from which networks are drawn.
        statistics: of recordings like the simulated ones, each of one network; all of the same number of neurons.
        noise_std: σ per √time of simulations and recordings.
        dt: step, in units of τ.
        trials: trials per network.
        T: times per trial, the initial one included.
        simulations: networks to train on; sbi validates on a tenth of them.
        draws: draws of W per recording.
        seed: of networks, noise, training and draws; the networks are others than a generator of this seed draws.
        progress: show sbi's own progress, on a terminal.

    Returns:
        Draws of W, shape (recording, draw, post, pre), float64, in the unit of W.

    Raises:
        ValueError: unknown method, no statistics, or statistics that are not of such recordings.
        ImportError: sbi is not installed.
    """
    if method not in SBI_METHODS:
        raise ValueError(f"method must be one of {', '.join(SBI_METHODS)}; got {method!r}.")
    check_positive(noise_std, "noise_std")
    check_time_step(dt, _TAU)
    for value, name, least in ((trials, "trials", 1), (T, "T", 2), (draws, "draws", 1), (seed, "seed", 0)):
        check_count(value, name, least)
    check_count(simulations, "simulations", 20)
    _check_recordings(statistics, dt, trials, T)
    optional_package("sbi", "sbi")

    N = statistics[0].num_neurons
    variance = ensemble.variance(N)
    word = np.random.SeedSequence(seed, spawn_key=tuple(b"sbi")).generate_state(1, np.uint64)[0] >> np.uint64(1)
    generator = torch.Generator().manual_seed(int(word))
    theta, x = [], []
    for W, simulated in _simulations(ensemble, N, simulations, noise_std, dt, trials, T, generator):
        theta.append((W / math.sqrt(variance)).flatten(1))
        x.append(features(simulated, noise_std, variance))
    with _quietly(as_seed(generator), progress) as shown:
        posterior = _trained(method, torch.cat(theta).float(), torch.cat(x).float(), shown)
        found = _sampled(posterior, features(statistics, noise_std, variance).float(), draws, shown)
    return found.double().unflatten(-1, (N, N)) * math.sqrt(variance)


def features(
    statistics: Sequence[TransitionStatistics], noise_std: float, variance: float
) -> Float[Tensor, "recording feature"]:
    """Return what an estimator sees of recordings: mean, log standard deviations and correlations of exact posteriors.

    Args:
        statistics: of recordings of N neurons each.
        noise_std: σ per √time.
        variance: s0², that of the Gaussian prior on an entry of W.

    Returns:
        Shape (recording, N² + N + N (N − 1)/2), float64; the means and standard deviations in units of s0.
    """
    exact = [GaussianPosterior.from_statistics(one, noise_std, variance) for one in statistics]
    means = torch.stack([one.mean for one in exact]) / math.sqrt(variance)
    covariances = torch.stack([one.covariance for one in exact]) / variance
    sd = covariances.diagonal(dim1=-2, dim2=-1).sqrt()
    row, column = torch.triu_indices(sd.shape[1], sd.shape[1], offset=1)
    correlations = covariances[:, row, column] / (sd[:, row] * sd[:, column])
    return torch.cat([means.flatten(1), sd.log(), correlations], dim=1)


def _check_recordings(statistics: Sequence[TransitionStatistics], dt: float, trials: int, T: int) -> None:
    if not statistics:
        raise ValueError("statistics must be of at least one recording; got none.")
    sizes = sorted({one.num_neurons for one in statistics})
    if len(sizes) > 1:
        raise ValueError(f"statistics must be of one number of neurons; got {sizes}. Call once for each.")
    for k, one in enumerate(statistics):
        transitions = one.count + one.dropped
        alike = math.isclose(one.dt, dt) and math.isclose(one.gain, dt / _TAU) and not one.free_input
        if not alike or transitions != trials * (T - 1):
            raise ValueError(
                f"statistics must be of {trials} x {T} samples with dt = {dt}, tau = {_TAU:g} and no unknown input, as "
                f"simulations are; got {transitions} transitions, dt = {one.dt}, tau = {one.dt / one.gain:g}, "
                f"free_input = {one.free_input} for recording {k}."
            )


def _simulations(
    ensemble: Ensemble, N: int, count: int, noise_std: float, dt: float, trials: int, T: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, list[TransitionStatistics]]]:
    """Draw networks W (network, post, pre) and record them, some at a time."""
    block = max(1, _SIMULATED // (trials * T * N))
    for first in range(0, count, block):
        W = ensemble.sample_weights(min(block, count - first), N, generator)
        h0 = torch.randn(len(W), trials, N, generator=generator, dtype=torch.float64)
        _, h = simulate_rate_network(
            W.unsqueeze(1), h0, T, dt, _TAU, noise_std=noise_std, generator=generator, return_h=True
        )
        yield W, [transition_statistics(voltage=one, dt=dt, tau=_TAU) for one in h]


@contextmanager
def _quietly(seed: int, progress: bool) -> Iterator[bool]:
    """Seed sbi, which draws from torch's global generator, and keep its prints out of the output."""
    shown = progress and sys.stderr.isatty()
    output = redirect_stdout(sys.stderr if shown else io.StringIO())
    with torch.random.fork_rng(devices=[]), output, warnings.catch_warnings():
        # Means of sparse weights are far out on the scale of their quartiles, but not on that of their deviation.
        warnings.filterwarnings("ignore", "Data has extreme outliers", UserWarning)
        torch.default_generator.manual_seed(seed)
        yield shown


def _trained(method: str, theta: Tensor, x: Tensor, shown: bool) -> Any:
    """Train an estimator of θ (simulation, parameter) from x (simulation, feature), and return its posterior."""
    inference = importlib.import_module("sbi.inference")
    # An ensemble has no density, nor is one needed: all simulations are the prior's, and of the prior that sbi is told
    # only the support matters, outside of which draws would be rejected.
    anywhere = Independent(Normal(torch.zeros(theta.shape[1]), 1.0), 1)
    trainer = getattr(inference, method.upper())(anywhere, tracker=_NoTracker(), show_progress_bars=shown)
    estimator = trainer.append_simulations(theta, x).train()
    return trainer.build_posterior(estimator)


def _sampled(posterior: Any, x: Tensor, draws: int, shown: bool) -> Tensor:
    """Draw θ for each of x, shape (recording, draw, parameter)."""
    some = min(draws, _SAMPLED)
    found = [
        posterior.sample_batched((draws,), part, max_sampling_batch_size=some, show_progress_bars=shown)
        for part in x.split(max(1, _SAMPLED // some))
    ]
    return torch.cat(found, dim=1).transpose(0, 1)


class _NoTracker:
    """What sbi reports its training to, instead of the TensorBoard files that it would write."""

    log_dir: str | None = None

    def log_metric(self, name: str, value: float, step: int | None = None) -> None:
        """Forget it."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Forget them."""

    def log_params(self, params: dict[str, Any]) -> None:
        """Forget them."""

    def add_figure(self, name: str, figure: Any, step: int | None = None) -> None:
        """Forget it."""

    def flush(self) -> None:
        """Do nothing."""
