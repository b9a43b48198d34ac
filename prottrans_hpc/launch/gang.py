"""A gang is all ranks of one run at once: prepare or reopen its run directory, write its job script, start it.

A run directory belongs to one run. The same experiment (recipe, corpus) resumes in it; another one is refused.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .. import __version__, config, durable, file_lock, run_dir, terminal
from ..errors import ConfigError, IdentityError, ProttransError, SubmitError
from ..file_lock import Lock
from ..machine import Allocation, Machine
from ..recipe import Recipe, science
from ..run_dir import Init, Preflight, Run, RunDir
from . import foreground, job_events, lease, submission
from .checks import CorpusFacts
from .job import Job
from .job_script import render
from .schedulers import SCHEDULERS


@dataclass(frozen=True)
class Plan:
    """Everything about a pre-training job that was decided before anything is touched."""

    recipe: Recipe
    recipe_name: str
    corpus: CorpusFacts
    machine: Machine
    allocation: Allocation
    stop_after_step: int | None
    run_dir: RunDir
    """Its path is absolute; the folder may not exist yet."""
    flags: tuple[str, ...] = ()
    """For the ranks: how much rank 0 says."""
    account: str | None = None
    """Project that a batch system charges."""
    num_jobs: int = 1
    """Jobs of a chain, each resuming where the one before it stopped."""
    init: Init | None = None
    """Whose weights a new run begins with; None: its own, or those that the run in the directory began with."""
    after: str | None = None
    """Job that must have ended, however, before the first of these starts."""
    preflight: Preflight | None = None
    """What the jobs measure before they train; None: nothing."""
    command_line: str | None = None
    """What a person typed, for the records."""

    @property
    def job(self) -> Job:
        """The job that carries the plan out."""
        python = self.machine.python or sys.executable
        # In a container the profile's interpreter is the image's; what goes on around the ranks has this one.
        host_python = sys.executable if self.machine.launcher_prefix else None
        name, measures = self.run_dir.path.name, self.preflight is not None
        return Job("pretrain", name, self.run_dir, self.machine, self.allocation, python, self.flags, self.account, host_python, measures)

    @property
    def script(self) -> bytes:
        """The job script: a function of the plan alone, so that a dry run shows what a real one runs."""
        return render(self.job, SCHEDULERS[self.machine.scheduler].render_header(self.job))


def default_run_dir(recipe: Recipe, recipe_name: str, corpus: Path, init: Init | None = None) -> Path:
    """`runs/NAME-ID`, the ID made from the science, the corpus's path and whose weights it begins with: the same command finds the same run again."""
    from hashlib import sha256

    identity = json.dumps([science(recipe), os.fspath(corpus.absolute()), *([init.choice] if init else [])], sort_keys=True)
    return Path("runs", f"{recipe_name[:50]}-{sha256(identity.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}")


def usable_name(name_or_path: str) -> str:
    """A recipe's name, or that of its file, with whatever a name cannot have replaced."""
    name = Path(name_or_path).stem if name_or_path.endswith(".toml") else name_or_path
    return re.sub(r"[^A-Za-z0-9._-]", "_", name).lstrip(".-")[:64] or "recipe"


def existing_run(plan: Plan) -> Run | None:
    """The run in the plan's directory, if there is one that the plan continues.

    Raises IdentityError when it is another experiment, ConfigError when the directory holds something else.
    """
    folder = plan.run_dir.path
    if not plan.run_dir.run_json.exists():
        _check_free(folder)
        return None
    run = run_dir.read_run(plan.run_dir)
    old = {**science(run.recipe), "corpus_sha256": run.corpus_sha256}
    new = {**science(plan.recipe), "corpus_sha256": plan.corpus.sha256}
    if plan.init is not None:
        old, new = {**old, "init": run.init.choice if run.init else None}, {**new, "init": plan.init.choice}
    if old != new:
        raise IdentityError(
            f"{folder} holds another experiment (run -> this command): {'; '.join(config.differences(old, new))}. "
            "Give the settings and the corpus of that run to resume it, or another --run-dir to start a new one"
        )
    return run


