"""In what state runs are: one question to each scheduler for all runs together, then what the files say.

A scheduler that does not answer leaves its runs "unknown": never is a run taken for ended because nobody answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from .. import errors, terminal
from ..errors import SubmitError
from . import job_events, local_process, preflight_notes, submission, verdicts
from .job_state import State
from .run_facts import RunFacts
from .run_files import last_records

LOCAL = "local"


class RunState(StrEnum):
    """What a run does, for people."""

    NEW = "new"
    """Prepared, never started."""
    QUEUED = "queued"
    RUNNING = "running"
    STOPPING = "stopping"
    SUSPENDED = "suspended"
    UNKNOWN = "unknown"
    """Nobody can say now; treat it as running."""
    DONE = "done"
    STOPPED = "stopped"
    """Ended early in good order: it can be resumed."""
    CANCELLED = "cancelled"
    KILLED = "killed"
    """Ended without a word; it goes on from its last checkpoint."""
    FAILED = "failed"
    DAMAGED = "damaged"

    @property
    def is_alive(self) -> bool:
        """Whether a job of the run may still do something; in doubt, yes."""
        return self in (RunState.QUEUED, RunState.RUNNING, RunState.STOPPING, RunState.SUSPENDED, RunState.UNKNOWN)


@dataclass(frozen=True)
class Verdict:
    """The state of a run, and why."""

    state: RunState
    reason: str = ""
    """One clause; "" where the state says it all."""
    jobs: tuple[tuple[str, State | None], ...] = ()
    """The jobs of the latest submission in order; None: the scheduler has forgotten it or was not asked."""


Answer = Mapping[str, State] | None
"""State by job id; None: the scheduler did not answer."""


def judge(facts: Sequence[RunFacts]) -> list[Verdict]:
    """The state of each run. Asks each scheduler once; warns of one that does not answer."""
    wanted: dict[str, list[str]] = {}
    for run in facts:
        if run.jobs is not None and run.jobs.scheduler != LOCAL:
            wanted.setdefault(run.jobs.scheduler, []).extend(run.jobs.job_ids)
    answers = {scheduler: _ask(scheduler, list(dict.fromkeys(job_ids))) for scheduler, job_ids in wanted.items()}
    return [judge_one(run, answers.get(run.jobs.scheduler) if run.jobs else None) for run in facts]


def _ask(scheduler: str, job_ids: Sequence[str]) -> Answer:
    try:
        return submission.states(scheduler, job_ids)
    except SubmitError as error:
        terminal.warn(f"the states of jobs are unknown: {error}")
        return None


def judge_one(facts: RunFacts, answer: Answer) -> Verdict:
    """The state of one run, given what its scheduler answered."""
    if facts.jobs is None:
        return Verdict(RunState.NEW, "never started")
    return _judge_local(facts) if facts.jobs.scheduler == LOCAL else _judge_batch(facts, answer)


def _judge_local(facts: RunFacts) -> Verdict:
    jobs = facts.jobs
    assert jobs is not None
    if local_process.runs(facts.run_dir, jobs):
        return Verdict(RunState.RUNNING, "", tuple((job_id, State.RUNNING) for job_id in jobs.job_ids))
    none = tuple((job_id, None) for job_id in jobs.job_ids)
    ended = judge_ended(facts, {})
    if not local_process.is_here(jobs) and ended.state is RunState.KILLED:
        # Perhaps its file system tells other hosts nothing about locks.
        return Verdict(RunState.UNKNOWN, f"it was started on {jobs.host}: ask there", none)
    return Verdict(ended.state, ended.reason, none)


_ALIVE = {
    State.RUNNING: RunState.RUNNING,
    State.STOPPING: RunState.STOPPING,
    State.SUSPENDED: RunState.SUSPENDED,
    State.UNKNOWN: RunState.UNKNOWN,
    State.PENDING: RunState.QUEUED,
}
"""In the order in which the jobs of a chain decide what the run does."""


def _judge_batch(facts: RunFacts, answer: Answer) -> Verdict:
    assert facts.jobs is not None
    if answer is None:
        return Verdict(RunState.UNKNOWN, f"{facts.jobs.scheduler} does not answer", tuple((job_id, None) for job_id in facts.jobs.job_ids))
    states = {job_id: answer.get(job_id) for job_id in facts.jobs.job_ids}
    jobs = tuple(states.items())
    for job_state, run_state in _ALIVE.items():
        if job_state in states.values():
            waiting = sum(state is State.PENDING for state in states.values())
            reason = f"{waiting} more in the queue" if waiting and run_state is not RunState.QUEUED else ""
            return Verdict(run_state, reason, jobs)
    ended = judge_ended(facts, {job_id: state for job_id, state in states.items() if state is not None})
    return Verdict(ended.state, ended.reason, jobs)


_CAUSES = {
    State.PREEMPTED: "preempted",
    State.TIMEOUT: "its walltime was over",
    State.NODE_LOST: "a node was lost",
    State.OUT_OF_MEMORY: "out of memory",
}


def judge_ended(facts: RunFacts, states: Mapping[str, State]) -> Verdict:
    """The state of a run of which no job is alive; `states` is what a scheduler still knows of them."""
    if facts.saved_step >= facts.run.last_step or facts.exit_code == errors.DONE:
        return Verdict(RunState.DONE)
    if cancelled := was_cancelled(facts, states):
        return Verdict(RunState.CANCELLED, cancelled)
    code = facts.exit_code
    if code is not None and code != errors.REQUEUE:
        return Verdict(RunState.FAILED, f"exit code {code}: {preflight_notes.closed(facts.run_dir, code) or verdicts.describe_code(code)}")
    cause = next((_CAUSES[state] for state in reversed(list(states.values())) if state in _CAUSES), None)
    if code == errors.REQUEUE:
        return Verdict(RunState.STOPPED, cause or _last_cause(facts))
    return Verdict(RunState.KILLED, cause or "it ended without leaving an exit code")


def was_cancelled(facts: RunFacts, states: Mapping[str, State]) -> str:
    """By whom the latest jobs of a run were cancelled; "" when they were not."""
    assert facts.jobs is not None
    for event in reversed(job_events.read_events(facts.run_dir)):
        if event["event"] == "cancelled" and event["job_id"] in facts.jobs.job_ids and str(event["time"]) >= facts.jobs.submitted[:19]:
            return f"by {event.get('by', 'its owner')}, {event['time']}"
    return "by its owner or an administrator" if State.CANCELLED in states.values() else ""


def _last_cause(facts: RunFacts) -> str:
    stops = [record for record in last_records(facts.run_dir.history, 5) if record.get("event") == "stop"]
    return str(stops[-1].get("cause", "")) if stops else ""
