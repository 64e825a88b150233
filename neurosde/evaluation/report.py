"""The report: one HTML file with every table and figure inside it, and the figures as PNG beside it."""

from __future__ import annotations

import base64
import io
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2

from neurosde.provenance import whole_file

if TYPE_CHECKING:
    from neurosde.evaluation.evaluate import Evaluation


def write_report(evaluation: Evaluation, folder: str | Path) -> Path:
    """Write `report.html` and the figures into a folder.

    Returns:
        Path of the report.

    Raises:
        OSError: the folder cannot be written, or the disk is full.
    """
    from neurosde.evaluation.figures import figures  # here, since matplotlib is slow to import

    folder = Path(folder)
    pictures = []
    for name, (figure, caption) in figures(evaluation).items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=150)
        with whole_file(folder / f"{name}.png") as temporary:
            temporary.write_bytes(buffer.getvalue())
        pictures.append({"name": name, "caption": caption, "data": base64.b64encode(buffer.getvalue()).decode("ascii")})
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string(files("neurosde.evaluation").joinpath("report.html").read_text("utf-8"))
    tables = {"Recovery of W": evaluation.recovery, "Posterior-predictive checks": evaluation.predictive}
    html = template.render(
        attributes=evaluation.tree.attrs,
        notes=evaluation.tree.attrs["notes"],
        calibration=evaluation.calibration,
        constants={name: float(v) for name, v in evaluation.tree["constant_data"].data_vars.items() if v.ndim == 0},
        tables={name: table for name, table in tables.items() if table is not None},
        pictures=pictures,
    )
    path = folder / "report.html"
    with whole_file(path) as temporary:
        temporary.write_text(html, encoding="utf-8")
    return path
