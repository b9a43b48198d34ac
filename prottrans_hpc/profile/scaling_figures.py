"""The pictures of a scaling study, by matplotlib: measured points solid, projected ones dashed and labelled so."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .. import durable
from ..errors import missing_package
from .scaling import PARTS
from .scaling_projected import Projected
from .scaling_rows import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Shown:
    """What is drawn."""

    title: str
    rows: Sequence[Row]
    projected: Sequence[Projected]
    """Ascending; empty where nobody projected."""


COLOURS = dict(zip(PARTS, ("#b0b0b0", "#1f77b4", "#4f9fd4", "#d62728", "#2ca02c", "#9467bd", "#e0e0e0"), strict=True))


def _figure() -> Figure:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise missing_package("matplotlib", "plots", "the report of a scaling study") from error
    return Figure(figsize=(7, 4), dpi=120, layout="constrained")


def _sizes(axes: Axes, nodes: Sequence[int]) -> None:
    """A logarithmic axis with the sizes as they are; where there are many, every n-th and the last."""
    axes.set_xscale("log", base=2)
    shown = list(nodes)[:: 1 + len(nodes) // 12]
    shown += [nodes[-1]] if nodes[-1] not in shown else []
    axes.set_xticks(shown, [str(size) for size in shown])
    axes.minorticks_off()
    axes.set_xlabel("nodes")
    axes.grid(alpha=0.3)


def draw_overhead(shown: Shown) -> Figure:
    """The papers' Fig. 2: overhead by nodes, with 95 % confidence intervals."""
    figure = _figure()
    axes = figure.add_subplot()
    nodes, values = [row.nodes for row in shown.rows], [100 * row.overhead for row in shown.rows]
    below = [100 * max(0.0, row.overhead - row.overhead_low) for row in shown.rows]
    above = [100 * max(0.0, row.overhead_high - row.overhead) for row in shown.rows]
    axes.errorbar(nodes, values, yerr=[below, above], fmt="o-", capsize=4, color="tab:blue", label="measured, 95 % interval")
    _add_projection(axes, shown, lambda point: 100 * point.overhead)
    low, high = [100 * point.overhead_low for point in shown.projected], [100 * point.overhead_high for point in shown.projected]
    axes.fill_between([point.nodes for point in shown.projected], low, high, color="tab:orange", alpha=0.15, linewidth=0)
    axes.axhline(0.0, color="black", linewidth=0.8)
    axes.set(title=f"Scaling overhead: {shown.title}", ylabel="overhead, %")
    _finish(axes, shown)
    return figure


def draw_throughput(shown: Shown) -> Figure:
    """Residues a second against what the smallest size promises."""
    figure = _figure()
    axes = figure.add_subplot()
    nodes, base = [row.nodes for row in shown.rows], shown.rows[0]
    axes.plot(nodes, [row.residues_per_s for row in shown.rows], "o-", color="tab:blue", label="measured")
    _add_projection(axes, shown, lambda point: base.residues_per_s * point.nodes / base.nodes * point.efficiency)
    sizes = [*nodes, *(point.nodes for point in shown.projected)]
    axes.plot(sizes, [base.residues_per_s * size / base.nodes for size in sizes], ":", color="gray", label="ideal")
    axes.set_yscale("log")
    axes.set(title=f"Throughput: {shown.title}", ylabel="residues/s")
    _finish(axes, shown)
    return figure


def draw_ledger(shown: Shown, *, as_share: bool = False) -> Figure:
    """Where a step's time goes, as stacked bars: seconds, or percent of the step."""
    figure = _figure()
    axes = figure.add_subplot()
    places, bottoms = range(len(shown.rows)), [0.0] * len(shown.rows)
    totals = [sum(getattr(row, name) for name in PARTS) / 100 if as_share else 1.0 for row in shown.rows]
    for name in PARTS:
        heights = [getattr(row, name) / total for row, total in zip(shown.rows, totals, strict=True)]
        axes.bar(places, heights, bottom=bottoms, color=COLOURS[name], label=name.removesuffix("_s").replace("_", " "), width=0.7)
        bottoms = [low + height for low, height in zip(bottoms, heights, strict=True)]
    axes.set_xticks(places, [str(row.nodes) for row in shown.rows])
    axes.set(title=f"Where a step's time goes: {shown.title}", xlabel="nodes", ylabel="% of a step" if as_share else "seconds a step")
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _add_projection(axes: Axes, shown: Shown, value: Callable[[Projected], float]) -> None:
    if shown.projected:
        points = [(point.nodes, value(point)) for point in shown.projected]
        axes.plot(*zip(*points, strict=True), "s--", fillstyle="none", color="tab:orange", label="projected, not measured")


def _finish(axes: Axes, shown: Shown) -> None:
    _sizes(axes, sorted({*(row.nodes for row in shown.rows), *(point.nodes for point in shown.projected)}))
    axes.legend(fontsize="small")


def write_png(figure: Figure, path: Path) -> None:
    """The picture as a file."""
    with durable.new_file(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})


def svg_of(figure: Figure) -> bytes:
    """The picture as SVG, the same bytes for the same picture."""
    import matplotlib

    out = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "prottrans-hpc"}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return out.getvalue()
