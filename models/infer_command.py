"""`neurosde infer`: a posterior over the weights behind a recording."""

from __future__ import annotations

import math
from argparse import Namespace
from pathlib import Path

from neurosde.models.inference import Inference, infer
from neurosde.models.inference_config import InferenceConfig
from neurosde.models.posterior_file import check_name, save_posterior
from neurosde.options import OptionParser, add_options, from_options
from neurosde.provenance import make_folder


def add_arguments(parser: OptionParser) -> None:
    """Add the options of `neurosde infer`."""
    parser.add_argument(
        "recording", type=Path, help="activity: netCDF, npz, npy, csv, MATLAB or NWB; (trial,) time, neuron"
    )
    add_options(parser, InferenceConfig)
    parser.add_argument("--out", type=Path, default=Path("posterior.nc"), help="posterior (default posterior.nc)")


def run(options: Namespace) -> int:
    """Infer, say what was estimated, and write the posterior."""
    make_folder(check_name(options.out, options.recording))  # before the work, not after it
    result = infer(options.recording, from_options(InferenceConfig, options), progress=True)
    report(result, save_posterior(result, options.out))
    return 0


def report(result: Inference, path: Path) -> None:
    """Say what an inference rests on, and where it is."""
    trials, samples, N = result.recording.activity.shape
    print(f"{result.recording.source}: {N} neurons, {trials} trials of {samples} times")
    for note in result.notes:
        print(f"  {note}")
    learnt = "" if math.isnan(result.contraction) else f", contraction {result.contraction:.3f}"
    refined = "" if result.config.refine is None else f" refined by {result.config.refine}"
    print(f"Posterior ({result.config.method}{refined}, {len(result.draws)} draws{learnt}): {path}")
