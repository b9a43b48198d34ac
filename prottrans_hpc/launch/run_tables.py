"""Runs as text and as plain values: the list, one run in full, and its history. Pure, but for the clock and the terminal."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from .. import terminal, timestamp
from .run_facts import DamagedRun, RunFacts
from .run_history import Now, Start, Story
from .run_state import RunState, Verdict

_COLUMNS = ("name", "recipe", "machine", "state", "step", "loss", "nodes", "last activity")
_STYLES = {
    RunState.RUNNING: "green",
    RunState.QUEUED: "yellow",
    RunState.STOPPING: "yellow",
    RunState.UNKNOWN: "yellow",
    RunState.FAILED: "red",
    RunState.DAMAGED: "red",
    RunState.KILLED: "red",
}


def describe(facts: RunFacts, verdict: Verdict) -> dict[str, Any]:
    """A run as one object of the list."""
    return {
        "name": facts.name,
        "path": str(facts.run_dir.path),
        "recipe": facts.run.recipe_name,
        "machine": facts.run.machine.name,
        "state": str(verdict.state),
        "reason": verdict.reason,
        "exit_code": facts.exit_code,
        "step": facts.step,
        "last_step": facts.run.last_step,
        "saved_step": facts.saved_step,
        "loss": facts.loss,
        "nodes": facts.run.allocation.num_nodes,
        "scheduler": facts.jobs.scheduler if facts.jobs else None,
        "jobs": [{"id": job_id, "state": None if state is None else str(state)} for job_id, state in verdict.jobs],
        "last_activity": _utc(facts.activity),
    }


def describe_damaged(damaged: DamagedRun) -> dict[str, Any]:
    """A damaged run as one object of the list; it has no more than is known."""
    return {
        "name": damaged.name,
        "path": str(damaged.run_dir.path),
        "state": str(RunState.DAMAGED),
        "reason": damaged.problem,
        "last_activity": _utc(damaged.activity),
    }


def _utc(epoch_s: float) -> str | None:
    return datetime.fromtimestamp(epoch_s, UTC).isoformat(timespec="seconds").replace("+00:00", "Z") if epoch_s else None


def list_rows(runs: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """The cells of the list, as text that is safe to show."""
    now = time.time()
    rows = []
    for run in runs:
        step = f"{run['step']:,}/{run['last_step']:,}" if "step" in run else "-"
        loss = f"{run['loss']:.4f}" if run.get("loss") is not None else "-"
        activity = _ago(now, run["last_activity"])
        cells = (run["name"], run.get("recipe", "-"), run.get("machine", "-"), _short_state(run), step, loss, str(run.get("nodes", "-")), activity)
        rows.append(tuple(terminal.printable(cell, 60) for cell in cells))
    return rows


def _short_state(run: dict[str, Any]) -> str:
    if run["state"] == RunState.FAILED and run.get("exit_code") is not None:
        return f"{run['state']} ({run['exit_code']})"
    return str(run["state"])


def _ago(now: float, moment: str | None) -> str:
    if moment is None:
        return "-"
    return f"{duration(max(0.0, now - datetime.fromisoformat(moment).timestamp()))} ago"


def duration(seconds: float) -> str:
    """A span of time in its largest unit or two: "12 s", "5 min", "3 h 20 min", "2 d 4 h"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def print_list(runs: Sequence[dict[str, Any]]) -> None:
    """The list on standard output: a table on a terminal, plain aligned lines elsewhere."""
    rows = list_rows(runs)
    if sys.stdout.isatty():
        _print_rich(rows, [_STYLES.get(RunState(run["state"]), "") for run in runs])
    else:
        print(*aligned([tuple(column.upper() for column in _COLUMNS), *rows], right=(4, 5, 6)), sep="\n")


