"""What went wrong while a run trained, and what was measured before, as the notes below its start: events of history.jsonl in a line each. Pure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .run_files import Record


def _went_back(event: Record) -> str:
    return f"went back from step {event.get('step')} to {event.get('to')}: {event.get('cause')}"


def _preflight(event: Record) -> str:
    # What keeps a job from training is told as its cause, and slow nodes have lines of their own.
    figures = f": {event['figures']}" if event.get("figures") else ""
    return f"preflight {event.get('verdict')} in {event.get('elapsed_s')} s{figures}"


def _slow_node(event: Record) -> str:
    if "says" in event:  # by a preflight
        return f"step {event.get('step')}: slow: {event['says']}"
    ranks = ", ".join(map(str, event.get("ranks") or ()))
    return f"{_node_at(event)} is slow, {event.get('factor')} times the median: rank {ranks}"


def _recovered(event: Record) -> str:
    factor = f", {event['factor']} times the median" if "factor" in event else ""
    return f"{_node_at(event)} is no longer slow{factor}"


def _node_at(event: Record) -> str:
    return f"step {event.get('step')}: node {event.get('node')} ({event.get('host')})"


def _hang(event: Record) -> str:
    return f"hang: {event.get('what')}"


def _non_finite(event: Record) -> str:
    where = "".join(f"; {_culprit(one)}" for one in (event.get("where") or [])[:2])
    return f"step {event.get('step')} skipped, non-finite numbers: {event.get('what')}{where}"


def _culprit(one: Record) -> str:
    parameter = f", first {one['parameter']}" if one.get("parameter") else ""
    return f"rank {one.get('rank')} on {one.get('host')}{parameter}, samples {_shortened(one.get('samples') or [])}"


def _shortened(samples: list[Any]) -> str:
    return " ".join(map(str, samples[:4])) + (" ..." if len(samples) > 4 else "")


NOTES: dict[str, Callable[[Record], str]] = {
    "went back": _went_back,
    "preflight": _preflight,
    "slow node": _slow_node,
    "node recovered": _recovered,
    "hang": _hang,
    "non-finite numbers": _non_finite,
}
"""By the name of the event."""
