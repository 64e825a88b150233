"""`neurosde train cfg`: a diffusion posterior over weights, given recordings."""

from __future__ import annotations

from argparse import Namespace

from neurosde.models.train_command import add_training_options, report, training_from_options
from neurosde.models.training_config import PosteriorTraining
from neurosde.models.training_run import TrainingRun, train_posterior
from neurosde.options import OptionParser, from_options


def add_arguments(parser: OptionParser) -> None:
    """Add the options of `neurosde train cfg`."""
    add_training_options(parser, PosteriorTraining)


def run(options: Namespace) -> int:
    """Train, or go on with it, and say where the posterior is."""
    config = training_from_options(PosteriorTraining, options)
    final = options.out / "posterior.safetensors"
    before = final.exists()
    posterior = train_posterior(config, options.out, from_options(TrainingRun, options))
    report(final, before, config, posterior)
    return 0
