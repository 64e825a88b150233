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
        half: half widths of intervals, of the columns that have them, shown as ±; instead of low and high.
        plain: one of many that are alike: what signs mean and which values are better is said elsewhere, and intervals
            have the values' colour.
    """

    caption: str
    data: pd.DataFrame
    senses: Mapping[str, Sense] = field(default_factory=dict)
    titles: Mapping[str, str] = field(default_factory=dict)
    low: pd.DataFrame | None = None
    high: pd.DataFrame | None = None
    interval: str = ""
    digits: int = 4
    half: pd.DataFrame | None = None
    plain: bool = False

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
        given = [frame for frame in (self.low, self.high, self.half) if frame is not None]
        if given and (len(given) != (2 if self.half is None else 1) or not self.interval):
            raise ValueError("intervals need low and high, or half alone, and a text that says what they are.")
        for frame in given:
            if not frame.index.equals(self.data.index) or not set(frame.columns) <= set(self.data.columns):
                raise ValueError("low, high and half must have the rows of the data and some of its columns.")


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
        shown = [_number(worse[row], digits) for row in rows]
        if len(set(shown)) > 1:
            winner = shown[int(np.argmin(worse[rows]))]
            marked[[row for row, text in zip(rows, shown, strict=True) if text == winner]] = True
    return marked


def shown_table(table: Table) -> dict[str, Any]:
    """Return a table as the page's template takes it."""
    data = table.data
    senses = [_sense(table.senses.get(name)) for name in data.columns]
    common = senses[0] if len(senses) > 1 and len(set(senses)) == 1 else ""  # said once, not over each column
    columns, cells = [], []
    for name in data.columns:
        values = list(data[name])
        columns.append(
            {
                "title": table.titles.get(name, str(name).replace("_", " ")),
                "sense": "" if common or table.plain else _sense(table.senses.get(name)),
                "number": any(isinstance(value, Real) for value in values),
            }
        )
        marked = best(data[name], table.senses.get(name), table.digits)
        texts = [_text(value, table.digits, zeros=table.half is not None) for value in values]
        cells.append(list(zip(texts, marked.tolist(), _intervals(table, name), strict=True)))
    rows = [
        {"labels": label if isinstance(label, tuple) else (label,), "cells": row}
        for label, row in zip(data.index, zip(*cells, strict=True), strict=True)
    ]
    return {
        "caption": table.caption, "note": "" if table.plain else _notes(table, cells, common), "plain": table.plain,
        "row_names": [str(name or "").replace("_", " ") for name in data.index.names], "columns": columns,
        "rows": rows, "numbers": all(column["number"] for column in columns),
    }  # fmt: skip


def _notes(table: Table, cells: list[list[tuple[str, bool, str]]], sense: str) -> str:
    """What a reader must know of values and signs in the table."""
    notes = [f"{sense[0].upper()}{sense[1:]}."] if sense else []
    if table.interval:
        notes.append(f"{'In brackets' if table.half is None else 'After ±'}: {table.interval}.")
    if any(text == "–" for column in cells for text, *_ in column):
        notes.append("A dash stands where there is no value.")
    if any(marked for column in cells for _, marked, _ in column):
        notes.append("The best of a column is in bold, on a coloured ground.")
    return " ".join(notes)


def _sense(sense: Sense) -> str:
    if sense is None:
        return ""
    return f"{sense} is better" if isinstance(sense, str) else f"nearest to {sense:g} is best"


def _text(value: Any, digits: int, *, zeros: bool) -> str:
    if isinstance(value, Real):
        return "–" if math.isnan(value) else _number(float(value), digits, zeros=zeros)
    return "–" if value is None else str(value)


def _number(value: float, digits: int, *, zeros: bool = False) -> str:
    """Significant digits, zeros among them if they are wanted; without an exponent up to a million."""
    if 10.0 ** (digits - 1) <= abs(value) < 1e6:
        return f"{value:.0f}"
    return f"{value:#.{digits}g}" if zeros else f"{value:.{digits}g}"


def _intervals(table: Table, name: str) -> list[str]:
    if table.half is not None and name in table.half:
        return ["" if math.isnan(half) else f"± {_number(half, 2, zeros=True)}" for half in table.half[name]]
    if table.low is None or table.high is None or name not in table.low or name not in table.high:
        return [""] * len(table.data)
    ends = zip(table.low[name], table.high[name], strict=True)
    return [
        "" if math.isnan(low) or math.isnan(high)
        else f"({_number(low, table.digits)} … {_number(high, table.digits)})"
        for low, high in ends
    ]  # fmt: skip
