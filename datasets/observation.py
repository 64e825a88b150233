"""What an experiment would have seen: fewer neurons, noise, slow indicators and coarse times.

`observe` takes these steps, always in this order, each only if asked for:

1. **Subsampling.** Some neurons are kept, the same ones of every network; the others are not recorded. Of the true
   weights W[i, j] between kept neurons remain, and `observed`, `cell_type`, … stay aligned with them. The coordinates
   `neuron`, `post` and `pre` keep the numbers that the neurons had.
2. **Noise.** y[t] = x[t] + s ξ[t], ξ ~ N(0, 1) independent for every sample.
3. **Calcium-like filter.** First-order exponential with decay time τ_c: c[t] = a c[t−1] + (1 − a) y[t] with
   a = exp(−dt/τ_c), started at its steady state, c[0] = y[0]. An impulse of height 1 at t ≥ 1 answers with (1 − a) aᵏ
   after k steps; a constant stays what it is.
4. **Binning.** The mean of every n successive samples, at the mean of their times; left-over samples at the end go.

For another order observe twice: what was done is kept in a list. Steps 2 to 4 leave no voltage behind, since what is
seen is no longer a function of it.

References:
    Fast nonnegative deconvolution for spike train inference from population calcium imaging (Vogelstein et al., 2010),
    https://doi.org/10.1152/jn.01073.2009 (the filter)
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, replace
from typing import Any, overload

import numpy as np
import xarray as xr

from neurosde.datasets.files import spacing
from neurosde.datasets.recordings import Recording
from neurosde.validation import check_count, check_positive

_NEURON_DIMS = ("neuron", "post", "pre")


@dataclass(frozen=True)
class Observation:
    """What of a network's activity is seen, and how well."""

    fraction: float | None = field(default=None, metadata={"help": "share of the neurons to keep, drawn at random"})
    neurons: tuple[int, ...] | None = field(default=None, metadata={"help": "positions of the neurons to keep"})
    noise: float = field(default=0.0, metadata={"help": "standard deviation of the noise of each sample"})
    decay_time: float | None = field(default=None, metadata={"help": "decay time of a calcium-like filter, as dt"})
    bin_size: int = field(default=1, metadata={"help": "samples that are averaged into one"})
    seed: int = field(default=0, metadata={"help": "seed of the choice of neurons and of the noise"})

    def __post_init__(self) -> None:
        if self.fraction is not None and self.neurons is not None:
            raise ValueError("fraction and neurons both say which neurons to keep; give one of them.")
        if self.fraction is not None and not 0 < check_positive(self.fraction, "fraction") <= 1:
            raise ValueError(f"fraction must lie above 0 and at most at 1; got {self.fraction}.")
        if self.neurons is not None:
            if not self.neurons or len(set(self.neurons)) != len(self.neurons):
                raise ValueError(f"neurons must be different positions, at least one; got {self.neurons}.")
            for position in self.neurons:
                check_count(position, "neurons", 0)
        check_positive(self.noise, "noise", zero_ok=True)
        if self.decay_time is not None:
            check_positive(self.decay_time, "decay_time")
        check_count(self.bin_size, "bin_size")
        check_count(self.seed, "seed", 0)

    @property
    def changes_samples(self) -> bool:
        """Whether rates are changed, and not only left out."""
        return self.noise > 0 or self.decay_time is not None or self.bin_size > 1

    def kept(self, N: int) -> np.ndarray:
        """Positions of the neurons that are kept, of N.

        Raises:
            ValueError: one is beyond N.
        """
        if self.neurons is not None:
            if max(self.neurons) >= N:
                raise ValueError(f"neurons must lie between 0 and {N - 1}; got {max(self.neurons)}.")
            return np.array(self.neurons)
        if self.fraction is None:
            return np.arange(N)
        count = max(1, round(self.fraction * N))
        return np.sort(np.random.default_rng(self.seed).choice(N, count, replace=False))

    def rates(self, activity: np.ndarray, dt: float | None, network: int) -> np.ndarray:
        """Add noise to rates of neurons that are kept, filter them and bin them.

        Args:
            activity: firing rate, shape (…, time, neuron).
            dt: spacing of the samples, needed by the filter.
            network: index of the network; with the seed it says which noise.

        Returns:
            What is seen, shape (…, time / bin_size, neuron), in the dtype of `activity`.

        Raises:
            ValueError: fewer than two bins, or a filter without dt.
        """
        seen = activity.astype(np.float64)
        if self.noise > 0:
            generator = np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(network,)))
            seen += self.noise * generator.standard_normal(seen.shape)
        if self.decay_time is not None:
            if dt is None:
                raise ValueError("decay_time takes recordings that say how far their samples are apart; give them dt.")
            seen = exponential_filter(seen, math.exp(-dt / self.decay_time))
        return bin_means(seen, self.bin_size, axis=-2).astype(activity.dtype)


