"""`neurosde train prior`: a diffusion prior over weights."""

from __future__ import annotations

import os
from argparse import Namespace
from pathlib import Path
from typing import Any

from neurosde.datasets.ensemble_options import add_ensemble_options, ensembles_from_options
from neurosde.models.training_config import PriorTraining, read_training
from neurosde.models.training_run import Model, TrainingRun, train_prior
from neurosde.options import OptionParser, add_options, from_options


def add_arguments(parser: OptionParser) -> None:
    """Add the options of `neurosde train prior`."""
    add_training_options(parser, PriorTraining)


def run(options: Namespace) -> int:
    """Train, or go on with it, and say where the prior is."""
    config = training_from_options(PriorTraining, options)
    final = options.out / "prior.safetensors"
    before = final.exists()
    prior = train_prior(config, options.out, from_options(TrainingRun, options))
    report(final, before, config, prior)
    return 0


def add_training_options(parser: OptionParser, kind: type[PriorTraining]) -> None:
    """Add the options of a training."""
    parser.add_argument("--out", type=Path, required=True, metavar="PATH", help="folder of the result and its log")
    parser.add_argument("--config", type=Path, metavar="PATH", help="TOML file of a training; options go before it")
    add_options(parser, kind, skip=("ensembles",) if kind is PriorTraining else ("ensembles", "teachers"))
    add_ensemble_options(parser, default=None, several=True)
    add_options(parser.add_argument_group("execution"), TrainingRun)


def training_from_options(kind: type[PriorTraining], options: Namespace) -> Any:
    """Return the training that the options, and the file that they name, describe."""
    values: dict[str, Any] = read_training(options.config, kind) if options.config is not None else {}
    given = ensembles_from_options(options)
    if given:
        values["ensembles"] = given
        values.pop("dataset", None)
    elif getattr(options, "dataset", ()):
        values.pop("ensembles", None)
    values = {name: value for name, value in values.items() if not hasattr(options, name)}
    return from_options(kind, options, **values)


def report(final: Path, before: bool, config: PriorTraining, model: Model) -> None:
    """Say where the result of a training is."""
    if os.environ.get("LOCAL_RANK", "0") != "0":  # one of several processes speaks
        return
    count = sum(parameter.numel() for parameter in model.network.parameters())
    done = "is trained already" if before else "trained"
    print(f"{final}: {done}, {config.steps} steps, {count} parameters, N = {', '.join(map(str, model.config.sizes))}")
