"""`neurosde refine`: the draws of a posterior, moved by the likelihood and a trained prior."""

from __future__ import annotations

from argparse import BooleanOptionalAction, Namespace
from dataclasses import replace
from pathlib import Path
from typing import get_args

import torch

from neurosde.datasets.recordings import read_recording
from neurosde.models.infer_command import report
from neurosde.models.inference import infer
from neurosde.models.inference_config import InferenceConfig, Likelihood
from neurosde.models.posterior_file import (
    check_name,
    config_of,
    dynamics_of,
    open_posterior,
    recording_of,
    save_posterior,
)
from neurosde.models.refiner_options import Refiner
from neurosde.models.split_gibbs import NEAR_RHO, NEAR_SWEEPS, PRIOR_SWEEPS, SWEEPS
from neurosde.options import OptionParser
from neurosde.provenance import make_folder


def add_arguments(parser: OptionParser) -> None:
    """Add the options of `neurosde refine`."""
    parser.add_argument("posterior", type=Path, help="file of neurosde infer")
    parser.add_argument("--recording", type=Path, help="another recording of the network (default: the file's own)")
    parser.add_argument(
        "--method",
        choices=get_args(Refiner),
        default="gibbs",
        help="gibbs is exact in the limit (default), others are guidances",
    )
    parser.add_argument("--checkpoint", help="trained posterior whose prior is taken (default: the file's, else base)")
    parser.add_argument("--prior", help="trained prior of weights, its file or name (default: that of the checkpoint)")
    parser.add_argument("--family", help="the ensemble, where it is known (default: the file's)")
    parser.add_argument(
        "--sweeps",
        type=int,
        help=f"of gibbs, at least 8 (default: of draws of the posterior that refines {NEAR_SWEEPS}, of others "
        f"{SWEEPS}, with a prior {PRIOR_SWEEPS})",
    )
    parser.add_argument(
        "--rho",
        type=float,
        help="how far draws may go, in units of a weight's spread (default: of gibbs, draws of the posterior that "
        f"refines {NEAR_RHO}, others 1, with a prior 3 √N; of other methods 3)",
    )
    parser.add_argument(
        "--closing",
        action=BooleanOptionalAction,
        help="of gibbs: close draws by sweeps of Gibbs sampling given the structure that was found (default: as the "
        "file says, else yes)",
    )
    parser.add_argument(
        "--likelihood",
        choices=get_args(Likelihood),
        default="transitions",
        help="of dps and pigdm: of each step (default), or through the simulator, by roll-outs of windows",
    )
    parser.add_argument(
        "--window", type=float, help="of rollout: length (default half a time constant, or less in chaos)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed (default 0)")
    parser.add_argument("--out", type=Path, default=Path("refined.nc"), help="posterior (default refined.nc)")


def run(options: Namespace) -> int:
    """Refine, say how it went, and write the posterior, with the draws as they were beside it."""
    read = [path for path in (options.posterior, options.recording) if path is not None]
    make_folder(check_name(options.out, *read))
    tree = open_posterior(options.posterior)
    draws = torch.from_numpy(tree["posterior"]["weights"].isel(chain=0).to_numpy())
    settings = config_of(tree)
    recording, dynamics = recording_of(tree), dynamics_of(tree)
    if options.recording is not None:
        dynamics = None  # those of the draws are of the file's own
        of_cube = options.recording.suffix == ".nc"
        recording = read_recording(
            options.recording, network=settings["network"] if of_cube else None, variable=settings["variable"]
        )
    elif settings.get("tau_range") is not None:
        recording = replace(recording, tau=None)  # the file has an estimate
    if recording.activity.shape[-1] != draws.shape[-1]:
        raise ValueError(
            f"{options.recording} must be of {draws.shape[-1]} neurons, as the posterior is; got "
            f"{recording.activity.shape[-1]}."
        )
    if options.prior is not None and settings.get("gain") is not None:
        raise ValueError(
            f"a prior has gains of its own, and {options.posterior} was inferred with the gain {settings['gain']:g}; "
            "infer it without a gain, or leave --prior out."
        )
    given = {name: getattr(options, name) for name in ("checkpoint", "family") if getattr(options, name) is not None}
    if options.closing is not None:
        if options.closing and options.method != "gibbs":
            raise ValueError(f"draws refined by {options.method!r} are not closed; leave --closing out, or take gibbs.")
        settings["closing"] = options.closing
    # Where another posterior refines than the draws are of, nothing says that they are nearly right.
    known = {"checkpoint": settings.get("checkpoint") or "base", "family": settings.get("family")}
    another = options.recording is not None or settings.get("prior") or settings.get("refine") not in (None, "gibbs")
    another = another or any(value != known[name] for name, value in given.items())
    settings |= given | {"refine": options.method}
    settings |= {name: getattr(options, name) for name in ("prior", "sweeps", "rho", "likelihood", "window", "seed")}
    if another and options.method == "gibbs" and options.prior is None:
        far = {"sweeps": SWEEPS, "rho": 1.0}
        settings |= {name: value for name, value in far.items() if settings[name] is None}
    result = infer(recording, InferenceConfig(**settings), draws=draws, dynamics=dynamics, progress=True)
    report(result, save_posterior(result, options.out))
    return 0
