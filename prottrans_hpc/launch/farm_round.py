"""One round of a farm: its jobs on their way, from submission to the output, over failures and stops."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from .. import durable, errors, terminal
from ..errors import FarmError, SubmitError
from ..stage import Item
from . import verdicts
from .farm_files import FarmFiles, FarmJob, read_state, write_state
from .farm_jobs import Jobs, open_jobs
from .farm_plan import FarmPlan
from .farm_report import Follower, cause, last_words

_INCURABLE = frozenset((*verdicts.INCURABLE, errors.CANNOT_WRITE))
"""Exit codes after which another try would end in the same way. It would follow at once: a full disk still is, while the next job of a chain comes later."""
_LOOK_EVERY_S = 1.0
_MAX_REFUSALS = 20
_MAX_STOPS = 50
"""Tries that ended early with their state saved (75); each gets further, so they do not count as failures."""


def item_command(plan: FarmPlan, files: FarmFiles, number: int, attempt: int, token: str) -> list[str]:
    """What the job of this number runs, at its attempt of this number (from 1), for the submission of this token."""
    return [plan.python, "-P", "-m", "prottrans_hpc.launch.farm_item", str(files.folder), str(number), str(attempt), token]


@dataclass
class Round:
    """One set of items on its way."""

    plan: FarmPlan
    name: str
    files: FarmFiles
    groups: Sequence[Sequence[Item]]
    jobs: list[FarmJob] = field(default_factory=list)
    open: Jobs | None = None
    inherited: set[int] = field(default_factory=set)
    """Jobs that an earlier start left in the queue."""
    has_submitted: bool = False
    """Whether the scheduler has taken jobs of this farm, so that what it refuses is their number, not their kind."""
    num_refusals: int = 0
    """Of the scheduler, one after the other."""
    submits_after: float = 0.0
    """By the monotonic clock."""
    suspects: set[str] = field(default_factory=set)
    """Job ids that the scheduler called ended while they had left no outcome: their file may still be on its way."""

    def __post_init__(self) -> None:
        found = read_state(self.files)
        outputs = [tuple(str(item.output) for item in group) for group in self.groups]
        self.jobs = found[1] if found and [job.outputs for job in found[1]] == outputs else [FarmJob(paths) for paths in outputs]
        is_batch = self.plan.machine.scheduler != "local"
        for number, job in enumerate(self.jobs):
            was_in_queue = job.state == "submitted" and is_batch and found is not None and found[0] == self.plan.machine.scheduler
            if job.has_output:
                job.state = "done"
            elif was_in_queue:
                self.inherited.add(number)
            else:
                # A later start of the command is a new chance for what failed.
                self.jobs[number] = replace(job, state="waiting", codes=[])
        for number in range(max(len(self.jobs), len(found[1]) if found else 0)):
            if number not in self.inherited:
                self._disown(number)
        num_done = sum(job.state == "done" for job in self.jobs)
        if num_done:
            terminal.note(f"{self.name}: {num_done} of {len(self.jobs)} jobs were done before")
        self.has_submitted = any(path != self.files.state for path in self.plan.folder.glob("*/farm.json"))  # an earlier round has
        self._save()

    def _write_job(self, number: int) -> None:
        """What a job runs, for its latest submission alone."""
        driver = os.getpid() if self.plan.machine.scheduler == "local" else None
        commands = []
        for share, item in enumerate(self.groups[number]):
            request = self.files.request(number, share)
            durable.write_json(request, dict(item.request))
            argv = [self.plan.python, "-P", "-m", "prottrans_hpc.launch.stage_process", item.stage, str(request), *self.plan.flags]
            environment = {"OMP_NUM_THREADS": str(self.plan.cores_per_item)}
            if self.plan.machine.node.num_gpus == 0 or self.plan.shares_per_job > 1:
                environment["CUDA_VISIBLE_DEVICES"] = str(share) if self.plan.machine.node.num_gpus else ""
            commands.append({"argv": argv, "environment": environment})
        durable.write_json(self.files.job(number), {"driver": driver, "token": self.jobs[number].token, "commands": commands})

    def _disown(self, number: int) -> None:
        """Whatever may still be in the queue for a job ends by itself."""
        self.files.job(number).unlink(missing_ok=True)

    def _save(self) -> None:
        write_state(self.files, self.name, self.plan.machine.scheduler, self.jobs)

    def work(self, advance: terminal.Advance) -> None:
        """Submit and watch until nothing is left to do."""
        self.open = jobs = open_jobs(self.plan.shape(self.files))
        advance(sum(job.state == "done" for job in self.jobs))
        follower = Follower(self.files, len(self.jobs)) if self.plan.follow else None
        last_query = time.monotonic()
        while self._is_going_on():
            self._submit(jobs)
            time.sleep(min(_LOOK_EVERY_S, jobs.query_every_s))
            is_due = time.monotonic() - last_query >= jobs.query_every_s
            alive = jobs.alive(self._submitted_ids()) if is_due else None
            last_query = time.monotonic() if is_due else last_query
            self._look(alive or {}, advance)
            if follower is not None:
                follower.show()
        if self._submitted_ids():
            self.stop()

    def _is_going_on(self) -> bool:
        states = {job.state for job in self.jobs}
        return not states.isdisjoint(("waiting", "submitted")) and not (self.plan.ends_at_failure and "failed" in states)

    def _submitted_ids(self) -> list[str]:
        return [job.job_id for job in self.jobs if job.state == "submitted" and job.job_id is not None]

    def _submit(self, jobs: Jobs) -> None:
        num_submitted = len(self._submitted_ids())
        waiting = [number for number, job in enumerate(self.jobs) if job.state == "waiting"][: max(0, jobs.max_submitted - num_submitted)]
        # A scheduler throttles each array by itself: beside one that is there, only what has a place even if all of that one runs.
        if not waiting or (num_submitted and num_submitted + len(waiting) > self.plan.num_at_once) or time.monotonic() < self.submits_after:
            return
        try:
            self._hand_over(jobs, waiting)
        except SubmitError as error:
            # Jobs leave the queue some time after they have told that they are done; until then a site's limit may be reached.
            self.num_refusals += 1
            if not self.has_submitted or self.num_refusals > _MAX_REFUSALS:
                raise
            self._withdraw(("submitting",))
            self.submits_after = time.monotonic() + jobs.query_every_s
            terminal.note(f"{self.name}: {error}; asked again in {jobs.query_every_s:.0f} s")
        else:
            self.has_submitted, self.num_refusals = True, 0

    def _hand_over(self, jobs: Jobs, waiting: Sequence[int]) -> None:
        token = secrets.token_hex(8)
        for number in waiting:
            self.jobs[number] = replace(self.jobs[number], state="submitting", job_id=None, num_tries=self.jobs[number].num_tries + 1, token=token)
            self._write_job(number)
        self._save()  # before the scheduler is asked: whatever happens then, this submission is told from a later one
        job_ids = jobs.submit([item_command(self.plan, self.files, number, self.jobs[number].num_tries, token) for number in waiting])
        for number, job_id in zip(waiting, job_ids, strict=True):
            self.jobs[number] = replace(self.jobs[number], state="submitted", job_id=job_id)
        self._save()
        terminal.detail(f"{self.name}: submitted {', '.join(job_ids[:3])}{' ...' if len(job_ids) > 3 else ''} for {len(waiting)} jobs")

    def _look(self, alive: Mapping[str, bool], advance: terminal.Advance) -> None:
        """Take over how jobs ended. `alive` is what the scheduler says; empty when it was not asked or did not answer."""
        outcomes = self.files.outcomes()
        changed = False
        for number, job in enumerate(self.jobs):
            if job.state != "submitted" or job.job_id is None:
                continue
            attempt = (number, job.num_tries, job.token)
            code = self.files.code(*attempt) if attempt in outcomes else None
            is_gone = alive.get(job.job_id) is False
            # One that was asked to stop may be requeued by submitit, under the same id: only the scheduler knows.
            if code is not None and (code in (errors.DONE, *_INCURABLE) or is_gone):
                self._end(number, code, advance)
                changed = True
            elif is_gone and job.job_id in self.suspects:
                self._end(number, None, advance)
                changed = True
            elif is_gone:
                self.suspects.add(job.job_id)
        if changed:
            self._save()

    def _end(self, number: int, code: int | None, advance: terminal.Advance) -> None:
        job = self.jobs[number]
        # What ended under an earlier start may have been cancelled by its end: that is no failure.
        is_leftover = number in self.inherited and code not in (errors.DONE, *_INCURABLE)
        self.inherited.discard(number)
        if is_leftover:
            job.state = "waiting"
            return
        job.codes.append(code)
        num_failures = sum(one not in (errors.DONE, errors.REQUEUE) for one in job.codes)
        if code == errors.DONE and job.has_output:
            job.state = "done"
            advance(1)
        elif code in _INCURABLE or num_failures > self.plan.num_retries or len(job.codes) >= _MAX_STOPS:
            job.state = "failed"
        else:
            job.state = "waiting"
            terminal.note(f"{self.name}: job {number} {cause(code)}; it is run again ({self.files.log(number)})")

    def stop(self) -> None:
        """Cancel everything that may still run. A later start waits until a batch system says that it is gone, and submits it again."""
        is_local = self.plan.machine.scheduler == "local"
        is_unanswered = any(job.state == "submitting" for job in self.jobs)
        self._withdraw(("submitting", "submitted") if is_local else ("submitting",))
        job_ids = self._submitted_ids()
        if job_ids and self.open is not None:
            terminal.note(f"{self.name}: cancelling {len(job_ids)} jobs")
            if trouble := self.open.cancel(job_ids):
                some = ", ".join(job_ids[:3])
                terminal.warn(f"{trouble}: jobs of {self.name} ({some} ...) may go on; cancel them, or run the command again to go on with them")
        if is_unanswered and not is_local:
            name, scheduler = self.plan.name, self.plan.machine.scheduler
            terminal.note(f"{scheduler} has not said whether it took the last jobs: any that are in the queue under the name {name} end by themselves")

    def _withdraw(self, states: Sequence[str]) -> None:
        """Jobs of these states are to be submitted again; what may be in the queue for them ends by itself."""
        for number, job in enumerate(self.jobs):
            if job.state in states:
                self._disown(number)
                self.jobs[number] = replace(job, state="waiting")
        self._save()

    def raise_failures(self) -> None:
        """Raise FarmError when a job failed for good."""
        failed = [number for number, job in enumerate(self.jobs) if job.state == "failed"]
        if not failed:
            return
        first = failed[0]
        code = self.jobs[first].codes[-1]
        others = f" (and {len(failed) - 1} more of {len(self.jobs)})" if len(failed) > 1 else ""
        raise FarmError(
            f"{self.name}: job {first} {cause(code)}{others}: {last_words(self.files.log(first))} (see {self.files.log(first)})",
            code=errors.NO_RESOURCES if code in (None, errors.DONE) else code or errors.NO_RESOURCES,
        )
