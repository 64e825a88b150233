"""Posteriors on disk: a netCDF file of groups that opens in xarray as a DataTree and that ArviZ reads.

/posterior/weights(chain, draw, post, pre)                        draws
/sample_stats/lp(chain, draw)                                     their log posterior density; of a trained prior's
                                                                  recording_log_likelihood, the recording's given them,
                                                                  and tau and noise_std of each where not known
/closed_form/mean(post, pre), sd(post, pre), factor(pre, direction), point_estimate(post, pre)
/observed_data/activity(trial, time, neuron)                      the recording
/posterior_predictive/activity(chain, draw, trial, time, neuron)  simulated from the first draws
/constant_data/dt, tau, input(neuron), noise_std, gain, …         what it rests on
/unrefined/weights(chain, draw, post, pre)                        draws before they were refined, if they were
/refinement/rho(sweep), moved(sweep), log_likelihood(sweep), …    how they were, diverged(draw), and what it cost

Draws are independent of one another, not states of a Markov chain: there is one chain, whose effective size is the
number of draws and which has no R-hat. The name log_likelihood is left to what ArviZ means by it, one number for each
datum: az.loo would take a sum under that name for one datum.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr

from neurosde.datasets.files import existing_file
from neurosde.datasets.recordings import Recording
from neurosde.models.dynamics import Dynamics
from neurosde.models.inference import Inference
from neurosde.models.refinement import Refinement
from neurosde.provenance import global_attributes, whole_file

GROUPS = ("posterior", "sample_stats", "closed_form", "observed_data", "posterior_predictive", "constant_data")


def posterior_tree(result: Inference) -> xr.DataTree:
    """Return an inference as a labelled DataTree."""
    r = result
    recording = r.recording
    dims = ("trial", "time", "neuron")
    trials, samples, N = recording.activity.shape
    assert recording.dt is not None and recording.tau is not None
    neurons = {"post": _index(N, "post", "postsynaptic neuron"), "pre": _index(N, "pre", "presynaptic neuron")}
    time = xr.Variable("time", np.arange(samples) * recording.dt, {"long_name": "time", "units": "tau's unit"})
    axes = {
        "trial": _index(trials, "trial", "trial"),
        "time": time,
        "neuron": _index(N, "neuron", "neuron"),
    }
    chain = {"chain": _index(1, "chain", "chain"), "draw": _index(len(r.draws), "draw", "draw")}
    first = {"chain": chain["chain"], "draw": _index(len(r.predicted), "draw", "draw")}
    pair = ("post", "pre")
    posterior = r.posterior

    observed = {"activity": (dims, recording.activity, _label("recorded firing rate"))}
    if recording.voltage is not None:
        observed["voltage"] = (dims, recording.voltage, _label("recorded voltage"))
    constants: dict[str, Any] = {
        "dt": ((), recording.dt, _label("spacing of the samples", "tau's unit")),
        "tau": ((), recording.tau, _label("time constant", "tau's unit")),
        "noise_std": ((), posterior.noise_std, _label("noise standard deviation per square root of time")),
        "prior_variance": ((), posterior.prior_variance, _label("prior variance of a weight; inf for a flat prior")),
        "gain": ((), math.sqrt(N * posterior.prior_variance), _label("prior gain, sqrt(N prior_variance)")),
        "transitions": ((), r.statistics.count, _label("number of transitions used")),
        "dropped": ((), r.statistics.dropped, _label("number of saturated transitions left out")),
        "input": (("neuron",), r.input, _label("constant external input, known or posterior mean")),
        "input_sd": ((), r.input_sd, _label("posterior standard deviation of the input; 0 where it is known")),
    }
    if recording.input is not None and recording.input.ndim > 1:
        known = np.broadcast_to(recording.input, recording.activity.shape)
        constants["input_over_time"] = (dims, known, _label("known external input"))
    density, of_density = "lp", "log posterior density of the draw"
    if r.config.trained:
        density, of_density = "recording_log_likelihood", "log probability of the recording given the draw"
    of_draws: dict[str, Any] = {density: (("chain", "draw"), r.log_density.numpy()[None], _label(of_density))}
    if r.dynamics is not None and r.config.tau_range is not None:
        of_draws["tau"] = (("chain", "draw"), r.dynamics.tau.numpy()[None], _label("time constant", "tau's unit"))
    if r.dynamics is not None and r.config.noise_std is None:
        of_noise = _label("noise standard deviation per square root of time")
        of_draws["noise_std"] = (("chain", "draw"), r.dynamics.noise_std.numpy()[None], of_noise)
    groups = {
        "posterior": xr.Dataset(
            {"weights": (("chain", "draw", *pair), r.draws.numpy()[None], _label("recurrent weight from pre to post"))},
            coords=chain | neurons,
        ),
        "sample_stats": xr.Dataset(of_draws, coords=chain),
        "closed_form": xr.Dataset(
            {
                "mean": (pair, posterior.mean.numpy(), _label("exact posterior mean")),
                "sd": (pair, posterior.sd.numpy(), _label("exact posterior standard deviation")),
                "factor": (
                    ("pre", "direction"),
                    posterior.factor.numpy(),
                    _label("F, where F F^T is the covariance of the weights onto one neuron, the same for each"),
                ),
                "point_estimate": (pair, r.point_estimate.numpy(), _label("the method's estimate of the weights")),
            },
            coords=neurons,
        ),
        "observed_data": xr.Dataset(observed, coords=axes),
        "posterior_predictive": xr.Dataset(
            {"activity": (("chain", "draw", *dims), r.predicted[None], _label("firing rate simulated from the draw"))},
            coords=first | axes,
        ),
        "constant_data": xr.Dataset(
            constants, coords=axes if "input_over_time" in constants else {"neuron": axes["neuron"]}
        ),
    }
    if r.refinement is not None and r.unrefined is not None:
        before = r.unrefined.numpy()[None]
        groups["unrefined"] = xr.Dataset(
            {"weights": (("chain", "draw", *pair), before, _label("recurrent weight, before it was refined"))},
            coords=chain | neurons,
        )
        groups["refinement"] = _refinement(r.refinement, r.seconds, r.refine_seconds)
    attributes = global_attributes(
        f"Posterior over the recurrent weights of {Path(recording.source).name}",
        f"p(W | activity) of {N} neurons by method {r.config.method!r}"
        f"{'' if r.config.refine is None else f', refined by {r.config.refine!r}'}, {len(r.draws)} draws. "
        "weights[post, pre] is the weight from pre to post.",
        asdict(r.config),
        r.config.seed,
    )
    attributes |= {
        "recording": recording.source,
        "method": r.config.method,
        "refined_by": r.config.refine or "",
        "drive": recording.drive,
        "estimate_input": int(r.config.estimate_input),
        "notes": " ".join(r.notes),
        "residual_checks": json.dumps({check.name: round(check.score, 2) for check in r.checks}),
    }
    for name in ("network", "time_unit", "observation"):
        if getattr(recording, name) is not None:
            attributes[name] = getattr(recording, name)
    for dataset in groups.values():
        dataset.attrs = {"created_at": attributes["date_created"], "inference_library": "neurosde"}
    groups["posterior"].attrs["comment"] = "Draws are independent of one another: one chain, and no R-hat."
    tree = xr.DataTree.from_dict(groups)
    tree.attrs = attributes
    return tree


def save_posterior(result: Inference, path: str | Path) -> Path:
    """Write an inference to a netCDF file, whole or not at all.

    Raises:
        ValueError: the name does not end in .nc.
        OSError: the folder cannot be written, or the disk is full.
    """
    path = check_name(path)
    with whole_file(path) as temporary:
        try:
            posterior_tree(result).to_netcdf(temporary, engine="netcdf4")
        except RuntimeError as error:  # netCDF4 says "HDF error" for whatever the system refused
            raise OSError(f"could not write {path}: {error}; is the disk full?") from error
    return path


def check_name(path: str | Path, *inputs: str | Path) -> Path:
    """Return the path of a posterior to be written.

    Args:
        path: the file.
        inputs: files that it is made from, which it must not replace.

    Raises:
        ValueError: the name does not end in .nc, or is that of an input.
    """
    path = Path(path)
    if path.suffix != ".nc":
        raise ValueError(f"a posterior is written as netCDF; name it *.nc, got {path}.")
    for one in inputs:
        if Path(one).resolve() == path.resolve():
            raise ValueError(f"{path} is what is read, and would be replaced; choose another --out.")
    return path


def open_posterior(path: str | Path) -> xr.DataTree:
    """Load a posterior file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a folder, not a readable netCDF file, or one without the groups of a posterior.
    """
    path = existing_file(path, None)
    if path.suffix != ".nc":
        raise ValueError(f"{path} is not a posterior of neurosde infer, which is a netCDF file, NAME.nc.")
    try:
        with xr.open_datatree(path, engine="netcdf4", decode_times=False) as tree:
            loaded = tree.load()
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"{path} is not a readable netCDF file (cut short, or another format): {error}") from error
    missing = [name for name in GROUPS if name not in loaded.children]
    if missing:
        raise ValueError(f"{path} is not a posterior of neurosde infer; it has no {', '.join(missing)}.")
    return loaded


def recording_of(tree: xr.DataTree) -> Recording:
    """Return the recording that a posterior file holds, with dt, tau and drive as they were settled."""
    observed, constants, network = tree["observed_data"], tree["constant_data"], tree.attrs.get("network")
    known = constants["input_over_time"] if "input_over_time" in constants else constants["input"]
    return Recording(
        observed["activity"].to_numpy(),
        str(tree.attrs["recording"]),
        dt=float(constants["dt"]),
        tau=float(constants["tau"]),
        voltage=observed["voltage"].to_numpy() if "voltage" in observed else None,
        input=None if tree.attrs["estimate_input"] else known.to_numpy(),
        drive=tree.attrs["drive"],
        network=None if network is None else int(network),
        time_unit=tree.attrs.get("time_unit"),
        observation=tree.attrs.get("observation"),
    )


def dynamics_of(tree: xr.DataTree) -> Dynamics | None:
    """Return τ and σ of the draws of a posterior file, None where no draw has one of its own."""
    found = tree["sample_stats"]
    if not {"tau", "noise_std"} & set(found.data_vars):
        return None
    count, known = found.sizes["draw"], config_of(tree)["noise_std"]
    tau, sigma = (
        torch.from_numpy(found[name].isel(chain=0).to_numpy())
        if name in found
        else torch.full((count,), math.nan if value is None else value, dtype=torch.float64)
        for name, value in (("tau", None), ("noise_std", known))
    )
    return Dynamics(tau, sigma)


def config_of(tree: xr.DataTree) -> dict[str, Any]:
    """Return the settings of a posterior file, as `InferenceConfig` takes them."""
    stored = json.loads(tree.attrs["config"])
    return {name: tuple(value) if isinstance(value, list) else value for name, value in stored.items()}


def _refinement(found: Refinement, seconds: float, refine_seconds: float) -> xr.Dataset:
    """How draws were refined, sweep by sweep, and what it cost."""
    sweep = _index(len(found.rho), "sweep", "sweep")
    of_sweeps = {
        "rho": "how far a sweep may move a draw, in units of the spread of a weight",
        "moved": "root mean square change of a weight in a sweep, over its spread among draws",
        "log_likelihood": "log-likelihood after a sweep, mean over draws, less a constant",
    }
    variables: dict[str, Any] = {
        name: ("sweep", getattr(found, name).numpy(), _label(what)) for name, what in of_sweeps.items()
    }
    variables |= {
        f"r_hat_{name}": ((), value, _label(f"R-hat of the {name} over the exact sweeps"))
        for name, value in found.r_hat.items()
    }
    variables["diverged"] = ("draw", found.diverged.numpy(), _label("whether the guidance diverged: a draw as it was"))
    variables["evaluations"] = ((), found.evaluations, _label("evaluations of the prior's denoiser for each draw"))
    variables["draw_seconds"] = ((), seconds, _label("time that drawing took; NaN where draws were there", "s"))
    variables["refine_seconds"] = ((), refine_seconds, _label("time that refining took", "s"))
    return xr.Dataset(variables, {"sweep": sweep, "draw": _index(len(found.draws), "draw", "draw")})


def _index(size: int, name: str, what: str) -> xr.Variable:
    return xr.Variable(name, np.arange(size), {"long_name": f"index of the {what}", "units": "1"})


def _label(long_name: str, units: str = "1") -> dict[str, str]:
    return {"long_name": long_name, "units": units}
