"""One run in full: what it is, where it runs, how it does, and its history; as lines for people and as plain values."""

from __future__ import annotations

import dataclasses
from typing import Any

from .. import durable, terminal
from ..errors import DataError
from . import checks, preflight_notes, run_history, run_tables
from .job import num_ranks_text
from .run_facts import RunFacts
from .run_history import Story
from .run_state import Verdict


def report(facts: RunFacts, verdict: Verdict) -> dict[str, Any]:
    """Everything as plain values."""
    story = run_history.read_story(facts.run_dir, run_tables.present(facts, verdict))
    return {
        **run_tables.describe(facts, verdict),
        "run_id": facts.run.run_id,
        "created": facts.run.created,
        "version": facts.run.version,
        "model": {"architecture": facts.run.recipe.architecture.name, "size": facts.run.recipe.architecture.size},
        "command_line": facts.run.command_line,
        "corpus": {"path": facts.run.corpus, "sha256": facts.run.corpus_sha256},
        "allocation": {key: getattr(facts.run.allocation, key) for key in facts.run.allocation.__dataclass_fields__},
        "submitted": vars(facts.jobs) | {"job_ids": list(facts.jobs.job_ids)} if facts.jobs else None,
        "checkpoints": list(facts.checkpoint_steps),
        "rates": run_tables.rates(facts),
        "environment": _environment(facts),
        "preflight": preflight_notes.read(facts.run_dir),
        "history": dataclasses.asdict(story),
    }


def _environment(facts: RunFacts) -> dict[str, Any] | None:
    """What the latest start ran on."""
    try:
        found = durable.read_json(facts.run_dir.environment_json)
    except (OSError, DataError):
        return None
    return found if isinstance(found, dict) else None


def report_lines(facts: RunFacts, verdict: Verdict) -> list[str]:
    """Everything for people."""
    story = run_history.read_story(facts.run_dir, run_tables.present(facts, verdict))
    pairs = [
        ("run", str(facts.run_dir.path)),
        ("state", f"{verdict.state}{f': {verdict.reason}' if verdict.reason else ''}"),
        ("model", _model(facts)),
        ("corpus", facts.run.corpus),
        ("command", facts.run.command_line or ""),
        ("machine", _machine(facts)),
        ("jobs", _jobs(facts, verdict)),
        ("progress", _progress(facts)),
        ("checkpoints", _checkpoints(facts)),
        ("pace", _pace(facts, verdict)),
        ("preflight", preflight_notes.summary(preflight_notes.read(facts.run_dir))),
        ("latest start on", _hosts(_environment(facts))),
    ]
    lines = run_tables.aligned([(f"{key}:", terminal.printable(text, 1000)) for key, text in pairs if text])
    return [*lines, "", *_history(story)]


def _history(story: Story) -> list[str]:
    return ["history:", *(f"  {line}" for line in run_tables.history_lines(story))]


def _model(facts: RunFacts) -> str:
    chosen, size = checks.check_model(facts.run.recipe)
    return f"{checks.model_line(facts.run.recipe, chosen, size)} ({facts.run.recipe_name})"


def _machine(facts: RunFacts) -> str:
    allocation = facts.run.allocation
    racks = f", {allocation.num_racks} whole racks" if allocation.num_racks else ""
    queue = f", queue {allocation.queue}" if allocation.queue else ""
    walltime = f", {allocation.walltime_min // 60}:{allocation.walltime_min % 60:02d} h" if allocation.walltime_min else ""
    return f"{facts.run.machine.name}, {num_ranks_text(allocation)}{racks}{queue}{walltime}"


def _jobs(facts: RunFacts, verdict: Verdict) -> str:
    if facts.jobs is None:
        return ""
    what = "process" if facts.jobs.scheduler == "local" else "job"
    gone = "ended" if facts.jobs.scheduler == "local" else "no longer known"
    jobs = ", ".join(f"{what} {job_id} ({gone if state is None else str(state).lower()})" for job_id, state in verdict.jobs)
    return f"{jobs}; {facts.jobs.scheduler}, submitted from {facts.jobs.host} {facts.jobs.submitted[:19].replace('T', ' ')} UTC"


def _progress(facts: RunFacts) -> str:
    loss = f", loss {facts.loss:.4f}" if facts.loss is not None else ""
    return f"step {facts.step:,} of {facts.run.last_step:,}{loss}"


def _checkpoints(facts: RunFacts) -> str:
    if not facts.checkpoint_steps:
        return "none yet"
    number = len(facts.checkpoint_steps)
    return f"{number} {'checkpoint' if number == 1 else 'checkpoints'}, the newest of step {facts.saved_step:,}"


def _pace(facts: RunFacts, verdict: Verdict) -> str:
    pace = run_tables.rates(facts)
    if not pace:
        return ""
    speed = f"{pace['residues_per_s']:,.0f} residues/s, " if pace["residues_per_s"] is not None else ""
    text = f"{speed}{pace['step_s']:.3g} s a step (medians of the last {pace['of_last_steps']} steps)"
    if pace["steps_left"]:
        text += f"; {run_tables.duration(pace['time_left_s'])} {'left' if verdict.state.is_alive else 'of work left'} at this pace"
    return text


def _hosts(environment: dict[str, Any] | None) -> str:
    hosts = (environment or {}).get("hosts")
    if not isinstance(hosts, dict) or not hosts:
        return ""
    names = list(hosts)
    return f"{', '.join(map(str, names[:4]))}{f' and {len(names) - 4} more hosts' if len(names) > 4 else ''}"
