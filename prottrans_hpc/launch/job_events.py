"""What happened to the batch jobs of a run: RUN_DIR/jobs.jsonl, one JSON object a line, only ever appended to.

Events: submitted, begun, ended, taken_over, refused, requeued, cancelled_rest, cancelled (by a person). Each has `time` (UTC), `event`,
`job_id` and `restart`; what else it has stands where it is recorded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from .. import json_lines, timestamp
from ..run_dir import RunDir

Event = dict[str, Any]


class Who(Protocol):
    """A start of a job."""

    @property
    def job_id(self) -> str:
        """As its scheduler names it."""

    @property
    def restart(self) -> int:
        """0 at first, one more with each requeue."""


def note(run_dir: RunDir, who: Who, event: str, **details: Any) -> None:
    """`record` of what a start does or finds."""
    record(run_dir, event, job_id=who.job_id, restart=who.restart, **details)


def record(run_dir: RunDir, event: str, *, job_id: str, restart: int, **details: Any) -> None:
    """Append one line, durably and with one write, for several jobs may append to one file."""
    json_lines.append_durably(run_dir.jobs_log, {"time": timestamp.now(), "event": event, "job_id": job_id, "restart": restart, **details})


def read_events(run_dir: RunDir) -> list[Event]:
    """All events, the oldest first. A line that cannot be read (half written) is left out."""
    return [event for event in json_lines.read(run_dir.jobs_log) if _is_event(event)]


def num_begun(events: Sequence[Event], job_id: str) -> int:
    """How often a job has begun."""
    return sum(event["event"] == "begun" and event["job_id"] == job_id for event in events)


def _is_event(record: Event) -> bool:
    return isinstance(record.get("event"), str) and isinstance(record.get("job_id"), str) and isinstance(record.get("restart"), int)