def _print_rich(rows: Sequence[tuple[str, ...]], styles: Sequence[str]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in _COLUMNS:
        table.add_column(column, justify="right" if column in ("step", "loss", "nodes") else "left", overflow="fold")
    for row, style in zip(rows, styles, strict=True):
        table.add_row(*(Text(cell, style=style if _COLUMNS[index] == "state" else "") for index, cell in enumerate(row)))
    Console().print(table)


def aligned(rows: Sequence[tuple[str, ...]], *, right: Sequence[int] = ()) -> list[str]:
    """Rows of cells as lines with columns of equal width; `right` lists the columns of numbers."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(cell.rjust(width) if index in right else cell.ljust(width) for index, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip()
        for row in rows
    ]


def rates(facts: RunFacts) -> dict[str, Any]:
    """Medians over the last steps, and how long the rest takes at this pace; {} when nothing was measured."""
    steps = [record for record in facts.recent if isinstance(record.get("step_s"), (int, float))]
    if not steps:
        return {}
    step_s = statistics.median(float(record["step_s"]) for record in steps)
    speeds = [float(record["residues_per_s"]) for record in steps if isinstance(record.get("residues_per_s"), (int, float))]
    left = max(0, facts.run.last_step - facts.step)
    return {
        "of_last_steps": len(steps),
        "residues_per_s": round(statistics.median(speeds), 1) if speeds else None,
        "step_s": step_s,
        "steps_left": left,
        "time_left_s": round(left * step_s, 1),
    }


def present(facts: RunFacts, verdict: Verdict) -> Now:
    """What the history of a run must know of its present."""
    at_work = verdict.state.is_alive and verdict.state is not RunState.QUEUED
    written = facts.run_dir.metrics.stat().st_mtime if facts.recent else None
    last_step_at = timestamp.utc(written) if written else None
    step_s = float(rates(facts).get("step_s", 0.0))
    unsaved = [float(record.get("step_s") or 0.0) for record in facts.recent if record.get("step", 0) > facts.saved_step]
    lost_s = sum(unsaved) if len(unsaved) < len(facts.recent) else step_s * (facts.step - facts.saved_step)
    return Now(at_work, facts.step, facts.saved_step, last_step_at, lost_s, facts.exit_code, facts.run.allocation.ranks_per_node)


def history_lines(story: Story) -> list[str]:
    """The history of a run for people: a row a start, the notes below it, and the sums."""
    if not story.starts:
        return ["no start is recorded yet"]
    rows: list[tuple[str, ...]] = [("", "BEGAN (UTC)", "JOB", "NODES", "STEPS", "ENDED BY", "STEPS LOST", "NODE-HOURS", "WASTED")]
    rows += [_history_row(number, start) for number, start in enumerate(story.starts, 1)]
    lines = aligned(rows, right=(0, 3, 6, 7, 8))
    result = [lines[0]]
    for line, start in zip(lines[1:], story.starts, strict=True):
        whole = [start.cause] if start.cause and len(start.cause) > _CAUSE_WIDTH else []
        result += [line, *(f"      {terminal.printable(note, 300)}" for note in (*whole, *start.notes))]
    restarts = "1 restart" if story.num_restarts == 1 else f"{story.num_restarts} restarts"
    total = f"{restarts}, {story.steps_lost} steps taken again, {story.node_hours_wasted:.3g} of {story.node_hours:.3g} node-hours wasted by stops"
    return [*result, total]


def _history_row(number: int, start: Start) -> tuple[str, ...]:
    job = f"{start.job_id or '-'}{f' restart {start.restart}' if start.restart else ''}"
    last = "..." if start.is_open else "?" if start.stop_step is None else start.stop_step
    steps = f"{start.step} to {last}" if start.trains_from else "none"
    cells = (
        *(str(number), (start.first_seen or "-")[:19].replace("T", " "), job, _text(start.num_nodes), steps, ending(start)),
        *(_text(start.steps_lost), "-" if start.node_hours is None else f"{start.node_hours:.3g}"),
        "-" if start.node_hours_wasted is None else f"{start.node_hours_wasted:.3g}",
    )
    return tuple(terminal.printable(cell, 120) for cell in cells)


_CAUSE_WIDTH = 90


def ending(start: Start) -> str:
    """Why a start ended, in a few words; a kill leaves no word, which is said."""
    if start.is_open:
        return "at work"
    cause = terminal.printable(start.cause or "killed: it left no word", _CAUSE_WIDTH)
    return cause if start.exit_code in (None, 0) else f"{cause} (exit code {start.exit_code})"


def _text(value: int | None) -> str:
    return "-" if value is None else str(value)
