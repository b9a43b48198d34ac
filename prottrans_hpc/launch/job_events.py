"""What happened to the batch jobs of a run: RUN_DIR/jobs.jsonl, one JSON object a line, only ever appended to.

Events: submitted, begun, ended, taken_over, refused, requeued, cancelled_rest, cancelled (by a person). Each has `time` (UTC), `event`,
`job_id` and `restart`; what else it has stands where it is recorded.
"""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Sequence
from typing import Any, Protocol

from ..run_dir import RunDir

Event = dict[str, Any]


def now() -> str:
    """The time in UTC, ISO 8601, to the millisecond."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


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
    line = json.dumps({"time": now(), "event": event, "job_id": job_id, "restart": restart, **details}) + "\n"
    descriptor = os.open(run_dir.jobs_log, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        content = (line if _ends_a_line(descriptor) else "\n" + line).encode()
        if os.write(descriptor, content) != len(content):
            raise OSError(28, os.strerror(28), str(run_dir.jobs_log))  # the rest did not fit
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _ends_a_line(descriptor: int) -> bool:
    """Whether the file is empty or ends with a newline; a full disk or a power cut may have left half a line."""
    size = os.fstat(descriptor).st_size
    return size == 0 or os.pread(descriptor, 1, size - 1) == b"\n"


def read_events(run_dir: RunDir) -> list[Event]:
    """All events, the oldest first. A line that cannot be read (half written) is left out."""
    try:
        lines = run_dir.jobs_log.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    return [event for event in map(_parse, lines) if event]


def num_begun(events: Sequence[Event], job_id: str) -> int:
    """How often a job has begun."""
    return sum(event["event"] == "begun" and event["job_id"] == job_id for event in events)


def _parse(line: bytes) -> Event:
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    is_event = isinstance(event, dict) and isinstance(event.get("event"), str) and isinstance(event.get("job_id"), str)
    return event if is_event and isinstance(event.get("restart"), int) else {}
