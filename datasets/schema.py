"""What a cube is: its dimensions, variables, units and attributes, and the check that a file is one.

    weights(network, post, pre)                 W[k, i, j], from presynaptic j to postsynaptic i
    activity(network, trial, time, neuron)      x = φ(h)
    voltage(network, trial, time, neuron)       h, optional
    initial_state(network, trial, neuron)       h at the first time
    input(network, neuron)                      constant external input I
    gain, noise_std, tau, seed (network)        parameters of each network
    cell_type, block, observed (network, neuron)
    split(network)                              training, validation or test, optional
    complete(network)                           1 where the network's data are on disk

Files follow the CF conventions: every variable has `long_name` and `units`, the global attributes say where the file
came from, with the whole configuration as JSON.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xarray as xr

from neurosde.datasets.files import open_netcdf
from neurosde.datasets.shards import check_alike, shards_of

SCHEMA_VERSION = "1"
REQUIRED_ATTRIBUTES = ("Conventions", "title", "neurosde_version", "config", "schema_version")


@dataclass(frozen=True)
class Variable:
    """A variable of a cube: its dimensions, dtype, description and whether a cube must have it."""

    dims: tuple[str, ...]
    dtype: str
    long_name: str
    units: str = "1"
    required: bool = True
    flags: str | None = None

    @property
    def attributes(self) -> dict[str, str | np.ndarray]:
        """NetCDF attributes."""
        attributes: dict[str, str | np.ndarray] = {"long_name": self.long_name, "units": self.units}
        if self.flags is not None:
            pairs = [pair.split("=") for pair in self.flags.split()]
            attributes["flag_values"] = np.array([int(value) for value, _ in pairs], dtype=self.dtype)
            attributes["flag_meanings"] = " ".join(meaning for _, meaning in pairs)
        return attributes


def variables(time_unit: str = "tau") -> dict[str, Variable]:
    """Variables of a cube whose times are in this unit."""
    return {
        "weights": Variable(
            ("network", "post", "pre"), "f4", "recurrent weight from presynaptic (pre) to postsynaptic (post) neuron"
        ),
        "activity": Variable(("network", "trial", "time", "neuron"), "f4", "firing rate, phi(voltage)"),
        "voltage": Variable(("network", "trial", "time", "neuron"), "f4", "voltage", required=False),
        "initial_state": Variable(("network", "trial", "neuron"), "f4", "voltage at the first time"),
        "input": Variable(("network", "neuron"), "f4", "constant external input"),
        "gain": Variable(("network",), "f8", "radius of the bulk of eigenvalues of the weights"),
        "noise_std": Variable(
            ("network",), "f8", "noise standard deviation per square root of time", f"{time_unit}-0.5"
        ),
        "tau": Variable(("network",), "f8", "time constant", time_unit),
        "seed": Variable(("network",), "i8", "seed of the network's initial states, input and noise"),
        "cell_type": Variable(
            ("network", "neuron"), "i1", "cell type", flags="-1=inhibitory 0=unspecified 1=excitatory"
        ),
        "block": Variable(("network", "neuron"), "i2", "cluster of the neuron"),
        "observed": Variable(("network", "neuron"), "i1", "is the neuron observed", flags="0=hidden 1=observed"),
        "split": Variable(
            ("network",), "i1", "what the network is for", flags="0=train 1=validation 2=test", required=False
        ),
        "complete": Variable(
            ("network",), "i1", "whether the network's data are on disk", flags="0=missing 1=complete"
        ),
    }


def coordinates(time_unit: str = "tau") -> dict[str, Variable]:
    """Coordinates of a cube whose times are in this unit."""
    return {
        "network": Variable(("network",), "i8", "index of the network"),
        "trial": Variable(("trial",), "i8", "index of the trial"),
        "time": Variable(("time",), "f8", "time since the start of the trial", time_unit),
        "neuron": Variable(("neuron",), "i8", "index of the neuron"),
        "post": Variable(("post",), "i8", "index of the postsynaptic neuron"),
        "pre": Variable(("pre",), "i8", "index of the presynaptic neuron"),
    }


def validate_cube(cube: str | Path | xr.Dataset) -> None:
    """Check that a file, a folder of shards or a dataset is a whole cube.

    Raises:
        FileNotFoundError: no such file.
        ValueError: unreadable, or not a cube; the message names the file and everything that is missing or wrong.
    """
    if isinstance(cube, xr.Dataset):
        return _validate(cube, "the dataset")
    first = None
    for shard in shards_of(cube):
        with open_netcdf(shard.path) as dataset:
            _validate(dataset, str(shard.path))
            first = first or dataset.attrs
            check_alike(shard, dataset.attrs, first)


def _validate(dataset: xr.Dataset, where: str) -> None:
    problems = []
    for name, variable in variables().items():
        if name not in dataset:
            if variable.required:
                problems.append(f"variable {name}({', '.join(variable.dims)}) is missing")
            continue
        found = dataset[name]
        if found.dims != variable.dims:
            problems.append(f"{name} must have dims {variable.dims}, got {found.dims}")
        problems += [f"{name} has no {key}" for key in ("long_name", "units") if key not in found.attrs]
    problems += [f"coordinate {name} is missing" for name in coordinates() if name not in dataset.coords]
    problems += [f"attribute {name} is missing" for name in REQUIRED_ATTRIBUTES if name not in dataset.attrs]
    if not problems:
        sizes = dataset.sizes
        if not sizes["post"] == sizes["pre"] == sizes["neuron"]:
            problems.append(f"post, pre and neuron must be of one size, got {dict(sizes)}")
        if dataset.attrs["schema_version"] != SCHEMA_VERSION:
            problems.append(f"schema version must be {SCHEMA_VERSION}, got {dataset.attrs['schema_version']}")
        missing = int((dataset["complete"] != 1).sum())
        if missing:
            problems.append(f"{missing} of {sizes['network']} networks are not written yet; run build-dataset again")
    if problems:
        raise ValueError(f"{where} is not a whole cube: {'; '.join(problems)}.")
