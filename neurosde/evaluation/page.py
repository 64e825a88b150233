"""One self-contained page of tables and figures: what the reports of evaluations and benchmarks are written with.

A page needs no network, follows the reader's light or dark mode and can be read by keyboard and screen reader: every
table has a caption and marked headers, every figure a text that says in numbers what is to be seen, the best value of a
column is in bold, on a ground of its own, and named as such for those who cannot see it, and each column says which
values are better.

References:
    Web Content Accessibility Guidelines 2.2 (W3C, 2023), https://www.w3.org/TR/WCAG22/
"""

from __future__ import annotations

import base64
import io
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jinja2
import numpy as np
import pandas as pd

from neurosde.provenance import whole_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Which values of a column are better: lower ones, higher ones, those nearest to a number; None: they are not compared.
Sense = Literal["lower", "higher"] | float | None
DPI = 150  # of figures; they are shown at the size that they were drawn for, 96 to the inch
MADE = {
    "history": "command",
    "date_created": "written",
    "neurosde_version": "neurosde",
    "git_commit": "commit",
    "seed": "seed",
    "recording": "recording",
    "network": "network",
    "config": "settings",
    "cpu_model": "processor",
    "threads": "threads",
}  # attributes of a file that say how it was made, and what a reader is told that they are


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


@dataclass(frozen=True)
class Picture:
    """A figure as PNG; make one with `picture`.

    Attributes:
        name: of its file, without the ending.
        png: the file.
        caption: what it is.
        alt: what is to be seen, in numbers, for those who cannot see it.
    """

    name: str
    png: bytes
    caption: str
    alt: str

    def __post_init__(self) -> None:
        if not self.alt or not self.caption:
            raise ValueError(f"figure {self.name!r} must have a caption and a text of what is to be seen in it.")


@dataclass(frozen=True)
class Section:
    """A part of a page: a heading, then paragraphs, tables and figures."""

    title: str
    text: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    pictures: tuple[Picture, ...] = ()


def picture(name: str, figure: Figure, caption: str, alt: str) -> Picture:
    """Return a matplotlib figure as a picture of a page."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return Picture(name, buffer.getvalue(), caption, alt)


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


def render_page(
    title: str,
    sections: Sequence[Section],
    made: Mapping[str, Mapping[str, Any]],
    *,
    summary: str = "",
    notes: str = "",
) -> str:
    """Return a page as HTML.

    Args:
        title: what the page is about.
        sections: its parts, in order.
        made: the global attributes (`neurosde.provenance.global_attributes`) of each file that it rests on, under a
            name for the file: command, versions, commit and settings are shown at the end.
        summary: a paragraph that follows the title.
        notes: what the reader must know before anything else.
    """
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(files("neurosde.evaluation").joinpath("page.html").read_text("utf-8"))
    shown = [
        {
            "title": section.title,
            "text": section.text,
            "tables": [_shown_table(table) for table in section.tables],
            "pictures": [_shown_picture(one) for one in section.pictures],
        }
        for section in sections
    ]
    html = template.render(
        title=title,
        summary=summary,
        notes=notes,
        sections=shown,
        made={name: _made(attributes) for name, attributes in made.items()},
    )
    return html.lstrip()


def write_page(
    folder: str | Path,
    title: str,
    sections: Sequence[Section],
    made: Mapping[str, Mapping[str, Any]],
    *,
    summary: str = "",
    notes: str = "",
) -> Path:
    """Write a page as `report.html` into a folder, and its figures as PNG beside it; see `render_page`.

    Returns:
        Path of the page.

    Raises:
        OSError: the folder cannot be written, or the disk is full.
    """
    path = Path(folder) / "report.html"
    for section in sections:
        for one in section.pictures:
            with whole_file(path.with_name(f"{one.name}.png")) as temporary:
                temporary.write_bytes(one.png)
    with whole_file(path) as temporary:
        temporary.write_text(render_page(title, sections, made, summary=summary, notes=notes), encoding="utf-8")
    return path


def _shown_table(table: Table) -> dict[str, Any]:
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


def _shown_picture(one: Picture) -> dict[str, Any]:
    width, height = struct.unpack(">II", one.png[16:24])  # of the header that begins every PNG
    scale = 96 / DPI
    return {
        "data": base64.b64encode(one.png).decode("ascii"),
        "width": round(width * scale),
        "height": round(height * scale),
        "caption": one.caption,
        "alt": one.alt,
    }


def _made(attributes: Mapping[str, Any]) -> list[tuple[str, str]]:
    there = [(what, str(attributes[name])) for name, what in MADE.items() if name in attributes]
    others = sorted(name for name in attributes if name.endswith("_version") and name not in MADE)
    return there + [(name.removesuffix("_version"), str(attributes[name])) for name in others]


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
