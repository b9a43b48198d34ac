"""The story of a run: every start and stop with its cause, and what each stop cost. Pure, but for reading the files.

Two files tell it. history.jsonl is the trainer's: a start, and a stop with its cause; a kill leaves a start without a
stop. jobs.jsonl is that of the job scripts of batch systems: begun, ended, requeued. Put together by time they give
one row a start.

What a stop wasted, in node-hours: the steps that had to be taken again, the time between the last step and the end of
the job (a hang), and the time that the next job took from its begin to its first step.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

from ..run_dir import RunDir
from . import job_events
from .run_files import Record, read_records
from .trouble_notes import NOTES

_HOUR_S = 3600.0


@dataclass
class Start:
    """One start of a run, from the begin of its job to its end; None stands for what nobody recorded."""

    job_id: str | None = None
    restart: int | None = None
    """How often the scheduler had requeued the job."""
    nodes: tuple[str, ...] = ()
    num_nodes: int | None = None
    world_size: int | None = None
    command_line: str | None = None
    """The command that started it, or its chain."""
    began: str | None = None
    """UTC, when the job script began."""
    trains_from: str | None = None
    """UTC, when the first step could be taken; None: it ended before."""
    step: int | None = None
    """The step from which it went on."""
    ended: str | None = None
    """UTC."""
    stop_step: int | None = None
    cause: str | None = None
    """Why it ended; None: killed without a word, or still at work."""
    exit_code: int | None = None
    last_step_at: str | None = None
    """UTC, when it took its last step; only known of one that another start followed."""
    steps_lost: int | None = None
    """Steps that were taken again afterwards."""
    lost_s: float = 0.0
    """For how long those had been computed."""
    node_hours: float | None = None
    """From its begin to its end, on all nodes."""
    node_hours_wasted: float | None = None
    """By the way it ended."""
    is_open: bool = False
    """It is at work."""
    notes: list[str] = field(default_factory=list)
    """What else happened: requeued, went back after non-finite numbers, the rest of a chain cancelled."""

    @property
    def first_seen(self) -> str | None:
        """When it began, as early as was recorded."""
        return self.began or self.trains_from


@dataclass(frozen=True)
class Story:
    """All starts of a run."""

    starts: tuple[Start, ...]
    num_restarts: int
    """Starts after the first one."""
    steps_lost: int
    node_hours: float
    """Of the starts whose times are known."""
    node_hours_wasted: float


@dataclass(frozen=True)
class Now:
    """What is true of a run at this moment; the last start is seen in its light."""

    is_alive: bool
    step: int
    """The last that was taken."""
    saved_step: int
    last_step_at: str | None = None
    lost_s: float = 0.0
    """For how long the steps after the newest checkpoint were computed."""
    exit_code: int | None = None
    ranks_per_node: int = 1


def read_story(run_dir: RunDir, now: Now) -> Story:
    """The story of a run as its files tell it."""
    return tell(read_records(run_dir.history), job_events.read_events(run_dir), now)


def tell(history: Sequence[Record], jobs: Sequence[Record], now: Now) -> Story:
    """Put the trainer's history and the jobs' events together."""
    starts = _rows(sorted([*jobs, *history], key=lambda event: str(event.get("time", ""))))
    for start in starts:
        if start.num_nodes is None and start.world_size:
            start.num_nodes = -(-start.world_size // now.ranks_per_node)
    for start, following in pairwise(starts):
        _settle(start, following)
    if starts:
        _settle_last(starts[-1], now)
    for index, start in enumerate(starts):
        _count_hours(start, starts[index + 1] if index + 1 < len(starts) else None)
    return Story(
        tuple(starts),
        max(0, len(starts) - 1),
        sum(start.steps_lost or 0 for start in starts),
        sum(start.node_hours or 0.0 for start in starts),
        sum(start.node_hours_wasted or 0.0 for start in starts),
    )


def _rows(events: Iterable[Record]) -> list[Start]:
    """One row a start, from all events in the order of their times."""
    rows: list[Start] = []
    for event in events:
        tell_one = _TELLERS.get(str(event.get("event")))
        if tell_one is not None:
            tell_one(rows, event)
    return rows


def _open_row(rows: list[Start]) -> Start:
    """The row to which an event of the trainer belongs."""
    if not rows or rows[-1].ended is not None:
        rows.append(Start())
    return rows[-1]


def _begun(rows: list[Start], event: Record) -> None:
    nodes = tuple(str(node) for node in event.get("nodes") or ())
    rows.append(Start(event["job_id"], event["restart"], nodes, len(nodes) or None, began=str(event["time"])))


def _ended(rows: list[Start], event: Record) -> None:
    row = _row_of(rows, event["job_id"], event["restart"])
    if row is None or row.ended is not None:  # it had nothing to do, or was not allowed to
        row = Start(event["job_id"], event["restart"], began=str(event["time"]))
        rows.append(row)
    row.ended = str(event["time"])
    # The trainer's own code is that of the rank that told of it: 75 of one that lost another, where that one was killed.
    code = _integer(event.get("code"))
    row.exit_code = row.exit_code if code is None else code
    row.cause = _better(row.cause, event.get("cause"))
    row.num_nodes = row.num_nodes or _integer(event.get("num_nodes"))


def _taken_over(rows: list[Start], event: Record) -> None:
    """The job before could not say how it ended; the one after it has asked the scheduler."""
    row = _row_of(rows, event.get("from_job_id"), event.get("from_restart"))
    if row is not None and row.ended is None:
        row.cause = _better(row.cause, event.get("cause"))


def _row_of(rows: list[Start], job_id: Any, restart: Any) -> Start | None:
    return next((row for row in reversed(rows) if (row.job_id, row.restart) == (job_id, restart)), None)


def _better(told_by_trainer: str | None, told_by_script: Any) -> str | None:
    """The trainer names a signal or an error; the script knows what the scheduler meant by it."""
    told = str(told_by_script) if told_by_script else ""
    if not told or told == told_by_trainer:
        return told_by_trainer
    return f"{told} ({told_by_trainer})" if told_by_trainer and told_by_trainer not in told else told


def _started(rows: list[Start], event: Record) -> None:
    if not rows or rows[-1].ended is not None or rows[-1].trains_from is not None:
        rows.append(Start())
    row = rows[-1]
    row.trains_from, row.step, row.world_size = str(event.get("time")), _integer(event.get("step")), _integer(event.get("world_size"))
    row.num_nodes, row.command_line = row.num_nodes or _integer(event.get("num_nodes")), event.get("command_line")
    earlier = next((other for other in reversed(rows[:-1]) if other.trains_from is not None), None)
    if earlier is not None and "steps_lost" in event:
        earlier.steps_lost, earlier.lost_s = _integer(event["steps_lost"]), float(event.get("lost_s") or 0.0)
        earlier.last_step_at = event.get("last_step_at")


def _stopped(rows: list[Start], event: Record) -> None:
    row = _open_row(rows)
    row.stop_step, row.cause, row.exit_code = _integer(event.get("step")), str(event.get("cause")), _integer(event.get("exit_code"))
    if row.began is None:  # no job script that would tell when it has ended
        row.ended = str(event.get("time"))


def _troubled(rows: list[Start], event: Record) -> None:
    _open_row(rows).notes.append(NOTES[str(event["event"])](event))


def _measured_first(rows: list[Start], event: Record) -> None:
    """A preflight is the first that a start does; where no job script tells of the start, this does."""
    if not rows or rows[-1].ended is not None or rows[-1].trains_from is not None:
        rows.append(Start())
    _troubled(rows, event)


def _note(rows: list[Start], event: Record) -> None:
    known = ("time", "event", "job_id", "restart")
    details = ", ".join(f"{key} {value}" for key, value in event.items() if key not in known and value not in (None, "", []))
    own = next((row for row in reversed(rows) if row.job_id == event["job_id"]), None)
    row = own or (rows[-1] if rows else None)
    if row is not None:
        who = "" if own else f"job {event['job_id']} "
        row.notes.append(f"{who}{str(event['event']).replace('_', ' ')}{f': {details}' if details else ''}")


_TELLERS = {
    "begun": _begun,
    "ended": _ended,
    "start": _started,
    "stop": _stopped,
    "taken_over": _taken_over,
    **dict.fromkeys(NOTES, _troubled),
    "preflight": _measured_first,
    **dict.fromkeys(("refused", "requeued", "cancelled", "cancelled_rest"), _note),
}


def _settle(start: Start, following: Start) -> None:
    """What is known of a start because another one followed it."""
    if start.trains_from is None:
        start.ended = start.ended or start.began
        return
    start.last_step_at = max(start.last_step_at or "", start.trains_from)
    start.ended = start.ended or start.last_step_at
    if start.steps_lost is None and following.step is not None and start.stop_step is not None:
        start.steps_lost = max(0, start.stop_step - following.step)
    if start.stop_step is None and following.step is not None and start.steps_lost is not None:
        start.stop_step = following.step + start.steps_lost


def _settle_last(start: Start, now: Now) -> None:
    if now.is_alive and start.ended is None and start.stop_step is None:
        start.is_open = True
        return
    start.exit_code = now.exit_code if start.exit_code is None else start.exit_code
    if start.trains_from is None:
        return
    start.last_step_at = max(now.last_step_at or "", start.trains_from)
    start.ended = start.ended or start.last_step_at
    start.stop_step = max(now.step, start.step or 0) if start.stop_step is None else start.stop_step
    start.steps_lost = max(0, start.stop_step - max(now.saved_step, start.step or 0))
    start.lost_s = now.lost_s if start.steps_lost else 0.0


def _count_hours(start: Start, following: Start | None) -> None:
    if start.is_open or start.num_nodes is None:
        return
    elapsed = seconds_between(start.first_seen, start.ended)
    start.node_hours = None if elapsed is None else elapsed * start.num_nodes / _HOUR_S
    if start.exit_code == 0:
        start.node_hours_wasted = 0.0
        return
    idle_s = seconds_between(start.last_step_at, start.ended) or 0.0
    wasted = (start.lost_s + idle_s) * start.num_nodes
    if start.trains_from is None:  # it never came to train
        wasted = (elapsed or 0.0) * start.num_nodes
    if following is not None and following.trains_from is not None:
        wasted += (seconds_between(following.began, following.trains_from) or 0.0) * (following.num_nodes or start.num_nodes)
    start.node_hours_wasted = wasted / _HOUR_S


def seconds_between(earlier: str | None, later: str | None) -> float | None:
    """Seconds from one UTC time to another, never less than 0; None when either is not known."""
    first, second = parse_time(earlier), parse_time(later)
    return None if first is None or second is None else max(0.0, (second - first).total_seconds())


def parse_time(text: str | None) -> datetime | None:
    """A time in ISO 8601; None for anything else."""
    try:
        moment = datetime.fromisoformat(text) if text else None
    except (ValueError, TypeError):
        return None
    return moment if moment is None or moment.tzinfo else moment.replace(tzinfo=UTC)


def _integer(value: Any) -> int | None:
    return value if isinstance(value, int) else None
