"""Tables of a page: what is in them, which values are the best, and how they are shown."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, Literal

import numpy as np
import pandas as pd

# Which values of a column are better: lower ones, higher ones, those nearest to a number; None: they are not compared.
Sense = Literal["lower", "higher"] | float | None


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        caption: what it shows.
        data: a row for each label; the names of its index stand over the labels. Of an index of several levels, rows
            that agree in all but the last are compared with each other.
        senses: which values of a column are better.
        titles: what stands over a column, by default its name with spaces for underscores.
        low: lower ends of intervals, of the columns that have them.
        high: their upper ends.
        interval: what the intervals are, such as "95 % interval".
        digits: significant digits.
    """

    caption: str
    data: pd.DataFrame
    senses: Mapping[str, Sense] = field(default_factory=dict)
    titles: Mapping[str, str] = field(default_factory=dict)
    low: pd.DataFrame | None = None
    high: pd.DataFrame | None = None
    interval: str = ""
    digits: int = 4

    def __post_init__(self) -> None:
        if not isinstance(self.data, pd.DataFrame):
            raise TypeError(f"the data of a table must be a pandas DataFrame; got {type(self.data).__name__}.")
        if not self.caption:
            raise ValueError("a table must have a caption that says what it shows; got none.")
        for what, named in (("senses", self.senses), ("titles", self.titles)):
            unknown = [name for name in named if name not in self.data.columns]
            if unknown:
                raise ValueError(f"{what} must name columns, {list(self.data.columns)}; got {unknown}.")
        for sense in self.senses.values():
            if isinstance(sense, str) and sense not in ("lower", "higher"):
                raise ValueError(f"a sense must be 'lower', 'higher', a number or None; got {sense!r}.")
        ends = (self.low, self.high)
        if any(end is not None for end in ends):
            if self.low is None or self.high is None or not self.interval:
                raise ValueError("intervals need low, high, and a text that says what they are; one is missing.")
            for end in (self.low, self.high):
                if not end.index.equals(self.data.index) or not set(end.columns) <= set(self.data.columns):
                    raise ValueError("low and high must have the rows of the data and some of its columns.")


def best(column: pd.Series, sense: Sense, digits: int = 4) -> np.ndarray:
    """Mark the best values of a column: of each group of rows those that are the best as they are shown.

    Nothing is the best of what is all the same, or of a single value; what is not finite is not compared.

    Args:
        column: a value for each row; of an index of several levels, the last one tells apart what is compared.
        sense: which values are better.
        digits: significant digits to which values are shown.

    Returns:
        Whether each value is among the best, shape (row,).
    """
    marked = np.zeros(len(column), dtype=bool)
    if sense is None:
        return marked
    values = pd.to_numeric(column, errors="coerce").to_numpy(dtype=np.float64)
    worse = {"lower": values, "higher": -values}[sense] if isinstance(sense, str) else np.abs(values - sense)
    levels = column.index.nlevels
    group = np.zeros(len(column), dtype=int) if levels == 1 else column.groupby(level=list(range(levels - 1))).ngroup()
    for one in np.unique(group):
        rows = np.flatnonzero((group == one) & np.isfinite(worse))
        shown = [f"{worse[row]:.{digits}g}" for row in rows]
        if len(set(shown)) > 1:
            winner = shown[int(np.argmin(worse[rows]))]
            marked[[row for row, text in zip(rows, shown, strict=True) if text == winner]] = True
    return marked


def shown_table(table: Table) -> dict[str, Any]:
    """Return a table as the page's template takes it."""
    data = table.data
    marked = {name: best(data[name], table.senses.get(name), table.digits) for name in data.columns}
    columns = [
        {
            "title": table.titles.get(name, str(name).replace("_", " ")),
            "sense": _sense(table.senses.get(name)),
            "number": bool(data[name].map(lambda value: isinstance(value, Real)).any()),
        }
        for name in data.columns
    ]
    rows = []
    for number, label in enumerate(data.index):
        cells = [
            {
                "text": _text(data[name].iloc[number], table.digits),
                "best": bool(marked[name][number]),
                "interval": _interval(table, name, number),
                "number": column["number"],
            }
            for name, column in zip(data.columns, columns, strict=True)
        ]
        rows.append({"labels": label if isinstance(label, tuple) else (label,), "cells": cells})
    notes = [f"In brackets: {table.interval}."] if table.interval else []
    if any(cell["text"] == "–" for row in rows for cell in row["cells"]):
        notes.append("A dash stands where there is no value.")
    if any(marks.any() for marks in marked.values()):
        notes.append("The best of a column is in bold, on a coloured ground.")
    names = [str(name or "").replace("_", " ") for name in data.index.names]
    return {"caption": table.caption, "note": " ".join(notes), "row_names": names, "columns": columns, "rows": rows}


def _sense(sense: Sense) -> str:
    if sense is None:
        return ""
    return f"{sense} is better" if isinstance(sense, str) else f"nearest to {sense:g} is best"


def _text(value: Any, digits: int) -> str:
    if isinstance(value, Real):
        return "–" if math.isnan(value) else f"{float(value):.{digits}g}"
    return "–" if value is None else str(value)


def _interval(table: Table, name: str, row: int) -> str:
    if table.low is None or table.high is None or name not in table.low or name not in table.high:
        return ""
    low, high = table.low[name].iloc[row], table.high[name].iloc[row]
    return "" if math.isnan(low) or math.isnan(high) else f"{low:.{table.digits}g} … {high:.{table.digits}g}"
