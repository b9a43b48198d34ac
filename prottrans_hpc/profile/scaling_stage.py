"""The stage `scale-report`: from the runs of a study, or from its scaling.json alone, to numbers, pictures and the page."""

from __future__ import annotations

from pathlib import Path

from .. import durable, terminal
from ..errors import CheckpointError
from ..scaling_study import StudyDir, read_study
from ..stage import Request
from .scaling import Scaling, read_scaling, write_scaling
from .scaling_collect import collect
from .scaling_figures import Shown, draw_ledger, draw_overhead, draw_throughput, svg_of, write_png
from .scaling_html import headline, outlier_line, render_report
from .scaling_projected import read_projection
from .scaling_rows import csv_text, outliers_of, rows_of


def report(request: Request) -> None:
    """Write scaling.json, scaling.csv, the pictures and report.html into the folder `out`, and say what they say.

    Raises CheckpointError when nothing is measured there, ResourceError without matplotlib (the numbers are written then).
    """
    folder = StudyDir(Path(request["out"]))
    scaling = _scaling_of(folder)
    rows, outliers, projection = rows_of(scaling), outliers_of(scaling), read_projection(folder)
    durable.write_bytes(folder.scaling_csv, csv_text(rows).encode())
    shown = Shown(f"{scaling.recipe} on {scaling.machine}", rows, projection.points)
    figures = {"overhead": draw_overhead(shown), "throughput": draw_throughput(shown), "ledger": draw_ledger(shown)}
    for name, figure in figures.items():
        write_png(figure, folder.path / f"{name}.png")
    pictures = {name: svg_of(figure) for name, figure in figures.items()} | {"ledger-share": svg_of(draw_ledger(shown, as_share=True))}
    durable.write_bytes(folder.report_html, render_report(scaling, rows, outliers, projection, pictures).encode())
    terminal.note(headline(rows))
    for outlier in outliers:
        terminal.note(f"stands out: {outlier_line(outlier)}")
    terminal.note(f"report: {folder.report_html}")


def _scaling_of(folder: StudyDir) -> Scaling:
    """Collected from the runs where they are there, and written down; else as it was written."""
    if not folder.study_json.is_file() and not folder.scaling_json.is_file():
        raise CheckpointError(f"{folder.path} is no scaling study: it has neither {folder.study_json.name} nor {folder.scaling_json.name}")
    if not (folder.path / "points").is_dir() and folder.scaling_json.is_file():
        return read_scaling(folder.path)
    scaling = collect(folder, read_study(folder))
    write_scaling(folder.scaling_json, scaling)
    return scaling
