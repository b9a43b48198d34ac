"""What a study of memory found, beside the published bars: as a table for people, CSV and JSON. Pure, no torch."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from .memory_study import Finding, Setting

PUBLISHED = {
    "parameters": {"ProtTXL": 15.6, "ProtBert": 6.6},
    "local_batch": {"ProtTXL": 700.0},
    "epoch_hours": {"ProtTXL": -60.0, "ProtBert": 72.0},
}
"""Percent with large model support against without, Elnaggar et al. 2021, figure 3. The two models had different ones: ProtTXL IBM's in torch's
allocator, ProtBert IBM's in TensorFlow's graph, which is why their times go opposite ways."""
COLUMNS = ("parameters", "local_batch", "epoch_hours")


def change(findings: list[Finding], finding: Finding, column: str) -> float | None:
    """Percent against the policy "none"; None where either is missing."""
    before = next((getattr(one, column) for one in findings if one.policy == "none"), None)
    now = getattr(finding, column)
    return None if not before or not now else 100.0 * (now / before - 1.0)


def describe(findings: list[Finding]) -> Iterator[str]:
    """A header, a line a policy, and the published changes."""
    width = max(len("published, ProtBert"), *(len(one.policy) for one in findings))
    yield f"{'':<{width}} {'layers':>7} {'parameters':>16} {'':>8} {'batch':>7} {'global':>10} {'':>8} {'h/epoch':>9} {'':>7}"
    for one in findings:
        hours = "-" if one.epoch_hours is None else f"{one.epoch_hours:,.2f}"
        changes = [_percent(change(findings, one, column)) for column in COLUMNS]
        yield (
            f"{one.policy:<{width}} {one.num_layers:>7,} {one.parameters:>16,} {changes[0]:>8} {one.local_batch:>7,} {one.global_batch:>10,} {changes[1]:>8} "
            f"{hours:>9} {changes[2]:>7}"
        )
    for model in ("ProtTXL", "ProtBert"):
        stated = [_percent(PUBLISHED[column].get(model)) for column in COLUMNS]
        yield f"{f'published, {model}':<{width}} {'':>7} {'':>16} {stated[0]:>8} {'':>7} {'':>10} {stated[1]:>8} {'':>9} {stated[2]:>7}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:+.1f}%" if abs(value) < 100 else f"{value:+.0f}%"


def to_json(findings: list[Finding], setting: Setting, *, recipe_name: str, machine_name: str) -> dict[str, Any]:
    """The whole study."""
    return {
        "format": 1,
        "recipe": recipe_name,
        "machine": machine_name,
        "measured": any(one.is_measured for one in findings),
        "num_ranks": setting.num_ranks,
        "budget_bytes": setting.room.device,
        "host_budget_bytes": setting.room.host,
        "speed": setting.speed.source,
        "longest_residues": setting.longest,
        "epoch_residues": setting.epoch_residues,
        "published_percent": PUBLISHED,
        "policies": [asdict(one) | {f"{column}_percent": change(findings, one, column) for column in COLUMNS} for one in findings],
    }


def to_csv(study: dict[str, Any]) -> str:
    """A row a policy."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(study["policies"][0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(study["policies"])
    return text.getvalue()
