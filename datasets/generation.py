"""Activity of networks: repeated trials of one, and blocks of an ensemble.

Network k of a dataset depends on the root seed and on k alone. Its weights and its dynamics have a generator each,
spawned by numpy's SeedSequence, so any block can be made anywhere, in any order and on any engine.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from neurosde.brownian import BrownianPath, as_generator
from neurosde.datasets.ensembles import Ensemble
from neurosde.engines import EngineName
from neurosde.rate_sde import Drive
from neurosde.solve import simulate_rate_network
from neurosde.validation import as_float_tensor, check_count, check_positive, check_square


def generate_activity_trials(
    W: Tensor | ArrayLike,
    num_trials: int,
    T: int,
    dt: float,
    tau: float = 1.0,
    *,
    input: Tensor | ArrayLike | None = None,
    noise_std: float = 0.0,
    initial_std: float = 1.0,
    burn_in: int = 0,
    drive: Drive = "scaled",
    engine: EngineName = "auto",
    generator: int | torch.Generator | None = None,
    return_h: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Simulate independent trials of one network, from random initial voltages.

    Args:
        W: weights (post, pre), shape (neuron, neuron).
        num_trials: number of trials.
        T: number of times kept of each.
        dt: step, in the unit of tau.
        tau: time constant.
        input: external input, constant (neuron,) or time-varying (burn_in + T, neuron).
        noise_std: σ per √time.
        initial_std: standard deviation of the initial voltage.
        burn_in: number of steps simulated and dropped before the first time kept.
        drive: see `RateSDE`.
        engine: see `sdeint`.
        generator: seed or generator of initial states and noise.
        return_h: also return the voltage.

    Returns:
        activity: firing rate, shape (trial, time, neuron); with `return_h`, also the voltage in the same shape.

    Raises:
        ValueError: W not square, counts or steps not positive, shapes that do not fit.
    """
    weights = as_float_tensor(W, "W")
    check_square(weights.shape, "W")
    if weights.ndim != 2:
        raise ValueError(f"W must be one (post, pre) matrix; got shape {tuple(weights.shape)}.")
    num_trials, burn_in = check_count(num_trials, "num_trials"), check_count(burn_in, "burn_in", 0)
    length = check_count(T, "T") + burn_in
    check_positive(initial_std, "initial_std", zero_ok=True)
    source = as_generator(generator, "cpu")
    h0 = initial_std * torch.randn(num_trials, len(weights), generator=source, dtype=weights.dtype)
    current = None if input is None else as_float_tensor(input, "input", like=weights)
    if current is not None and current.ndim == 2:
        current = current.expand(num_trials, *current.shape)
    x, h = simulate_rate_network(
        weights, h0.to(weights.device), length, dt, tau, current, noise_std,
        return_h=True, drive=drive, engine=engine, generator=source,
    )  # fmt: skip
    kept = slice(burn_in, None)
    return (x[:, kept], h[:, kept]) if return_h else x[:, kept]


@dataclass(frozen=True)
class NetworkBlock:
    """Networks first … first + B − 1 of a dataset, as arrays in the cube's order.

    Attributes:
        first: index of the first network.
        weights: (network, post, pre), float32.
        activity: (network, trial, time, neuron), float32.
        voltage: the same shape, or None.
        initial_state: voltage at the first time, (network, trial, neuron).
        gain: (network,).
        seed: seed of each network's dynamics, (network,).
        cell_type: (network, neuron).
        block: (network, neuron).
        input: constant external input, (network, neuron).
    """

    first: int
    weights: np.ndarray
    activity: np.ndarray
    voltage: np.ndarray | None
    initial_state: np.ndarray
    gain: np.ndarray
    seed: np.ndarray
    cell_type: np.ndarray
    block: np.ndarray
    input: np.ndarray


def network_seeds(root_seed: int, k: int) -> tuple[int, int]:
    """Seeds of the weights and of the dynamics of network k."""
    words = np.random.SeedSequence(root_seed, spawn_key=(k,)).generate_state(2, np.uint64)
    return int(words[0] >> np.uint64(1)), int(words[1] >> np.uint64(1))  # 63 bits: they are stored as int64


def generate_block(
    ensemble: Ensemble,
    first: int,
    count: int,
    *,
    root_seed: int,
    N: int,
    num_trials: int,
    T: int,
    dt: float,
    tau: float,
    noise_std: float,
    initial_std: float,
    burn_in: int,
    input_std: float,
    drive: Drive,
    engine: EngineName,
    voltage: bool,
) -> NetworkBlock:
    """Draw and simulate networks first … first + count − 1 in one batched call; see `DatasetConfig` for the rest."""
    seeds = [network_seeds(root_seed, k) for k in range(first, first + count)]
    draws = [ensemble.sample(N, torch.Generator().manual_seed(weights_seed)) for weights_seed, _ in seeds]
    steps = burn_in + T - 1
    h0 = torch.empty(count, num_trials, N)
    current = torch.zeros(count, 1, N)
    noise = torch.empty(steps, count, num_trials, N) if noise_std > 0 else None
    for row, (_, dynamics_seed) in enumerate(seeds):
        generator = torch.Generator().manual_seed(dynamics_seed)
        h0[row] = initial_std * torch.randn(num_trials, N, generator=generator)
        if input_std > 0:
            current[row] = input_std * torch.randn(1, N, generator=generator)
        if noise is not None:
            noise[:, row] = BrownianPath.sample((num_trials, N), steps, dt, generator=generator).increments
    weights = torch.stack([draw.weights for draw in draws]).float()
    simulate = partial(
        simulate_rate_network, weights.unsqueeze(1), h0, steps + 1, dt, tau, current if input_std > 0 else None,
        noise_std, drive=drive, engine=engine, bm=None if noise is None else BrownianPath(noise, dt),
    )  # fmt: skip
    with torch.no_grad():
        x, h = simulate(return_h=True) if voltage or burn_in > 0 else (simulate(), None)
    return NetworkBlock(
        first=first,
        weights=weights.numpy(),
        activity=x[..., burn_in:, :].numpy(),
        voltage=h[..., burn_in:, :].numpy() if voltage and h is not None else None,
        initial_state=(h0 if h is None else h[..., burn_in, :]).numpy(),
        gain=np.array([draw.gain for draw in draws]),
        seed=np.array([dynamics_seed for _, dynamics_seed in seeds], dtype=np.int64),
        cell_type=torch.stack([draw.cell_type for draw in draws]).numpy(),
        block=torch.stack([draw.block for draw in draws]).numpy(),
        input=current.squeeze(1).numpy(),
    )
