"""Ensembles on a command line: one option for each parameter that any of them has, and how to read them back."""

from __future__ import annotations

from argparse import SUPPRESS, Namespace
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from neurosde.datasets.ensembles import ENSEMBLES, Ensemble, Gaussian, make_ensemble
from neurosde.options import OptionParser, add_options

PARAMETER_NAMES = frozenset({item.name for kind in ENSEMBLES.values() for item in fields(kind)} | {"gain_high"})


def add_ensemble_options(parser: OptionParser, default: str | None = "gaussian", several: bool = False) -> None:
    """Add --ensemble, the gain, and each ensemble's own parameters.

    Args:
        parser: where to add them.
        default: ensemble where --ensemble is not given.
        several: whether --ensemble takes several names.
    """
    group = parser.add_argument_group("ensemble")
    explain = f"(default {default})" if default else None
    names: dict[str, Any] = {"nargs": "+", "metavar": "NAME"} if several else {}
    group.add_argument(
        "--ensemble", dest="ensemble_name", choices=sorted(ENSEMBLES), default=default, help=explain, **names
    )
    add_options(group, Gaussian)  # the gain, which all of them have
    group.add_argument(
        "--g-high", "--gain-high", dest="gain_high", type=float, default=SUPPRESS, help="draw gains from [g, g-high]"
    )
    for kind in ENSEMBLES.values():
        add_options(parser.add_argument_group(f"{kind.name} ensemble"), kind, skip=("gain",))


def given_parameters(options: Namespace) -> dict[str, Any]:
    """Parameters of ensembles that were given on the command line."""
    return {name: value for name, value in vars(options).items() if name in PARAMETER_NAMES}


def ensemble_from_options(options: Namespace) -> Ensemble:
    """Return the ensemble that the options name.

    Raises:
        ValueError: a parameter that this ensemble does not have, or a value out of range.
    """
    return make_ensemble(options.ensemble_name, **given_parameters(options))


def ensembles_from_options(options: Namespace) -> tuple[Ensemble, ...]:
    """Return the ensembles that the options name, each with those of the given parameters that it has.

    Raises:
        ValueError: a parameter that none of them has, or a value out of range.
    """
    names, given = options.ensemble_name or [], given_parameters(options)
    own = {name: {item.name for item in fields(ENSEMBLES[name])} | {"gain_high"} for name in names}
    if unknown := sorted(given.keys() - set().union(*own.values())):
        raise ValueError(f"none of the ensembles {names} has the parameters {unknown}; name one with --ensemble.")
    return tuple(
        make_ensemble(name, **{key: value for key, value in given.items() if key in own[name]}) for name in names
    )


def plain_parameters(ensemble: Ensemble) -> dict[str, Any]:
    """Return name and parameters as they stand in the configuration of a cube."""
    parameters = asdict(ensemble)  # type: ignore[call-overload]
    return {"name": ensemble.name, **parameters.pop("base", {}), **parameters}  # a gain mixture has a base


def ensemble_from_config(config: Mapping[str, Any]) -> Ensemble | None:
    """Return the ensemble in the configuration of a cube; None where it names none.

    Raises:
        ValueError: an unknown ensemble or parameter, or a value out of range.
    """
    parameters = config.get("ensemble")
    if not isinstance(parameters, Mapping) or "name" not in parameters:
        return None
    return make_ensemble(**parameters)