def describe(plan: Plan, run: Run | None) -> str:
    """Whether the directory is new, or what is in it already; whether a checkpoint can be taken is for the ranks to say."""
    if run is None:
        return f"new, with the weights of {plan.init.asked}" if plan.init else "new"
    steps = plan.run_dir.checkpoint_steps()
    end = min(plan.recipe.num_steps, plan.stop_after_step or plan.recipe.num_steps)
    if not steps:
        return "starts again: it has no checkpoint yet"
    return f"newest checkpoint: step {steps[-1]} of {end}"


def carry_out(plan: Plan, *, detach: bool) -> int:
    """Write the run directory and start or submit the job; the exit code of a job in the foreground, 0 of any other."""
    directory = _prepare(plan.run_dir.path)
    with locked(directory) as lock:
        run = existing_run(plan)
        check_idle(directory)
        _write_run(plan, directory, run)
        durable.write_bytes(directory.job_script, plan.script)
        _forget_last_start(directory)
        if plan.machine.scheduler != "local":
            _submit_chain(plan, directory)
            return 0
        if not detach:
            write_jobs(directory, "local", [str(os.getpid())])
            return foreground.run(["bash", str(directory.job_script)], lock)
        job_id = submission.submit("local", directory, keep_open=(lock,))
        write_jobs(directory, "local", [job_id])
        path = directory.path
        terminal.note(f"started in the background as process {job_id}\n  follow: prottrans runs logs {path} --follow\n  stop:   prottrans runs cancel {path}")
        return 0


def set_up(plan: Plan, script: bytes) -> RunDir:
    """Write the run directory for a job that runs others beside it, and start nothing; `script` is what that job calls."""
    directory = _prepare(plan.run_dir.path)
    with locked(directory):
        run = existing_run(plan)
        check_idle(directory)
        _write_run(plan, directory, run)
        durable.write_bytes(directory.job_script, script)
        _forget_last_start(directory)
    return directory


def _forget_last_start(directory: RunDir) -> None:
    """How an earlier start ended must not pass for how the next one does."""
    for left in (directory.exit_code, directory.preflight_json):
        left.unlink(missing_ok=True)


def belongs_to(directory: RunDir, scheduler: str, job_id: str, *, account: str | None) -> None:
    """Note which job runs in a directory that `set_up` made."""
    write_jobs(directory, scheduler, [job_id], account=account)


def _submit_chain(plan: Plan, directory: RunDir) -> None:
    """Submit the jobs of a chain; what is submitted is on the disk before the next one is tried."""
    scheduler, job_ids = plan.machine.scheduler, list[str]()
    for number in range(1, plan.num_jobs + 1):
        try:
            job_ids.append(submission.submit(scheduler, directory, after=job_ids[-1] if job_ids else plan.after))
        except SubmitError as error:
            raise type(error)(f"{error}{_already(job_ids, number, plan.num_jobs, directory)}") from error
        write_jobs(directory, scheduler, job_ids, account=plan.account)
        job_events.record(directory, "submitted", job_id=job_ids[-1], restart=0, number=number, of=plan.num_jobs, command_line=plan.command_line)
    terminal.note(f"submitted to {plan.machine.name}: job {', then '.join(job_ids)}")


def _already(job_ids: Sequence[str], number: int, num_jobs: int, directory: RunDir) -> str:
    """What of a chain is in the queue although the rest could not be submitted."""
    if not job_ids:
        return ""
    named = f"job {job_ids[0]}" if len(job_ids) == 1 else f"jobs {', '.join(job_ids)}"
    remedy = f"leave them, or stop them with: prottrans runs cancel {directory.path}"
    return f". This was job {number} of a chain of {num_jobs}; {named} before it will run: {remedy}"


def check_idle(directory: RunDir) -> None:
    """Raises SubmitError when a batch job of this run directory may still run: two must never train in one."""
    jobs, held = run_dir.read_jobs(directory), lease.read_lease(directory)
    asked: dict[str, list[str]] = {}
    if jobs is not None and jobs.scheduler != "local":  # the lock tells of those
        asked.setdefault(jobs.scheduler, []).extend(jobs.job_ids)
    if held is not None and held.job_id not in asked.setdefault(held.scheduler, []):
        asked[held.scheduler].append(held.job_id)
    states = [found for scheduler, job_ids in asked.items() for found in submission.states(scheduler, job_ids).items()]
    alive = [f"{job_id} ({state})" for job_id, state in states if state.is_alive]
    if alive:
        raise SubmitError(f"{directory.path} is in use by job {', '.join(alive)}: wait for it, or stop it with: prottrans runs cancel {directory.path}")


