"""Posteriors as NWB files (Neurodata Without Borders), through the optional package pynwb.

acquisition/activity (time, neuron)     the recording, trials one after the other; voltage and input beside it, if known
trials                                  where each begins and ends, so that `neurosde infer --cut-trials` reads it back
processing/neurosde/weights             a row for each weight: post, pre, mean, sd, point_estimate, draws (draw)
processing/neurosde/constants           dt, tau, noise_std, gain, … with their units
processing/neurosde/neurons             input of each neuron
processing/neurosde/provenance          the attributes of the posterior file: settings, seed, version, commit, …

NWB counts in seconds, a posterior in the unit of its time constant: the latter is taken for a second.

References:
    The Neurodata Without Borders ecosystem for neurophysiological data science (Rübel et al., 2022),
    https://doi.org/10.7554/eLife.78362
"""

from __future__ import annotations

import datetime
import json
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from neurosde.datasets.zarr_store import check_new
from neurosde.models.posterior_file import open_posterior
from neurosde.provenance import whole_file
from neurosde.validation import optional_package

OF_RECORDING = {
    "activity": ("recorded firing rate", ("observed_data", "activity")),
    "voltage": ("recorded voltage", ("observed_data", "voltage")),
    "input": ("known external input", ("constant_data", "input_over_time")),
}


def export_nwb(path: str | Path, out: str | Path) -> Path:
    """Write a posterior file as an NWB file.

    Args:
        path: the posterior.
        out: name of the file, ending in .nwb; must not be there yet.

    Raises:
        FileNotFoundError: no such posterior.
        ImportError: pynwb is not installed.
        ValueError: not a posterior, `out` is there already or has another ending.
        OSError: the folder cannot be written, or the disk is full.
    """
    pynwb = optional_package("pynwb", "nwb")
    out = check_new(out)
    if out.suffix != ".nwb":
        raise ValueError(f"an NWB file is named *.nwb; got {out}.")
    contents = _contents(open_posterior(path), pynwb)
    with whole_file(out) as temporary:
        named = temporary.with_suffix(".nwb")  # pynwb warns of any other ending
        try:
            with pynwb.NWBHDF5IO(str(named), "w") as file:
                file.write(contents)
            named.replace(temporary)
        finally:
            named.unlink(missing_ok=True)
    return out


def _contents(tree: xr.DataTree, pynwb: Any) -> Any:
    attributes = tree.attrs
    created = datetime.datetime.fromisoformat(attributes["date_created"])
    file = pynwb.NWBFile(
        session_description=f"{attributes['title']}. {attributes['summary']} The time of the session is that of the "
        "inference; times count in the unit of the time constant.",
        identifier=str(uuid.uuid5(uuid.NAMESPACE_URL, json.dumps(attributes, default=str))),
        session_start_time=created,
        notes=attributes["notes"] or None,
        was_generated_by=[["neurosde", attributes["neurosde_version"]]],
    )
    dt = float(tree["constant_data"]["dt"])
    for name, (what, (group, variable)) in OF_RECORDING.items():
        if variable in tree[group]:
            values = tree[group][variable].to_numpy()
            flat = values.reshape(-1, values.shape[-1])
            file.add_acquisition(
                pynwb.TimeSeries(name=name, data=flat, unit="n.a.", rate=1 / dt, starting_time=0.0, description=what)
            )
    trials, samples = tree["observed_data"].sizes["trial"], tree["observed_data"].sizes["time"]
    for trial in range(trials):
        file.add_trial(start_time=trial * samples * dt, stop_time=(trial + 1) * samples * dt)
    module = file.create_processing_module(name="neurosde", description=attributes["summary"])
    for table in (_weights(tree, pynwb), _constants(tree, pynwb), _neurons(tree, pynwb), _provenance(tree, pynwb)):
        module.add(table)
    return file


def _weights(tree: xr.DataTree, pynwb: Any) -> Any:
    draws = tree["posterior"]["weights"].isel(chain=0).to_numpy()
    post, pre = np.indices(draws.shape[1:])
    return _table(
        pynwb,
        "weights",
        "posterior over recurrent weights, a row for each; the weight of (post, pre) is that from pre to post",
        post=("index of the postsynaptic neuron, from 0", post.ravel()),
        pre=("index of the presynaptic neuron, from 0", pre.ravel()),
        mean=("posterior mean: of the draws", draws.mean(0).ravel()),
        sd=("posterior standard deviation: of the draws", draws.std(0, ddof=1).ravel()),
        point_estimate=("the method's estimate", tree["closed_form"]["point_estimate"].to_numpy().ravel()),
        draws=("posterior draws, the same one of all weights in each column", draws.reshape(len(draws), -1).T),
    )


def _constants(tree: xr.DataTree, pynwb: Any) -> Any:
    scalars = {name: one for name, one in tree["constant_data"].data_vars.items() if one.ndim == 0}
    return _table(
        pynwb,
        "constants",
        "what the posterior rests on",
        quantity=("its name", list(scalars)),
        value=("its value", np.array([float(one) for one in scalars.values()])),
        unit=("its unit", [str(one.attrs["units"]) for one in scalars.values()]),
        meaning=("what it is", [str(one.attrs["long_name"]) for one in scalars.values()]),
    )


def _neurons(tree: xr.DataTree, pynwb: Any) -> Any:
    current = tree["constant_data"]["input"]
    return _table(
        pynwb,
        "neurons",
        "neurons in the order of the recording",
        input=(str(current.attrs["long_name"]), current.to_numpy()),
    )


def _provenance(tree: xr.DataTree, pynwb: Any) -> Any:
    there = {name: str(value) for name, value in tree.attrs.items() if str(value)}
    return _table(
        pynwb,
        "provenance",
        "attributes of the posterior file: where it came from",
        attribute=("its name", list(there)),
        value=("its value", list(there.values())),
    )


def _table(pynwb: Any, table: str, what: str, **columns: tuple[str, Any]) -> Any:
    data = pynwb.core.VectorData
    held = [data(name=name, description=meaning, data=values) for name, (meaning, values) in columns.items()]
    return pynwb.core.DynamicTable(name=table, description=what, columns=held)
