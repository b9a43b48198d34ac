"""The communication study for people: a table, sentences about what is fastest and what is slow, and a picture."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .comm_fits import ALONE, Fit, Sample, SlowNode


def text(values: dict[str, Any]) -> str:
    """comm.txt, from the content of comm.json."""
    lines = [f"{values['ranks']} ranks on {values['nodes']} nodes of {values['machine']}", ""]
    rows = [("back end", "collective", "scope", "latency", "bandwidth", "r2")]
    for line in values["fits"]:
        rate = f"{line['bytes_per_s'] / 1e9:.3g} GB/s" if line["bytes_per_s"] else "-"
        r2 = f"{line['r2']:.3f}" if line["r2"] is not None else "-"
        rows.append((line["backend"], line["collective"], line["scope"], f"{line['latency_s'] * 1e6:,.0f} us", rate, r2))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    for name, why in values["left_out"].items():
        lines += ["", f"{name} was left out: {why}"]
    return "\n".join([*lines, "", *_fastest_lines(values["fastest"]), "", *slow_lines(values["slow_nodes"])]) + "\n"


def _fastest_lines(fastest: dict[str, dict[str, list[dict[str, Any]]]]) -> list[str]:
    """A line for each run of sizes with the same winner."""
    winners = {row["backend"] for collectives in fastest.values() for rows in collectives.values() for row in rows}
    if all(row["why"] == ALONE for collectives in fastest.values() for rows in collectives.values() for row in rows):
        return [f"{', '.join(winners)} is the fastest, since {ALONE}"]
    lines = []
    for scope, collectives in fastest.items():
        for collective, rows in collectives.items():
            for backend, group in itertools.groupby(rows, key=lambda row: row["backend"]):
                same = list(group)
                lines.append(f"{collective}, {scope}, {_range_text(same[0]['bytes'], same[-1]['bytes'])}: {backend} ({same[-1]['why']})")
    return lines


def slow_lines(slow: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each node that stands out."""
    if not slow:
        return ["no node stands out as slow"]
    return [
        f"slow: node {one['node']} ({one['host']}), {_WHAT[one['what']]}: {one['seconds']:.3g} s, {one['factor']:.1f} times the median, {one['median_s']:.3g} s"
        for one in slow
    ]


_WHAT = {"link": "its link to other nodes", "within": "the all-reduce of its own ranks", "compute": "a matrix product"}


def _range_text(first: int, last: int) -> str:
    return size_text(first) if first == last else f"{size_text(first)} to {size_text(last)}"


def size_text(num_bytes: int) -> str:
    """4 KiB, 16 MiB."""
    power = min(3, (num_bytes.bit_length() - 1) // 10) if num_bytes else 0
    return f"{num_bytes / 1024**power:.4g} {('B', 'KiB', 'MiB', 'GiB')[power]}"


def slow_json(slow: SlowNode) -> dict[str, Any]:
    """As in comm.json."""
    return {**vars(slow), "factor": slow.factor}


def draw(path: Path, samples: Sequence[Sample], fits: Sequence[Fit]) -> None:
    """Time over size, a panel a collective and scope: points are medians, bars the middle half of them, lines the fits. Raises ImportError."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = sorted({(sample.scope, sample.collective) for sample in samples}, reverse=True)
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.2 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    names = list(dict.fromkeys(sample.backend for sample in samples))
    for number, (scope, collective) in enumerate(panels, 1):
        axes = figure.add_subplot(rows, columns, number)
        for name in names:
            own = [sample for sample in samples if sample.kind == (name, collective, scope)]
            if not own:
                continue
            sizes, color = [sample.bytes for sample in own], f"C{names.index(name)}"
            ordered = [sorted(sample.seconds) for sample in own]
            bars = [
                [s.median_s - t[len(t) // 4] for s, t in zip(own, ordered, strict=True)],
                [t[-1 - len(t) // 4] - s.median_s for s, t in zip(own, ordered, strict=True)],
            ]
            axes.errorbar(sizes, [sample.median_s for sample in own], yerr=bars, fmt="o", markersize=4, color=color, label=name)
            line = next(line for line in fits if (line.backend, line.collective, line.scope) == (name, collective, scope))
            axes.plot(sizes, [line.seconds(size) for size in sizes], color=color, linewidth=1)
        axes.set(xscale="log", yscale="log", title=f"{collective}, {scope}", xlabel="bytes", ylabel="seconds")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)
