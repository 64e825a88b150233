"""`neurosde sample prior`: weights drawn from a trained prior, as a cube."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from torch import Tensor

from neurosde.datasets.schema import SCHEMA_VERSION, variables
from neurosde.models.diffusion_prior import STEPS, DiffusionPrior, default_steps, load_prior
from neurosde.models.samplers import Method
from neurosde.options import OptionParser, add_options, from_options
from neurosde.provenance import global_attributes, make_folder, whole_file
from neurosde.validation import check_count


@dataclass(frozen=True)
class PriorSampling:
    """What to draw from a prior."""

    num: int = field(default=100, metadata={"help": "number of matrices"})
    N: int = field(default=50, metadata={"help": "neurons", "flags": ("--N",)})
    family: str | None = field(default=None, metadata={"help": "ensemble, for a prior of several (default: any)"})
    steps: int | None = field(default=None, metadata={"help": f"noise levels (default {STEPS}, more of many neurons)"})
    method: Method = field(default="multistep", metadata={"help": "sampler"})
    seed: int = field(default=0, metadata={"help": "seed"})

    def __post_init__(self) -> None:
        check_count(self.num, "num")
        check_count(self.N, "N", 2)
        if self.steps is not None:
            check_count(self.steps, "steps", 2)
        check_count(self.seed, "seed", 0)


def samples_cube(prior: DiffusionPrior, weights: Tensor, config: PriorSampling, checkpoint: str) -> xr.Dataset:
    """Return draws as a dataset in the layout of a cube, without activity.

    Args:
        prior: what they were drawn from.
        weights: W (draw, post, pre), shape (num, N, N).
        config: how they were drawn.
        checkpoint: name of the prior.
    """
    num, N = len(weights), weights.shape[-1]
    levels = config.steps or default_steps(N)
    coordinates = {"network": np.arange(num), "post": np.arange(N), "pre": np.arange(N)}
    about = variables()["weights"]
    dataset = xr.Dataset(
        {"weights": (about.dims, weights.cpu().numpy().astype(about.dtype), about.attributes)},
        coords={
            name: (name, values, {"long_name": f"index of the {name}", "units": "1"})
            for name, values in coordinates.items()
        },
    )
    training: dict[str, Any] = dict(prior.config.training)
    ensembles = {kind["name"]: kind for kind in training.get("ensembles", ())}
    family = config.family or (next(iter(ensembles)) if len(ensembles) == 1 else None)
    known = {} if family is None else {"ensemble": ensembles[family]}
    dataset.attrs = global_attributes(
        "Recurrent weights drawn from a diffusion prior",
        f"{num} matrices of {N} neurons drawn from the prior {checkpoint} by {config.method}, {levels} levels.",
        {**vars(config), "checkpoint": checkpoint, "training": training, **known},
        config.seed,
    ) | {"schema_version": SCHEMA_VERSION}
    return dataset


def add_arguments(parser: OptionParser) -> None:
    """Add the options of `neurosde sample prior`."""
    parser.add_argument(
        "checkpoint", help="file or folder of neurosde train prior, or a prior that comes with neurosde"
    )
    add_options(parser, PriorSampling)
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    parser.add_argument("--out", type=Path, default=Path("samples.nc"), help="cube of the draws (default samples.nc)")


def run(options: Namespace) -> int:
    """Draw, and write the draws."""
    config = from_options(PriorSampling, options)
    if options.out.suffix != ".nc":
        raise ValueError(f"--out must be a netCDF file, NAME.nc; got {options.out}.")
    prior = load_prior(options.checkpoint, options.device)
    make_folder(options.out)
    weights = prior.sample(
        config.num, config.N, family=config.family, steps=config.steps, method=config.method, generator=config.seed,
        progress=True,
    )  # fmt: skip
    with whole_file(options.out) as temporary:
        samples_cube(prior, weights, config, options.checkpoint).to_netcdf(temporary, engine="netcdf4")
    print(f"{options.out}: {config.num} matrices of {config.N} neurons")
    return 0