def _prepare(folder: Path) -> RunDir:
    try:
        return run_dir.prepare(folder)
    except (FileNotFoundError, NotADirectoryError, FileExistsError) as error:
        raise ConfigError(f"the run directory {folder} cannot be made: {error.strerror}. Choose another --run-dir") from error


def _check_free(folder: Path) -> None:
    ours = {"logs", "checkpoints", RunDir(folder).lock.name}
    if folder.is_dir():
        strangers = sorted(path.name for path in folder.iterdir() if path.name not in ours and not path.name.startswith("."))
        if strangers:
            raise ConfigError(f"{folder} is not empty and is no run directory (it holds {', '.join(strangers[:3])}): choose another --run-dir")
    elif folder.exists():
        raise ConfigError(f"{folder} is a file: choose another --run-dir")


def _write_run(plan: Plan, directory: RunDir, old: Run | None) -> None:
    """Write run.json when it is new or something that may change has: nodes, steps, loading, checkpoint policy."""
    created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    fresh = Run(
        run_id=run_dir.new_run_id(),
        created=created,
        version=__version__,
        recipe=plan.recipe,
        recipe_name=plan.recipe_name,
        corpus=str(plan.corpus.path),
        corpus_sha256=plan.corpus.sha256,
        machine=plan.machine,
        allocation=plan.allocation,
        stop_after_step=plan.stop_after_step,
        init=plan.init,
        preflight=plan.preflight,
        command_line=plan.command_line,
    )
    run = fresh if old is None else replace(fresh, run_id=old.run_id, created=old.created, init=old.init)
    if run == old:
        return
    if old is not None:
        for line in config.differences(_plain(old), _plain(run)):
            terminal.note(f"changed since the last start: {line}")
    run_dir.write_run(directory, run)


def _plain(run: Run) -> dict[str, Any]:
    """For a comparison: the words that asked for it are no part of a run."""
    nouns = {"recipe": config.to_json(run.recipe), "machine": config.to_json(run.machine), "allocation": config.to_json(run.allocation)}
    return {
        **vars(run),
        **nouns,
        "command_line": None,
        "init": vars(run.init) if run.init else None,
        "preflight": vars(run.preflight) if run.preflight else None,
    }


def write_jobs(directory: RunDir, scheduler: str, job_ids: Sequence[str], *, account: str | None = None) -> None:
    """Note what was submitted, and where."""
    submitted = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    run_dir.write_jobs(directory, run_dir.Jobs(scheduler, tuple(job_ids), os.uname().nodename, submitted, account))


@contextmanager
def locked(directory: RunDir) -> Iterator[int]:
    """Hold the run directory; the descriptor goes to the job, so that the last of its processes gives it free."""
    descriptor = os.open(directory.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        match _take(descriptor):
            case Lock.BUSY:
                raise SubmitError(f"{directory.path} is in use by a job that is running{_job_in(directory)}: wait for it or stop it")
            case Lock.NO_LOCKS:
                terminal.warn(f"the file system of {directory.path} has no locks: make sure that no other job uses this run directory")
        yield descriptor
    finally:
        os.close(descriptor)


def _take(descriptor: int) -> Lock:
    """Take the lock unless a job has it; who only looks whether it is held gives it back at once."""
    for _ in range(_GLANCES):
        lock = file_lock.take(descriptor)
        if lock is not Lock.BUSY:
            return lock
        time.sleep(_GLANCE_S)
    return file_lock.take(descriptor)


_GLANCES, _GLANCE_S = 5, 0.05


def _job_in(directory: RunDir) -> str:
    try:
        jobs = run_dir.read_jobs(directory)
    except ProttransError:
        return ""
    return f" (process {jobs.job_ids[-1]} on {jobs.host}, since {jobs.submitted})" if jobs else ""
