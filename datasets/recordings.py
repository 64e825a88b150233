"""Recordings of activity, from a cube or from anywhere.

    .nc    a cube (one of its networks), or a netCDF file with one variable (trial,) time, neuron
    .npz   an array `activity` (or the only one); `voltage`, `input`, `dt` and `tau` are taken along if there
    .npy   one array
    .csv   time × neuron, with a header line or without; columns `time` and `trial` are understood by name
    .mat   MATLAB's, of any version, like npz; fields of a struct are called `session.activity`
    .nwb   a (time, cell) series of a Neurodata Without Borders file; takes pynwb, `pip install 'neurosde[nwb]'`

Arrays are (time, neuron) or (trial, time, neuron), firing rates in the range of φ.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import xarray as xr

from neurosde.datasets.files import KINDS, choose, existing_file, open_netcdf, read_npz, read_table, spacing
from neurosde.datasets.matlab import read_mat
from neurosde.datasets.nwb import read_nwb
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
        time_unit: unit of dt and tau, None if the file does not say.
        observation: what `observe` has done to it, JSON, or None.
    """

    activity: np.ndarray
    source: str
    dt: float | None = None
    tau: float | None = None
    voltage: np.ndarray | None = None
    input: np.ndarray | None = None
    drive: Drive | None = None
    network: int | None = None
    time_unit: str | None = None
    observation: str | None = None

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


def read_recording(
    path: str | Path, *, network: int | None = None, variable: str | None = None, cut_trials: bool = False
) -> Recording:
    """Read a recording from a netCDF, npz, npy, csv, MATLAB or NWB file.

    Args:
        path: the file.
        network: which network of a cube; needed where it holds more than one.
        variable: which array of the file, where its name is not a usual one.
        cut_trials: cut an NWB series into the file's trials (see `neurosde.datasets.nwb`).

    Raises:
        FileNotFoundError: no such file.
        ImportError: the package that reads NWB files is not installed.
        ValueError: unreadable, of the wrong shape, not finite, or it is not clear which array or network is meant.
    """
    path = existing_file(path, (*KINDS, ".nwb"))
    suffix = path.suffix.lower()
    if cut_trials and suffix != ".nwb":
        raise ValueError(f"only NWB files hold a table of trials to cut by; {path} is a {suffix} file.")
    if suffix == ".nc":
        with open_netcdf(path) as dataset:
            return _from_dataset(dataset, path, network, variable)
    if network is not None:
        raise ValueError(f"only cubes hold networks to choose from; {path} is a {suffix} file, got network {network}.")
    if suffix == ".nwb":
        series = read_nwb(path, variable, cut_trials=cut_trials)
        return Recording(series.values, f"{path}:{series.name}", dt=series.dt, time_unit="s")
    if suffix == ".csv":
        return _from_table(path)
    arrays = _read_matlab(path, variable) if suffix == ".mat" else read_npz(path)
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


def _read_matlab(path: Path, variable: str | None) -> dict[str, np.ndarray]:
    """MATLAB has no arrays of fewer than two axes: take (1, n) and (n, 1) for vectors, except where rates are."""
    arrays = read_mat(path)
    flat = {name for name, array in arrays.items() if array.ndim == 2 and 1 in array.shape} - {
        *NAMES,
        "voltage",
        variable,
    }
    return {name: array.ravel() if name in flat and len(arrays) > 1 else array for name, array in arrays.items()}


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
        dt=spacing(dataset["time"].to_numpy(), path) if "time" in dataset.coords else None,
        tau=float(dataset["tau"]) if "tau" in dataset and dataset["tau"].ndim == 0 else None,
        voltage=_floating(dataset["voltage"].to_numpy(), path) if "voltage" in dataset else None,
        input=current if current is not None and current.any() else None,
        drive=config.get("drive"),
        network=network,
        time_unit=dataset["time"].attrs.get("units") if "time" in dataset.coords else None,
        observation=dataset.attrs.get("observation"),
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
        dt=None if times is None else spacing(times[groups[0]], path),
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
        raise ValueError(
            f"{recording.source} does not say how far its samples are apart; give dt (--dt), in units of tau."
        )
    if recording.tau is None and tau is None and recording.time_unit not in (None, "tau", "1"):
        warnings.warn(
            f"{recording.source} does not say tau; 1 {recording.time_unit} is assumed. Give --tau.", stacklevel=2
        )
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
