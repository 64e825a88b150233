"""One self-contained page of tables and figures: what the reports of evaluations and benchmarks are written with.

A page needs no network, follows the reader's light or dark mode and can be read by keyboard and screen reader: every
table has a caption and marked headers, every figure a text that says in numbers what is to be seen, the best value of a
column is in bold, on a ground of its own, and named as such for those who cannot see it, and each column says which
values are better. What few readers need is folded, in the browser's own way, which needs no script.

References:
    Web Content Accessibility Guidelines 2.2 (W3C, 2023), https://www.w3.org/TR/WCAG22/
"""

from __future__ import annotations

import base64
import io
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

from neurosde.evaluation.page_table import Table, shown_table
from neurosde.provenance import whole_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure
from PIL import Image

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
    """A part of a page: a heading, then paragraphs, tables, figures, and what is folded."""

    title: str
    text: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    pictures: tuple[Picture, ...] = ()
    folds: tuple[Fold, ...] = ()


@dataclass(frozen=True)
class Fold:
    """What is shown when its title is clicked on or chosen by keyboard.

    Attributes:
        title: what always stands there.
        hint: what stands behind it, in a quieter colour.
        text: paragraphs, then tables, figures, and folds within the fold.
        open: whether it is open from the start.
    """

    title: str
    hint: str = ""
    text: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    pictures: tuple[Picture, ...] = ()
    folds: tuple[Fold, ...] = ()
    open: bool = False

    def __post_init__(self) -> None:
        if not self.title:
            raise ValueError("what is folded must have a title, by which it is opened; got none.")


def picture(name: str, figure: Figure, caption: str, alt: str) -> Picture:
    """Return a matplotlib figure as a picture of a page, of 256 colours: a third of the bytes that all would take.

    They are chosen to be near all that there are: cuts at the median merge the rare ones at the ends of colour bars.
    """
    drawn, kept = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=DPI)
    Image.open(drawn).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE).save(kept, "png", optimize=True)
    return Picture(name, kept.getvalue(), caption, alt)


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
    html = template.render(
        title=title,
        summary=summary,
        notes=notes,
        sections=[_shown(section) for section in sections],
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
    for one in _pictures(sections):
        with whole_file(path.with_name(f"{one.name}.png")) as temporary:
            temporary.write_bytes(one.png)
    with whole_file(path) as temporary:
        temporary.write_text(render_page(title, sections, made, summary=summary, notes=notes), encoding="utf-8")
    return path


def _pictures(holders: Sequence[Section | Fold]) -> list[Picture]:
    return [one for holder in holders for one in (*holder.pictures, *_pictures(holder.folds))]


def _shown(holder: Section | Fold) -> dict[str, Any]:
    """A section or a fold as the template takes it."""
    own = {"hint": holder.hint, "open": holder.open} if isinstance(holder, Fold) else {}
    return own | {
        "title": holder.title,
        "text": holder.text,
        "tables": [shown_table(table) for table in holder.tables],
        "pictures": [_shown_picture(one) for one in holder.pictures],
        "folds": [_shown(fold) for fold in holder.folds],
    }


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