def exponential_filter(samples: np.ndarray, decay: float) -> np.ndarray:
    """Filter c[t] = a c[t−1] + (1 − a) y[t] with c[0] = y[0].

    Args:
        samples: y, shape (…, time, neuron).
        decay: a, between 0 and 1.

    Returns:
        c, same shape.
    """
    filtered = np.array(samples, dtype=np.float64)
    for t in range(1, samples.shape[-2]):
        filtered[..., t, :] = decay * filtered[..., t - 1, :] + (1 - decay) * samples[..., t, :]
    return filtered


def bin_means(samples: np.ndarray, size: int, axis: int = -1) -> np.ndarray:
    """Average every `size` successive samples along an axis; left-over samples at its end are dropped.

    Raises:
        ValueError: fewer than two bins.
    """
    if size == 1:
        return samples
    axis %= samples.ndim
    count = samples.shape[axis] // size
    if count < 2:
        raise ValueError(f"bin_size must leave at least two bins of {samples.shape[axis]} samples; got {size}.")
    head, tail = samples.shape[:axis], samples.shape[axis + 1 :]
    whole = samples[(slice(None),) * axis + (slice(count * size),)]
    return whole.reshape(*head, count, size, *tail).mean(axis + 1)


@overload
def observe(data: Recording, observation: Observation) -> Recording: ...
@overload
def observe(data: xr.Dataset, observation: Observation) -> xr.Dataset: ...
def observe(data: Recording | xr.Dataset, observation: Observation) -> Recording | xr.Dataset:
    """Return what would have been seen of a recording or of a cube.

    Args:
        data: a recording, or (some networks of) a cube; its networks are read into memory.
        observation: what is seen, and how well.

    Returns:
        The same kind of thing with fewer neurons and times; what was done is added to its `observation`, a JSON list.

    Raises:
        ValueError: neurons that are not there, or fewer than two bins, or a filter where dt is not known.
    """
    if isinstance(data, Recording):
        return _observe_recording(data, observation)
    return _observe_cube(data, observation)


def _observe_recording(recording: Recording, o: Observation) -> Recording:
    trials, samples, N = recording.activity.shape
    kept = o.kept(N)
    current = recording.input
    if current is not None:
        current = np.asarray(current)[..., kept]
        current = current if current.ndim == 1 else bin_means(current, o.bin_size, axis=-2)
    voltage = recording.voltage
    return replace(
        recording,
        activity=o.rates(recording.activity[..., kept], recording.dt, recording.network or 0),
        dt=None if recording.dt is None else recording.dt * o.bin_size,
        voltage=None if voltage is None or o.changes_samples else voltage[..., kept],
        input=current,
        observation=_told(recording.observation, o, kept, np.arange(N), recording.dt),
    )


def _observe_cube(cube: xr.Dataset, o: Observation) -> xr.Dataset:
    N = cube.sizes["neuron"]
    kept = o.kept(N)
    dt = spacing(cube["time"].to_numpy(), "the cube")
    seen = cube.isel({dim: kept for dim in _NEURON_DIMS if dim in cube.dims})
    told = _told(cube.attrs.get("observation"), o, kept, cube["neuron"].to_numpy(), dt)
    seen = seen.assign_attrs(observation=told)
    if "gain" in seen and len(kept) < N:
        whole = {"long_name": "radius of the bulk of eigenvalues of the weights of all neurons, seen or not"}
        seen = seen.assign(gain=seen["gain"].assign_attrs(whole))
    if not o.changes_samples:
        return seen
    activity = seen["activity"].transpose(..., "time", "neuron")
    if "network" in activity.dims:
        indices = cube["network"].to_numpy()
        values = np.stack([o.rates(activity[i].to_numpy(), dt, int(k)) for i, k in enumerate(indices)])
    else:
        values = o.rates(activity.to_numpy(), dt, int(cube["network"]) if "network" in cube.coords else 0)
    binned = {
        name: (array.dims, bin_means(array.to_numpy(), o.bin_size, array.dims.index("time")), array.attrs)
        for name, array in seen.data_vars.items()
        if "time" in array.dims and name not in ("activity", "voltage")
    }
    what = seen["activity"].attrs | {"long_name": "observed firing rate"}
    times = seen["time"]
    dropped = [name for name in ("voltage", "activity", *binned) if name in seen]
    seen = seen.drop_vars([*dropped, "time"])
    seen = seen.assign(binned | {"activity": (activity.dims, values, what)})
    return seen.assign_coords(time=("time", bin_means(times.to_numpy(), o.bin_size), times.attrs))


def _told(before: str | None, o: Observation, kept: np.ndarray, names: np.ndarray, dt: float | None) -> str:
    """Add an observation to the list of those before."""
    told: list[dict[str, Any]] = json.loads(before) if before else []
    what: dict[str, Any] = {"noise": o.noise, "decay_time": o.decay_time, "bin_size": o.bin_size, "seed": o.seed}
    what |= {"fraction": o.fraction, "dt": dt, "neurons": [int(name) for name in names[kept]], "of": len(names)}
    return json.dumps([*told, what], sort_keys=True)
