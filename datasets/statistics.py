"""What a cube's networks say about their weights, and the unit in which weights are of order one.

Λ and B are those of `neurosde.likelihood`, for the noise, time constant and input that the cube gives each network:
log p(activity | W) = tr(BWᵀ) − ½ tr(WΛWᵀ) up to a constant. In units of s0 = g_rms/√N, the root mean square of a weight
in the cube's ensemble, W = s0 J and the same expression holds with J, s0²Λ and s0 B; a prior of variance 1 then fits at
every N.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from neurosde.datasets.ensembles import ENSEMBLES, Ensemble, make_ensemble
from neurosde.datasets.files import open_netcdf, spacing
from neurosde.likelihood import transition_statistics
from neurosde.rate_sde import Drive

PARAMETERS = ("input", "noise_std", "tau", "observed")  # of a network, that its statistics depend on


@dataclass(frozen=True)
class Experiment:
    """What is the same for all networks of a cube.

    Attributes:
        neurons: number of neurons N.
        dt: spacing of the samples, None where they are too few.
        drive: see `RateSDE`.
        ensemble: that the weights were drawn from; None where the cube does not tell.
        scale: s0, the root mean square of a weight in the ensemble; None where the cube does not tell.
        observation: what `neurosde observe` did to it, None if nothing.
    """

    neurons: int
    dt: float | None
    drive: Drive
    ensemble: Ensemble | None
    scale: float | None
    observation: str | None


def experiment(path: str | Path) -> Experiment:
    """Read what is the same for all networks from one file of a cube.

    s0 is that of the ensemble in the cube's configuration, gain mixtures included, or, where the configuration names
    none, the root mean square of the gains in this file over √N; N counts the neurons that went unseen, too.

    Raises:
        ValueError: the file is unreadable, or its times are not evenly spaced.
    """
    with open_netcdf(path) as cube:
        config = json.loads(str(cube.attrs.get("config", "{}")))
        N = cube.sizes["neuron"]
        dt = spacing(cube["time"].to_numpy(), path)
        gains = cube["gain"].to_numpy()
        observation = cube.attrs.get("observation")
    options = dict(config.get("ensemble") or {}) if isinstance(config.get("ensemble"), dict) else {}
    name = options.pop("name", None)
    ensemble = make_ensemble(name, **options) if name in ENSEMBLES else None
    built = int(config.get("N", N))
    variance = float(np.mean(gains**2)) / built if ensemble is None else ensemble.variance(built)
    scale = math.sqrt(variance) if math.isfinite(variance) and variance > 0 else None
    return Experiment(N, dt, config.get("drive", "scaled"), ensemble, scale, observation)


def network_statistics(
    common: Experiment,
    *,
    activity: Tensor | None = None,
    voltage: Tensor | None = None,
    input: Tensor,
    noise_std: float,
    tau: float,
    observed: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return Λ and B of one network.

    σ below what rounding of the recording looks like, σ = 0 included, is taken at that floor.

    Args:
        common: what is the same for all networks.
        activity: firing rate, shape (trial, time, neuron); not needed where voltage is given.
        voltage: h, same shape.
        input: constant input, shape (neuron,).
        noise_std: σ per √time.
        tau: time constant.
        observed: whether each neuron is recorded, shape (neuron,).

    Returns:
        Λ (pre, pre) and B (post, pre), float64.

    Raises:
        ValueError: hidden neurons, or activity that no statistics can be had from.
    """
    if common.dt is None:
        raise ValueError("statistics need at least two times; this cube has fewer.")
    if not bool((observed == 1).all()):
        raise ValueError(
            f"statistics need every neuron to be observed; {int((observed != 1).sum())} are hidden. Read activity."
        )
    found = transition_statistics(activity, common.dt, tau, voltage=voltage, input=input, drive=common.drive)
    return found.precision(max(noise_std, found.noise_floor))


def batch_statistics(
    common: Experiment, source: str, arrays: dict[str, np.ndarray], names: list[str]
) -> dict[str, Tensor]:
    """Λ and B of some networks.

    Args:
        common: what is the same for all networks.
        source: whether `activity` or `voltage` is what they are computed from.
        arrays: that variable and `PARAMETERS` of the cube, each with a leading axis of networks.
        names: what to call each network in errors.

    Returns:
        precision, Λ (network, pre, pre), and cross, B (network, post, pre), float64.

    Raises:
        ValueError: a network that has no statistics; the message names it.
    """
    shape = (len(names), common.neurons, common.neurons)
    precision, cross = torch.empty(shape, dtype=torch.float64), torch.empty(shape, dtype=torch.float64)
    for k, name in enumerate(names):
        try:
            precision[k], cross[k] = network_statistics(
                common,
                input=torch.from_numpy(arrays["input"][k]),
                noise_std=float(arrays["noise_std"][k]),
                tau=float(arrays["tau"][k]),
                observed=torch.from_numpy(arrays["observed"][k]),
                **{source: torch.from_numpy(arrays[source][k])},
            )
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return {"precision": precision, "cross": cross}
