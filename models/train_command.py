"""`neurosde train prior`: a diffusion prior over weights."""

from __future__ import annotations

import os
from argparse import Namespace
from pathlib import Path
from typing import Any

from neurosde.datasets.ensemble_options import add_ensemble_options, ensembles_from_options
from neurosde.models.train_prior import TrainingRun, train_prior
from neurosde.models.training_config import PriorTraining, read_training
from neurosde.options import OptionParser, add_options, from_options


def add_arguments(parser: OptionParser) -> None:
    """Add the options of `neurosde train prior`."""
    parser.add_argument("--out", type=Path, required=True, metavar="PATH", help="folder of the prior and its log")
    parser.add_argument("--config", type=Path, metavar="PATH", help="TOML file of a training; options go before it")
    add_options(parser, PriorTraining, skip=("ensembles",))
    add_ensemble_options(parser, default=None, several=True)
    add_options(parser.add_argument_group("execution"), TrainingRun)


def run(options: Namespace) -> int:
    """Train, or go on with it, and say where the prior is."""
    values: dict[str, Any] = read_training(options.config) if options.config is not None else {}
    given = ensembles_from_options(options)
    if given:
        values["ensembles"] = given
        values.pop("dataset", None)
    elif getattr(options, "dataset", ()):
        values.pop("ensembles", None)
    values = {name: value for name, value in values.items() if not hasattr(options, name)}
    config = from_options(PriorTraining, options, **values)
    final = options.out / "prior.safetensors"
    before = final.exists()
    prior = train_prior(config, options.out, from_options(TrainingRun, options))
    if os.environ.get("LOCAL_RANK", "0") != "0":  # one of several processes speaks
        return 0
    count = sum(parameter.numel() for parameter in prior.network.parameters())
    done = "is trained already" if before else "trained"
    print(f"{final}: {done}, {config.steps} steps, {count} parameters, N = {', '.join(map(str, prior.config.sizes))}")
    return 0
