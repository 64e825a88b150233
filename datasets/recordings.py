"""Recordings of activity, from a cube or from anywhere.

    .nc    a cube (one of its networks), or a netCDF file with one variable (trial,) time, neuron
    .npz   an array `activity` (or the only one); `voltage`, `input`, `dt` and `tau` are taken along if there
    .npy   one array
    .csv   time × neuron, with a header line or without; columns `time` and `trial` are understood by name

Arrays are (time, neuron) or (trial, time, neuron), firing rates in the range of φ.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import xarray as xr

from neurosde.datasets.files import choose, existing_file, open_netcdf, read_npz, read_table
from neurosde.rate_sde import Drive

NAMES = ("activity", "rates", "x")


@dataclass(frozen=True)
class Recording:
    """Activity of one network.

    Attributes:
        activity: firing rate, shape (trial, time, neuron); (time, neuron) is taken for one trial.
        source: where it came from.
        dt: spacing of the samples, None if the file does not say.
        tau: time constant, None if the file does not say.
        voltage: h in the same shape, or None.
        input: known external input, shape (neuron,), (time, neuron) or (trial, time, neuron), or None.
        drive: the drive convention the file says it was made with, or None.
        network: index of the network in the cube, or None.
    """

    activity: np.ndarray
    source: str
    dt: float | None = None
    tau: float | None = None
    voltage: np.ndarray | None = None
    input: np.ndarray | None = None
    drive: Drive | None = None
    network: int | None = None

    def __post_init__(self) -> None:
        for name in ("activity", "voltage"):
            given = getattr(self, name)
            if given is not None:
                array = np.asarray(given)
                object.__setattr__(self, name, array[None] if array.ndim == 2 else array)
        shape = self.activity.shape
        if len(shape) != 3 or shape[1] < 2 or 0 in shape:
            raise ValueError(
                f"{self.source} must hold (time, neuron) or (trial, time, neuron) with at least two times; "
                f"got shape {shape}."
            )
        if not np.isfinite(self.activity).all():
            count = int((~np.isfinite(self.activity)).sum())
            raise ValueError(f"{self.source} must be finite; got {count} NaN or infinite rates. Drop or fill them.")
        if self.voltage is not None and self.voltage.shape != shape:
            raise ValueError(f"voltage in {self.source} must have the shape {shape}; got {self.voltage.shape}.")


def read_recording(path: str | Path, *, network: int | None = None, variable: str | None = None) -> Recording:
    """Read a recording from a netCDF, npz, npy or csv file.

    Args:
        path: the file.
        network: which network of a cube; needed where it holds more than one.
        variable: which array of the file, where its name is not a usual one.

    Raises:
        FileNotFoundError: no such file.
        ValueError: unreadable, of the wrong shape, not finite, or it is not clear which array or network is meant.
    """
    path = existing_file(path)
    suffix = path.suffix.lower()
    if suffix == ".nc":
        with open_netcdf(path) as dataset:
            return _from_dataset(dataset, path, network, variable)
    if network is not None:
        raise ValueError(f"only cubes hold networks to choose from; {path} is a {suffix} file, got network {network}.")
    if suffix == ".csv":
        return _from_table(path)
    arrays = read_npz(path)
    shaped = [name for name, array in arrays.items() if array.ndim >= 2 or len(arrays) == 1]
    activity = _floating(arrays[choose(shaped, variable, NAMES, path)], path)
    return Recording(
        activity,
        str(path),
        dt=_scalar(arrays, "dt", path),
        tau=_scalar(arrays, "tau", path),
        voltage=_floating(arrays["voltage"], path) if "voltage" in arrays else None,
        input=_floating(arrays["input"], path) if "input" in arrays else None,
    )


def _from_dataset(dataset: xr.Dataset, path: Path, network: int | None, variable: str | None) -> Recording:
    shaped = [str(name) for name in dataset.data_vars if dataset[name].ndim >= 2]
    name = choose(shaped, variable, NAMES, path)
    if "network" in dataset.dims:
        count = dataset.sizes["network"]
        if network is None and count > 1:
            raise ValueError(f"{path} holds {count} networks; choose one with --network 0 … {count - 1}.")
        if network is not None and not 0 <= network < count:
            raise ValueError(f"network must lie between 0 and {count - 1} in {path}; got {network}.")
        network = network or 0
        if "complete" in dataset and int(dataset["complete"][network]) != 1:
            raise ValueError(f"network {network} of {path} is not written yet; finish the dataset first.")
        dataset = dataset.isel(network=network)
    elif network is not None:
        raise ValueError(f"{path} has no dimension network; leave --network out.")
    rates = dataset[name]
    if set(rates.dims) == {"trial", "time", "neuron"} or set(rates.dims) == {"time", "neuron"}:
        rates = rates.transpose(..., "time", "neuron")
    elif {"time", "neuron"} & {str(dim) for dim in rates.dims} or rates.ndim not in (2, 3):
        raise ValueError(f"{name} in {path} must have dims (trial,) time, neuron; got {rates.dims}.")
    config = json.loads(dataset.attrs.get("config", "{}")) if "schema_version" in dataset.attrs else {}
    current = dataset["input"].to_numpy() if "input" in dataset else None
    return Recording(
        _floating(rates.to_numpy(), path),
        str(path),
        dt=_spacing(dataset["time"].to_numpy(), path) if "time" in dataset.coords else None,
        tau=float(dataset["tau"]) if "tau" in dataset and dataset["tau"].ndim == 0 else None,
        voltage=_floating(dataset["voltage"].to_numpy(), path) if "voltage" in dataset else None,
        input=current if current is not None and current.any() else None,
        drive=config.get("drive"),
        network=network,
    )


def _from_table(path: Path) -> Recording:
    table = read_table(path)
    if table.shape[1] > 1 and list(table.iloc[0]) == list(range(table.shape[1])):
        table = table.iloc[1:]  # column numbers, as pandas writes where there are no names; 1 is no rate
    if table.index.name is not None and not table.index.is_unique:
        raise ValueError(f"the first column of {path} must hold numbers; got names ({table.index[0]!r}, …).")
    trial = table.pop("trial").to_numpy() if "trial" in table else np.zeros(len(table))
    times = table.pop("time").to_numpy(dtype=float) if "time" in table else None
    groups = [np.flatnonzero(trial == label) for label in dict.fromkeys(trial)]
    lengths = {len(rows) for rows in groups}
    if len(lengths) != 1:
        raise ValueError(f"the trials of {path} must be of one length; got {sorted(lengths)}. Cut the longer ones.")
    values = table.to_numpy(dtype=np.float64)
    return Recording(
        np.stack([values[rows] for rows in groups]),
        str(path),
        dt=None if times is None else _spacing(times[groups[0]], path),
    )


def merge_settings(recording: Recording, *, dt: float | None, tau: float | None, drive: Drive | None) -> Recording:
    """Fill in what the file does not say. The caller's word goes, with a warning, unless the file is a cube of ours.

    Raises:
        ValueError: dt is said nowhere, or a cube and the caller disagree.
    """
    for name, said in (("dt", dt), ("tau", tau), ("drive", drive)):
        there = getattr(recording, name)
        same = there == said if isinstance(there, str) else there is None or said is None or np.isclose(there, said)
        if there is not None and said is not None and not same and recording.drive is None:
            warnings.warn(
                f"{recording.source} says {name} = {there:.6g}; {said:.6g} is used, as asked for.", stacklevel=2
            )
        elif there is not None and said is not None and not same:
            raise ValueError(f"{recording.source} says {name} = {there}; got {name} = {said}. Leave --{name} out.")
    if recording.dt is None and dt is None:
        raise ValueError(f"{recording.source} does not say how far its samples are apart; give --dt (in units of tau).")
    return replace(
        recording,
        dt=dt if dt is not None else recording.dt,
        tau=tau if tau is not None else recording.tau if recording.tau is not None else 1.0,
        drive=drive or recording.drive or "scaled",
    )


def _floating(array: np.ndarray, path: Path) -> np.ndarray:
    """The array in its own precision, which says how far it is to be trusted."""
    if array.dtype.kind not in "fiu":
        raise ValueError(f"{path} must hold real numbers; got {array.dtype}.")
    if array.dtype == np.float16:
        raise ValueError(f"{path} must hold float32 or float64 numbers; float16 has three digits only.")
    return array if array.dtype in (np.float32, np.float64) else array.astype(np.float64)


def _scalar(arrays: dict[str, np.ndarray], name: str, path: Path) -> float | None:
    if name not in arrays:
        return None
    if arrays[name].size != 1:
        raise ValueError(f"{name} in {path} must be one number; got shape {arrays[name].shape}.")
    return float(arrays[name].reshape(()))


def _spacing(times: np.ndarray, path: Path) -> float | None:
    if len(times) < 2 or times.dtype.kind not in "fiu":
        return None
    steps = np.diff(times)
    dt = float(np.median(steps))
    if dt <= 0 or np.abs(steps - dt).max() > 1e-3 * dt:
        raise ValueError(
            f"the times of {path} must be evenly spaced; got steps from {steps.min():.6g} to {steps.max():.6g}. "
            "Resample the recording."
        )
    return float((times[-1] - times[0]) / (len(times) - 1))
