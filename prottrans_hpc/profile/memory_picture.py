"""The picture of a study of memory: largest model, largest batch and hours an epoch under each policy, beside the published bars of figure 3."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from .. import durable
from ..errors import missing_package
from ..stage import Request

_PANELS = {
    "parameters": ("largest model, M parameters", 1e-6),
    "local_batch": ("largest micro batch, sequences", 1.0),
    "epoch_hours": ("hours an epoch at that batch", 1.0),
}


def draw(request: Request) -> None:
    """Draw `study` (a JSON file) into `out`, a PNG. Raises ResourceError where matplotlib is not installed."""
    study = durable.read_json(Path(request["study"]))
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing_package("matplotlib", "plots", "the picture of a study of memory") from error
    figure = Figure(figsize=(4.6 * len(_PANELS), 1.2 + 0.32 * (len(study["policies"]) + 2)), layout="constrained")
    panels: Any = figure.subplots(1, len(_PANELS), sharey=False)
    for axes, (column, (title, scale)) in zip(panels, _PANELS.items(), strict=True):
        _panel(axes, study, column, title, scale)
    how = "measured under a budget" if study["measured"] else "predicted"
    figure.suptitle(f"{study['recipe']} on {study['machine']}, {study['num_ranks']:,} ranks, {study['budget_bytes'] / 2**30:.2f} GiB each: {how}")
    out = Path(request["out"])
    aside = durable.temporary_sibling(out, "drawn")
    figure.savefig(aside, format="png", dpi=150)
    os.replace(aside, out)


def _panel(axes: Any, study: dict[str, Any], column: str, title: str, scale: float) -> None:
    rows = study["policies"]
    values = [(row[column] or 0) * scale for row in rows]
    plain = next((value for value, row in zip(values, rows, strict=True) if row["policy"] == "none"), 0.0)
    published = study["published_percent"][column]
    names = [row["policy"] for row in rows] + [f"published, {model}" for model in published]
    stated = [plain * (1.0 + percent / 100.0) for percent in published.values()]
    percents = [row[f"{column}_percent"] for row in rows] + list(published.values())
    axes.barh(range(len(values)), values, color="tab:blue")
    axes.barh(range(len(values), len(names)), stated, color="none", edgecolor="tab:gray", linestyle="--")
    for place, (length, percent) in enumerate(zip([*values, *stated], percents, strict=True)):
        axes.text(length, place, "" if percent is None else f" {percent:+.0f} %", va="center", fontsize=7)
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.invert_yaxis()
    axes.margins(x=0.25)
    axes.set_title(title, fontsize=9)
