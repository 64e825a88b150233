"""Activity of one network: repeated trials from random initial states."""

from __future__ import annotations

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from neurosde.brownian import as_generator
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
