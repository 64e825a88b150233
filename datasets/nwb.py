"""Recordings out of NWB files (Neurodata Without Borders), through the optional package pynwb.

What is read are two-dimensional series, (time, cell): plain `TimeSeries`, such as firing rates, and `RoiResponseSeries`
such as those of `Fluorescence` and `DfOverF`. Values are data · conversion + offset, times are in seconds.

References:
    The Neurodata Without Borders ecosystem for neurophysiological data science (Rübel et al., 2022),
    https://doi.org/10.7554/eLife.78362
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from neurosde.datasets.files import choose, spacing
from neurosde.validation import optional_package


@dataclass(frozen=True)
class Series:
    """One series of a file.

    Attributes:
        values: shape (trial, time, neuron), in the unit of the series.
        dt: spacing of the samples, s.
        name: where in the file it is.
        unit: unit of the values, as the file says.
    """

    values: np.ndarray
    dt: float
    name: str
    unit: str


def read_nwb(path: str | Path, variable: str | None = None, *, cut_trials: bool = False) -> Series:
    """Read one series of an NWB file.

    Args:
        path: the file.
        variable: name of the series, or the end of its path such as `DfOverF/RoiResponseSeries`; None takes the only
            one there is.
        cut_trials: cut the series into the trials of the file's table of trials, start_time ≤ t < stop_time. All are
            cut to the length of the shortest; those that reach beyond the series are left out. Both are warned of.

    Raises:
        ImportError: pynwb is not installed.
        ValueError: unreadable, or it is not clear which series is meant, or its times are unevenly spaced, or it is
            stored as (cell, time), or there are no trials to cut it into.
    """
    pynwb = optional_package("pynwb", "nwb")
    try:
        with pynwb.NWBHDF5IO(str(path), "r", load_namespaces=True) as file:
            contents = file.read()
            named = _candidates(contents, pynwb)
            if not named:
                raise ValueError(
                    f"{path} must hold a TimeSeries or RoiResponseSeries of (time, cell) data; it has none."
                )
            series = named[name := _choose(named, variable, path)]
            values = _values(series, name, path)
            dt, start = _times(series, len(values), name, path)
            if cut_trials:
                values = _cut(values, dt, start, contents.trials, path)
            return Series(values if cut_trials else values[None], dt, name, str(series.unit))
    except (OSError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{path} is not a readable NWB file (cut short, or another format): {error}") from error


def _candidates(contents: Any, pynwb: Any) -> dict[str, Any]:
    named = {}
    for item in contents.objects.values():
        if type(item) is pynwb.TimeSeries or isinstance(item, pynwb.ophys.RoiResponseSeries):
            shape = getattr(item.data, "shape", np.shape(item.data))
            if len(shape) == 2:
                parts, parent = [item.name], item.parent
                while parent is not None and parent is not contents:
                    parts.insert(0, parent.name)
                    parent = parent.parent
                named["/".join(parts)] = item
    return dict(sorted(named.items()))


def _choose(named: dict[str, Any], variable: str | None, path: str | Path) -> str:
    if variable is not None:
        ending = [name for name in named if f"/{name}".endswith(f"/{variable.strip('/')}")]
        if len(ending) == 1:
            return ending[0]
        if ending:
            raise ValueError(f"{path} holds {ending}; got variable {variable!r}. Give more of the path.")
    return choose(list(named), variable, ("activity",), path)


def _values(series: Any, name: str, path: str | Path) -> np.ndarray:
    data = np.asarray(series.data)
    rois = getattr(series, "rois", None)
    if rois is not None and data.shape[1] != len(rois) and data.shape[0] == len(rois):
        raise ValueError(f"{name} in {path} must be (time, cell); got (cell, time), {data.shape}. Transpose it.")
    if data.dtype.kind not in "fiu":
        raise ValueError(f"{name} in {path} must hold real numbers; got {data.dtype}.")
    scale, offset = float(series.conversion), float(getattr(series, "offset", 0.0) or 0.0)
    if scale != 1 or offset != 0:
        data = data * scale + offset
    return data if data.dtype in (np.float32, np.float64) else data.astype(np.float64)


def _times(series: Any, samples: int, name: str, path: str | Path) -> tuple[float, float]:
    """Return spacing and time of the first sample, s."""
    if series.rate is not None:
        if not series.rate > 0:
            raise ValueError(f"{name} in {path} must have a positive rate; got {series.rate} Hz.")
        return 1 / float(series.rate), float(series.starting_time or 0.0)
    times = np.asarray(series.timestamps, dtype=np.float64)
    if len(times) != samples:
        raise ValueError(f"{name} in {path} must have a timestamp for each of its {samples} times; got {len(times)}.")
    dt = spacing(times, path)
    if dt is None:
        raise ValueError(f"{name} in {path} must have at least two times; got {samples}.")
    return dt, float(times[0])


def _cut(values: np.ndarray, dt: float, start: float, trials: Any, path: str | Path) -> np.ndarray:
    if trials is None or len(trials) == 0:
        raise ValueError(f"{path} must have a table of trials to be cut into them; it has none. Leave the trials out.")
    edges = np.stack([np.asarray(trials[name][:], dtype=np.float64) for name in ("start_time", "stop_time")], axis=1)
    # Sample k is at start + k dt; the slack is for times that were rounded.
    first, stop = np.ceil((edges - start) / dt - 1e-6).astype(int).T
    inside = (first >= 0) & (stop <= len(values))
    if not inside.any():
        end = start + len(values) * dt
        raise ValueError(f"no trial of {path} lies within the series, {start:.6g} to {end:.6g} s; check their clocks.")
    if not inside.all():
        warnings.warn(f"{int((~inside).sum())} trials of {path} reach beyond it and are left out.", stacklevel=4)
    lengths = (stop - first)[inside]
    shortest, longest = int(lengths.min()), int(lengths.max())
    if shortest < 2:
        raise ValueError(f"the trials of {path} must last at least two samples; got one of {shortest}.")
    if longest > shortest + 1:  # one more or less is where the clock happened to tick
        warnings.warn(
            f"the trials of {path} last {shortest} to {longest} samples; all are cut to {shortest}.", stacklevel=4
        )
    return np.stack([values[one : one + shortest] for one in first[inside]])
