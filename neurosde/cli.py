"""The `neurosde` command."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from neurosde._version import __version__
from neurosde.options import OptionParser, command_words, run_safely

COMMANDS = {
    "build-dataset": ("neurosde.datasets.build_dataset", "draw networks, simulate them, store both as a cube"),
    "info": ("neurosde.datasets.info_command", "say what a cube, a folder of shards or a posterior holds"),
    "plot": ("neurosde.datasets.plot_command", "draw one network of a cube: weights, eigenvalues, activity"),
    "observe": ("neurosde.datasets.observe_command", "make the cube that an experiment would have seen of a cube"),
    "export": ("neurosde.models.export_command", "write a cube or a posterior as a Zarr store, or a posterior as NWB"),
    "infer": ("neurosde.models.infer_command", "infer a posterior over the weights behind a recording"),
    "refine": ("neurosde.models.refine_command", "move a posterior's draws by the likelihood and a trained prior"),
    "train prior": ("neurosde.models.train_command", "train a diffusion prior over weights"),
    "train cfg": ("neurosde.models.train_cfg_command", "train a diffusion posterior over weights, given recordings"),
    "sample prior": ("neurosde.models.sample_command", "draw weights from a diffusion prior"),
    "evaluate prior": ("neurosde.evaluation.evaluate_prior", "compare sampled weights with draws of their ensemble"),
    "evaluate": ("neurosde.evaluation.evaluate", "evaluate a posterior against truth and recording; write a report"),
    "benchmark": ("neurosde.evaluation.benchmark", "measure how well, and how fast"),
    "demo": ("neurosde.demo", "all of it once, in under two minutes"),
    "doctor": ("neurosde.julia.doctor", "say what neurosde runs on, and test its Julia"),
    "install-julia": ("neurosde.julia.install", "get a Julia into a private folder, without root"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 done, 2 the user's to mend, 130 interrupted."""
    given = command_words(arguments)
    if given:
        given[0] = given[0].replace("_", "-")
    if " ".join(given[:2]) in COMMANDS:
        given[:2] = [" ".join(given[:2])]
    parser = OptionParser(
        prog="neurosde", description="Which wiring could have produced this activity, and how sure we can be."
    )
    parser.add_argument("--version", action="version", version=f"neurosde {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, summary) in COMMANDS.items():
        sub = commands.add_parser(name, help=summary, description=summary)
        if given[:1] == [name]:  # only the command that runs is imported
            command = importlib.import_module(module)
            sub.set_defaults(run=getattr(command, "run", None))
            command.add_arguments(sub)
    options = parser.parse_args(given)
    return run_safely(options.run, options)
