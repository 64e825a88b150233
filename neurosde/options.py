"""Command-line options out of configuration dataclasses, so that each option is written once.

A field's name, type and default make its option; its metadata adds `help` and, where the field has its own spelling,
`flags`. Underscores work wherever dashes do.
"""

from __future__ import annotations

import argparse
import sys
import types
import typing
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from neurosde.julia.locate import JuliaError

_MENDABLE = (
    ValueError, TypeError, OSError, OverflowError, FloatingPointError, MemoryError, ImportError, JuliaError
)  # fmt: skip


class OptionParser(argparse.ArgumentParser):
    """An argument parser that says what is wrong in one line."""

    def error(self, message: str) -> typing.NoReturn:
        """Exit with status 2 and one line."""
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def command_words(arguments: Sequence[str] | None) -> list[str]:
    """Return the words of a command line, by default this process's, with --num_networks spelt --num-networks."""
    return [_dashed(word) for word in (sys.argv[1:] if arguments is None else arguments)]


def add_options(parser: argparse._ActionsContainer, config: type, *, skip: Iterable[str] = ()) -> None:
    """Add one option for each field of a configuration dataclass.

    Fields that are not given on the command line are left out of the namespace, so that the dataclass keeps the word on
    defaults.
    """
    hints = typing.get_type_hints(config)
    for item in fields(config):
        if item.name not in skip:
            _add_option(parser, item, hints[item.name])


def from_options(config: type, namespace: argparse.Namespace, **values: Any) -> Any:
    """Build the configuration from parsed options; `values` take precedence."""
    known = {item.name for item in fields(config)}
    given = {name: value for name, value in vars(namespace).items() if name in known}
    return config(**(given | values))


def run_safely(command: Callable[[argparse.Namespace], int], options: argparse.Namespace) -> int:
    """Run a command; what the user can mend ends in one line on stderr and status 2, Ctrl-C in status 130."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("default", category=UserWarning)
            warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
            return command(options)
    except _MENDABLE as error:
        print(f"error: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; give the same command again to go on", file=sys.stderr)
        return 130


def _add_option(parser: argparse._ActionsContainer, item: Field, hint: Any) -> None:
    flags = item.metadata.get("flags", ("--" + item.name.replace("_", "-"),))
    options: dict[str, Any] = {"dest": item.name, "default": argparse.SUPPRESS}
    if get_origin(hint) in (typing.Union, types.UnionType):
        (hint,) = [kind for kind in get_args(hint) if kind is not types.NoneType]
    required = item.default is MISSING and item.default_factory is MISSING
    default = None if required or item.default is MISSING else item.default
    explain = item.metadata.get("help", "")
    if hint is bool:
        options["action"] = argparse.BooleanOptionalAction
    elif get_origin(hint) is Literal:
        options["choices"] = get_args(hint)
    elif get_origin(hint) is tuple:
        kinds = get_args(hint)
        options |= {"nargs": "+" if kinds[-1] is Ellipsis else len(kinds), "type": kinds[0], "action": _Tuple}
    else:
        options["type"] = hint
        if hint is Path:
            options["metavar"] = "PATH"
    options["required"] = required
    if hint is not bool and default not in (None, ()):
        explain += f" (default {' '.join(map(str, default)) if isinstance(default, tuple) else default})"
    parser.add_argument(*flags, help=explain, **options)


class _Tuple(argparse.Action):
    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        setattr(namespace, self.dest, tuple(values))


def _dashed(word: str) -> str:
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value
