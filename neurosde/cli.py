"""The `neurosde` command."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence

from neurosde._version import __version__
from neurosde.options import OptionParser, run_safely


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 done, 2 the user's to mend, 130 interrupted."""
    from neurosde.datasets import build_dataset
    from neurosde.evaluation import evaluate
    from neurosde.models import infer_command

    parser = OptionParser(
        prog="neurosde", description="Which wiring could have produced this activity, and how sure we can be."
    )
    parser.add_argument("--version", action="version", version=f"neurosde {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in (("build-dataset", build_dataset), ("infer", infer_command), ("evaluate", evaluate)):
        summary = (module.__doc__ or "").strip().splitlines()[0]
        sub = commands.add_parser(name, help=summary, description=summary)
        module.add_arguments(sub)
        sub.set_defaults(run=module.run)
    given = list(sys.argv[1:] if arguments is None else arguments)
    options: Namespace = parser.parse_args([given[0].replace("_", "-"), *given[1:]] if given else [])
    return run_safely(options.run, options)
