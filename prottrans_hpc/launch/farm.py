"""A farm: independent items of a stage as jobs of one node each, retried, resumed, watched until all are done.

The command that owns a farm stays until its end, because somebody has to plan between its rounds and to put the
results together; it costs the login node next to nothing. Stopped or killed, the same command goes on: items
whose output is there are not run again, and jobs that are still in the queue are waited for.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from .. import config, durable, errors, stage, terminal
from ..errors import ConfigError, FarmError, SubmitError
from ..machine import Machine, usable_cpu_cores
from ..stage import Item
from .farm_files import FarmFiles, FarmJob, read_state, write_state
from .farm_jobs import Jobs, JobShape, open_jobs, render

_INCURABLE = frozenset((errors.USAGE, errors.BAD_DATA, errors.NO_INPUT, errors.BUG, errors.CANNOT_WRITE, errors.NO_PERMISSION, errors.IDENTITY))
"""Exit codes after which another try would end in the same way."""
_LOOK_EVERY_S = 1.0
_MAX_STOPS = 50
"""Tries that ended early with their state saved (75); each gets further, so they do not count as failures."""


@dataclass(frozen=True)
class FarmPlan:
    """Everything about a farm that was decided before anything is touched."""

    machine: Machine
    folder: Path
    """Absolute; a round of the farm is a folder in it."""
    name: str
    """For people and schedulers."""
    num_jobs: int
    """Into so many jobs the work is cut, each one node's."""
    num_at_once: int
    walltime_min: int | None = None
    queue: str | None = None
    account: str | None = None
    shares_per_job: int = 1
    """Items that a job runs side by side, each with a GPU of its own."""
    num_retries: int = 2
    cores: int | None = None
    """Of a node for each item; None: its share of all."""
    flags: tuple[str, ...] = ()
    """--quiet or --verbose, for the items."""
    follow: bool = False
    """Print what the items print."""
    ends_at_failure: bool = False
    """Whether the others are of no use once one item has failed for good."""

    def __post_init__(self) -> None:
        config.check_name(self.name, what="the name of the farm")
        for what, value in (("--items", self.num_jobs), ("--nodes", self.num_at_once)):
            if value < 1:
                raise ConfigError(f"{what} must be at least 1, not {value}")

    @property
    def python(self) -> str:
        """The interpreter on the nodes."""
        return self.machine.python or sys.executable

    @property
    def cores_per_item(self) -> int:
        """Cores of a node, shared by the items of a job; on one computer also by the jobs that run at the same time."""
        if self.cores is not None:
            return self.cores
        sharing = self.shares_per_job * (self.num_at_once if self.machine.scheduler == "local" else 1)
        return max(1, usable_cpu_cores(self.machine.node) // sharing)

    def shape(self, files: FarmFiles) -> JobShape:
        """What each job asks for."""
        return JobShape(self.machine, self.name, files.submitit, self.python, self.num_at_once, self.walltime_min, self.queue, self.account)

    def as_stage_sees_it(self) -> stage.Farm:
        """For the request of a stage."""
        return stage.Farm(self.folder, self.num_jobs * self.shares_per_job, self.cores_per_item, lambda name, items: run(self, name, items))


def preview(plan: FarmPlan, name: str) -> str:
    """What would be submitted for the round of this name, if it has as many items as were asked for."""
    files = FarmFiles(plan.folder / name)
    return render(plan.shape(files), [_command(plan, files, number, 1) for number in range(plan.num_jobs)])


def run(plan: FarmPlan, name: str, items: Sequence[Item]) -> None:
    """Run the items of one round until every output is there. Raises FarmError with the exit code of the first that failed for good."""
    files = FarmFiles(plan.folder / name)
    files.prepare()
    groups = [items[start : start + plan.shares_per_job] for start in range(0, len(items), plan.shares_per_job)]
    rounds = _Round(plan, name, files, groups)
    if all(job.state == "done" for job in rounds.jobs):
        return
    try:
        with terminal.progress(f"{name}: {len(groups)} jobs on {plan.machine.name}", total=len(groups), unit="jobs") as advance:
            rounds.work(advance)
    except BaseException:
        rounds.stop()
        raise
    rounds.raise_failures()


@contextmanager
def opened(plan: FarmPlan, *, fresh: bool) -> Iterator[stage.Farm]:
    """The farm for the request of a stage, its folder made and ours alone while the block runs.

    `fresh` is for work whose items a later start cannot take over: what an earlier start left in the queue is
    cancelled, and its rounds are forgotten. Raises SubmitError when another process owns the farm.
    """
    FarmFiles(plan.folder).prepare_folder()
    lock = plan.folder / "lock"
    with lock.open("wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SubmitError(f"another process works with {plan.folder}: wait for it, or stop it") from None
        except OSError as error:
            terminal.warn(f"the file system of {plan.folder} has no locks ({error.strerror}): make sure that this command runs only once")
        if fresh:
            _settle(plan)
        yield plan.as_stage_sees_it()


def _settle(plan: FarmPlan) -> None:
    """Cancel what an earlier start left in the queue, in every round, wait until it is gone, and forget the rounds."""
    for folder in sorted(path for path in plan.folder.iterdir() if path.is_dir()):
        files = FarmFiles(folder)
        found = read_state(files)
        job_ids = [job.job_id for job in found[1] if job.state == "submitted" and job.job_id is not None] if found else []
        if found and job_ids and found[0] != "local":
            jobs = open_jobs(plan.shape(files))
            jobs.cancel(job_ids)
            _wait_until_gone(jobs, job_ids)
        elif job_ids:
            time.sleep(2.0)  # local ones end by themselves within a second
        shutil.rmtree(folder)


def _wait_until_gone(jobs: Jobs, job_ids: Sequence[str]) -> None:
    end = time.monotonic() + 300
    while time.monotonic() < end:
        alive = jobs.alive(job_ids)
        if alive is not None and not any(alive.values()):
            return
        time.sleep(2.0)
    raise SubmitError(f"jobs of an earlier start of this command do not end: {', '.join(job_ids[:5])}. Cancel them, and run the command again")


def _command(plan: FarmPlan, files: FarmFiles, number: int, attempt: int) -> list[str]:
    return [plan.python, "-P", "-m", "prottrans_hpc.launch.farm_item", str(files.folder), str(number), str(attempt)]


@dataclass
class _Round:
    """One set of items on its way."""

    plan: FarmPlan
    name: str
    files: FarmFiles
    groups: Sequence[Sequence[Item]]
    jobs: list[FarmJob] = field(default_factory=list)
    open: Jobs | None = None
    suspects: set[str] = field(default_factory=set)
    """Job ids that the scheduler called ended while they had left no outcome: their file may still be on its way."""

    def __post_init__(self) -> None:
        self._write_jobs()
        found = read_state(self.files)
        outputs = [tuple(str(item.output) for item in group) for group in self.groups]
        self.jobs = found[1] if found and [job.outputs for job in found[1]] == outputs else [FarmJob(paths) for paths in outputs]
        is_batch = self.plan.machine.scheduler != "local"
        for number, job in enumerate(self.jobs):
            was_in_queue = job.state == "submitted" and is_batch and found is not None and found[0] == self.plan.machine.scheduler
            if job.has_output:
                job.state = "done"
            elif not was_in_queue:
                # A later start of the command is a new chance for what failed.
                self.jobs[number] = replace(job, state="waiting", num_tries=job.num_tries, codes=[])
        num_done = sum(job.state == "done" for job in self.jobs)
        if num_done:
            terminal.note(f"{self.name}: {num_done} of {len(self.jobs)} jobs were done before")
        self._save()

    def _write_jobs(self) -> None:
        driver = os.getpid() if self.plan.machine.scheduler == "local" else None
        cores = str(self.plan.cores_per_item)
        for number, group in enumerate(self.groups):
            commands = []
            for share, item in enumerate(group):
                request = self.files.request(number, share)
                durable.write_json(request, dict(item.request))
                argv = [self.plan.python, "-P", "-m", "prottrans_hpc.launch.stage_process", item.stage, str(request), *self.plan.flags]
                environment = {"OMP_NUM_THREADS": cores}
                if self.plan.machine.node.num_gpus == 0 or self.plan.shares_per_job > 1:
                    environment["CUDA_VISIBLE_DEVICES"] = str(share) if self.plan.machine.node.num_gpus else ""
                commands.append({"argv": argv, "environment": environment})
            durable.write_json(self.files.job(number), {"driver": driver, "commands": commands})

    def _save(self) -> None:
        write_state(self.files, self.name, self.plan.machine.scheduler, self.jobs)

    def work(self, advance: terminal.Advance) -> None:
        """Submit and watch until nothing is left to do."""
        self.open = jobs = open_jobs(self.plan.shape(self.files))
        advance(sum(job.state == "done" for job in self.jobs))
        follower = _Follower(self.files, len(self.jobs)) if self.plan.follow else None
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
        waiting = [number for number, job in enumerate(self.jobs) if job.state == "waiting"]
        if jobs.max_submitted is not None:
            waiting = waiting[: max(0, jobs.max_submitted - len(self._submitted_ids()))]
        if not waiting:
            return
        job_ids = jobs.submit([_command(self.plan, self.files, number, self.jobs[number].num_tries + 1) for number in waiting])
        for number, job_id in zip(waiting, job_ids, strict=True):
            job = self.jobs[number]
            job.state, job.job_id, job.num_tries = "submitted", job_id, job.num_tries + 1
        self._save()
        terminal.detail(f"{self.name}: submitted {', '.join(job_ids[:3])}{' ...' if len(job_ids) > 3 else ''} for {len(waiting)} jobs")

    def _look(self, alive: Mapping[str, bool], advance: terminal.Advance) -> None:
        """Take over how jobs ended. `alive` is what the scheduler says; empty when it was not asked or did not answer."""
        outcomes = self.files.outcomes()
        changed = False
        for number, job in enumerate(self.jobs):
            if job.state != "submitted" or job.job_id is None:
                continue
            code = self.files.code(number, job.num_tries) if (number, job.num_tries) in outcomes else None
            is_gone = alive.get(job.job_id) is False
            # One that was asked to stop may be requeued by submitit, under the same id: only the scheduler knows.
            if code is not None and (code in (errors.DONE, *_INCURABLE) or is_gone):
                changed = self._end(number, code, advance)
            elif is_gone and job.job_id in self.suspects:
                changed = self._end(number, None, advance)
            elif is_gone:
                self.suspects.add(job.job_id)
        if changed:
            self._save()

    def _end(self, number: int, code: int | None, advance: terminal.Advance) -> bool:
        job = self.jobs[number]
        job.codes.append(code)
        num_failures = sum(one not in (errors.DONE, errors.REQUEUE) for one in job.codes)
        if code == errors.DONE and job.has_output:
            job.state = "done"
            advance(1)
        elif code in _INCURABLE or num_failures > self.plan.num_retries or len(job.codes) >= _MAX_STOPS:
            job.state = "failed"
        else:
            job.state = "waiting"
            terminal.note(f"{self.name}: job {number} {_cause(code)}; it is run again ({self.files.log(number)})")
        return True

    def stop(self) -> None:
        """Cancel everything that may still run; a later start submits it again."""
        job_ids = self._submitted_ids()
        if job_ids and self.open is not None:
            terminal.note(f"{self.name}: cancelling {len(job_ids)} jobs")
            self.open.cancel(job_ids)
        for number, job in enumerate(self.jobs):
            if job.state == "submitted":
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
            f"{self.name}: job {first} {_cause(code)}{others}: {_last_words(self.files.log(first))} (see {self.files.log(first)})",
            code=errors.NO_RESOURCES if code in (None, errors.DONE) else code or errors.NO_RESOURCES,
        )


def _cause(code: int | None) -> str:
    if code is None:
        return "ended without a word (killed, or its node was lost)"
    if code == errors.DONE:
        return "ended without its output"
    if code > 128:
        return f"was killed by signal {code - 128}"
    return f"ended with exit code {code} ({errors.MEANING.get(code, 'see its log')})"


def _last_words(log: Path) -> str:
    """The last error in a log, or its last line."""
    try:
        lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    except OSError:
        return "it left no log"
    wanted = [line for line in lines if line.startswith("error: ")] or lines
    return terminal.printable(wanted[-1].removeprefix("error: "), 500) if wanted else "its log is empty"


class _Follower:
    """Prints what the jobs print, line by line, on standard error."""

    def __init__(self, files: FarmFiles, num_jobs: int) -> None:
        self._logs = [files.log(number) for number in range(num_jobs)]
        self._shown = [log.stat().st_size if log.exists() else 0 for log in self._logs]

    def show(self) -> None:
        """Print the whole lines that are new."""
        for number, log in enumerate(self._logs):
            if not log.exists() or log.stat().st_size <= self._shown[number]:
                continue
            with log.open("rb") as file:
                file.seek(self._shown[number])
                text = file.read()
            whole = text[: text.rfind(b"\n") + 1]
            self._shown[number] += len(whole)
            for line in whole.splitlines():
                terminal.note(f"[{number}] {terminal.printable(line, 500)}")
