"""What is measured in a cube of `neurosde benchmark inference`, as the cube says it.

A measure is a label of the dimension `metric` of `results`, or a variable of its own over (task, method) or
(task, method, network). What is said of it stands with it, and reports take it from there:

| | of a label, a coordinate along `metric` | of a variable, an attribute |
|---|---|---|
| what it is | `metric_long_name` | `long_name` |
| its unit, "1" where it has none | `metric_units` | `units` |
| which values are better: "lower", "higher", a number that is best, or nothing | `metric_better` | `better` |
| the part of a report that it belongs to | `metric_group` | `group` |

Of a label without these, `METRICS` says them; what is unknown there, too, is not compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from neurosde.evaluation.exact_reference import METRICS as OF_EXACT
from neurosde.evaluation.inference_metrics import METRICS, RANKS
from neurosde.evaluation.page_table import Sense

GROUPS = {
    "Recovery": (
        "relative_error", "correlation", "r2", "edge_auc", "sign_accuracy", "eigenvalue_error", "singular_value_error",
        "spectral_radius_error",
    ),
    "Posterior": ("energy_score", "crps", "log_score", "coverage_90", "contraction"),
    "Exact posterior": OF_EXACT,
    "Prediction": ("held_out", "misfit", "activity_distance", "lyapunov_error", "fixed_point_distance"),
    "Cost": ("seconds", "memory"),
    "Calibration": ("credibility", *RANKS, "local_c2st", "local_c2st_p"),
}  # fmt: skip
OTHERS = "Further measures"  # the group of what belongs to no other


@dataclass(frozen=True)
class Measure:
    """What a cube says of a measure.

    Attributes:
        name: label of the metric, or name of the variable.
        title: what it is, with its unit if it has one.
        sense: which values are better.
        group: the part of a report that it belongs to.
    """

    name: str
    title: str
    sense: Sense
    group: str


def measures(results: xr.Dataset) -> dict[str, Measure]:
    """Return all measures of a cube that have a value, those of a group beside each other in the order of `GROUPS`.

    Raises:
        ValueError: `better` of a measure is neither "lower" nor "higher" nor a number.
    """
    found = {}
    for name in map(str, results["metric"].values):
        about = {
            key: results[f"metric_{key}"].sel(metric=name).item()
            for key in ("long_name", "units", "better", "group")
            if f"metric_{key}" in results
        }
        found[name] = _measure(name, about)
    for key, variable in results.data_vars.items():
        of_task = {"task", "method"} <= set(variable.dims) <= {"task", "method", "network"}
        if of_task and np.issubdtype(variable.dtype, np.number):  # not what cells were made by
            found[str(key)] = _measure(str(key), variable.attrs)
    there = {name: one for name, one in found.items() if bool(values_of(results, name).notnull().any())}
    order = [*GROUPS, OTHERS]
    known = [name for names in GROUPS.values() for name in names]

    def place(one: Measure) -> tuple[int, int]:
        group = order.index(one.group) if one.group in order else len(order)
        return group, known.index(one.name) if one.name in known else len(known)

    return {one.name: one for one in sorted(there.values(), key=place)}


def values_of(results: xr.Dataset, name: str) -> xr.DataArray:
    """Return the values of a measure, over (task, method, network), or (task, method) of one without networks.

    Raises:
        KeyError: the cube has no such measure.
    """
    values = results["results"].sel({"metric": name}) if name in results["metric"].values else results[name]
    return values.transpose("task", "method", ...)


def _measure(name: str, about: Mapping[str, Any]) -> Measure:
    title, sense = METRICS.get(name, (name.replace("_", " "), None))
    title = str(about.get("long_name", title))
    unit = str(about.get("units", "1"))
    known = next((group for group, names in GROUPS.items() if name in names), OTHERS)
    return Measure(
        name,
        title if unit in ("1", "") else f"{title}, {unit}",
        _better(name, about["better"]) if "better" in about else sense,
        str(about.get("group", "")) or known,
    )


def _better(name: str, said: object) -> Sense:
    text = str(said)
    if text == "lower":
        return "lower"
    if text == "higher":
        return "higher"
    try:
        return float(text) if text else None
    except ValueError:
        raise ValueError(f"better of {name!r} must be 'lower', 'higher', a number or nothing; got {text!r}.") from None
