"""report.html of a scaling study: one file with its data, pictures and words, which loads nothing from anywhere."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict

from .scaling import Scaling
from .scaling_projected import Projection
from .scaling_rows import COLUMNS, Outlier, Row, cell

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 70em; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin-top: 2em; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25em .7em; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
th { background: #f4f4f4; text-align: right; } .words td, .words th { text-align: left; white-space: normal; }
.wide { overflow-x: auto; } tr.projected td { color: #b35900; font-style: italic; }
figure { margin: 1em 0; } img { max-width: 100%; height: auto; } figcaption, .note { color: #555; }
button { font: inherit; padding: .2em .8em; }
"""
_SCRIPT = """
const button = document.getElementById("ledger-toggle");
button.addEventListener("click", () => {
  const seconds = document.getElementById("ledger-seconds"), share = document.getElementById("ledger-share");
  seconds.hidden = !seconds.hidden; share.hidden = !share.hidden;
  button.textContent = share.hidden ? "Show shares" : "Show seconds";
});
const data = JSON.parse(document.getElementById("rows").textContent);
document.getElementById("count").textContent = `${data.rows.length} measured sizes, ${data.projected.length} projected.`;
document.documentElement.dataset.ready = "yes";
"""


def render_report(scaling: Scaling, rows: Sequence[Row], outliers: Sequence[Outlier], projection: Projection, pictures: Mapping[str, bytes]) -> str:
    """The page; `pictures` are SVGs called overhead, throughput, ledger and ledger-share."""
    title = f"Scaling of {scaling.recipe} on {scaling.machine}"
    data = {"rows": [asdict(row) for row in rows], "projected": [asdict(point) for point in projection.points]}
    parts = [
        f"<h1>{_text(title)}</h1>",
        f"<p><strong>{_text(headline(rows))}</strong></p>",
        f'<p class="note"><span id="count"></span> {_text(_how(scaling))}</p>',
        _figure("overhead", pictures, _caption(scaling)),
        _figure("throughput", pictures, "Residues a second of the whole gang; the dotted line is what the smallest size promises."),
        "<h2>The numbers</h2>",
        _rows_table(rows),
        _projected_part(projection),
        "<h2>Where the time goes</h2>",
        '<p><button id="ledger-toggle" type="button">Show shares</button></p>',
        f'<div id="ledger-seconds">{_figure("ledger", pictures, _LEDGER)}</div>',
        f'<div id="ledger-share" hidden>{_figure("ledger-share", pictures, _LEDGER)}</div>',
        "<h2>Nodes that stand out</h2>",
        _outlier_words(outliers),
        "<h2>What it ran on</h2>",
        _facts_table(scaling),
    ]
    body = "\n".join(part for part in parts if part)
    # Within a script element "<" could end it.
    inline = json.dumps(data).replace("<", "\\u003c")
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{_text(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n{body}\n'
        f'<script type="application/json" id="rows">{inline}</script>\n<script>{_SCRIPT}</script>\n</body>\n</html>\n'
    )


_LEDGER = (
    "Mean over ranks and steps. Exposed communication is all waiting for other ranks that no backward pass hides; waiting for a slower rank is in it. "
    "Other is what has no name of its own."
)


def headline(rows: Sequence[Row]) -> str:
    """The result in a sentence."""
    base, last = rows[0], rows[-1]
    if base is last:
        return f"A step takes {cell(base.step_s)} s on {_nodes(base.nodes)}; one size says nothing about scaling."
    interval = f"95 % interval {100 * last.overhead_low:.1f} to {100 * last.overhead_high:.1f} %"
    return (
        f"From {_nodes(base.nodes)} to {last.nodes} the overhead is {100 * last.overhead:.1f} % ({interval}), the efficiency {100 * last.efficiency:.1f} %; "
        f"{100 * last.exposed_comm_s / last.step_s:.1f} % of a step is exposed communication there."
    )


def _nodes(count: int) -> str:
    return f"{count} node" if count == 1 else f"{count} nodes"


def _how(scaling: Scaling) -> str:
    growth = "the global batch grows with the nodes" if scaling.mode == "weak" else "the global batch stays"
    runs = len(scaling.points)
    return f"{scaling.mode.capitalize()} scaling ({growth}): {runs} runs of {scaling.points[0].steps} measured steps, in an order that was drawn."


def _caption(scaling: Scaling) -> str:
    formula = "t(N) / t(1) - 1" if scaling.mode == "weak" else "N t(N) / t(1) - 1"
    base = scaling.node_counts[0]
    instead = "" if base == 1 else f", where {base} nodes, the smallest size that was measured, stand for 1"
    return f"overhead(N) = {formula}{instead}; t is the mean time of a step. The bars are 95 % bootstrap intervals over repetitions and steps."


def _figure(name: str, pictures: Mapping[str, bytes], caption: str) -> str:
    encoded = base64.b64encode(pictures[name]).decode()
    return f'<figure><img alt="{_text(name)}" src="data:image/svg+xml;base64,{encoded}"><figcaption>{_text(caption)}</figcaption></figure>'


def _rows_table(rows: Sequence[Row]) -> str:
    head = "".join(f"<th>{_text(name)}</th>" for name in COLUMNS)
    body = "\n".join("<tr>" + "".join(f"<td>{cell(value)}</td>" for value in asdict(row).values()) + "</tr>" for row in rows)
    return f'<div class="wide"><table id="measured"><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>'


def _projected_part(projection: Projection) -> str:
    if not projection.points:
        return ""
    head = "".join(f"<th>{name}</th>" for name in asdict(projection.points[0]))
    body = "\n".join(f'<tr class="projected">{"".join(f"<td>{cell(value)}</td>" for value in asdict(point).values())}</tr>' for point in projection.points)
    remarks = "".join(f"<li>{_text(line)}</li>\n" for line in projection.remarks)
    return f'<h2>Projected, not measured</h2>\n<table id="projected"><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table>\n' + (
        f'<ul class="note">\n{remarks}</ul>' if remarks else ""
    )


def _outlier_words(outliers: Sequence[Outlier]) -> str:
    if not outliers:
        return "<p>None: no node took 1.1 times the median node's compute time in half of its runs.</p>"
    lines = "\n".join(f"<li>{_text(outlier_line(one))}</li>" for one in outliers)
    return f'<ul id="outliers">\n{lines}\n</ul>'


def outlier_line(one: Outlier) -> str:
    """A node that stands out, in words."""
    percent = 100 * (one.factor - 1)
    return f"{one.host} (node {one.node} of {one.nodes}): {percent:.0f} % slower than the median node, in {one.num_runs} of {one.of_runs} runs"


def _facts_table(scaling: Scaling) -> str:
    facts = {
        "precision": scaling.precision,
        "communication": f"{scaling.comm}, buckets of {scaling.bucket_mib} MiB",
        "model": f"{scaling.parameters:,} parameters, {scaling.gradient_bytes:,} bytes of gradients",
        "ranks a node": scaling.ranks_per_node,
        "peak of a rank": "not known, so the MFU is left blank" if scaling.peak_tflops_rank is None else f"{scaling.peak_tflops_rank:g} TFLOP/s",
        **scaling.hardware,
        "versions": ", ".join(f"{name} {version}" for name, version in scaling.versions.items()),
    }
    rows = "\n".join(f"<tr><th>{_text(str(name))}</th><td>{_text(_plain(value))}</td></tr>" for name, value in facts.items())
    return f'<table class="words"><tbody>\n{rows}\n</tbody></table>'


def _plain(value: object) -> str:
    return ", ".join(f"{name}: {inner}" for name, inner in value.items()) if isinstance(value, Mapping) else str(value)


def _text(text: str) -> str:
    return html.escape(text, quote=True)
