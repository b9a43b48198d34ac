"""A farm: independent items of a stage as jobs of one node each, retried, resumed, watched until all are done.

The command that owns a farm stays until its end, because somebody has to plan between its rounds and to put the
results together; it costs the login node next to nothing. Stopped or killed, the same command goes on: items
whose output is there are not run again, and jobs that are still in the queue are waited for.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from .. import file_lock, stage, terminal
from ..errors import SubmitError
from ..file_lock import Lock
from ..stage import Item
from .farm_files import FarmFiles, read_state
from .farm_jobs import Jobs, open_jobs, render
from .farm_plan import FarmPlan
from .farm_round import Round, item_command


def preview(plan: FarmPlan, name: str) -> str:
    """What would be submitted for the round of this name, if it has as many items as were asked for."""
    files = FarmFiles(plan.folder / name)
    return render(plan.shape(files), [item_command(plan, files, number, 1, "TOKEN") for number in range(plan.num_jobs)])


def run(plan: FarmPlan, name: str, items: Sequence[Item]) -> None:
    """Run the items of one round until every output is there. Raises FarmError with the exit code of the first that failed for good."""
    files = FarmFiles(plan.folder / name)
    files.prepare()
    groups = [items[start : start + plan.shares_per_job] for start in range(0, len(items), plan.shares_per_job)]
    rounds = Round(plan, name, files, groups)
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
        match file_lock.take(file.fileno()):
            case Lock.BUSY:
                raise SubmitError(f"another process works with {plan.folder}: wait for it, or stop it")
            case Lock.NO_LOCKS:
                terminal.warn(f"the file system of {plan.folder} has no locks: make sure that this command runs only once")
        if fresh:
            _settle(plan)
        yield stage.Farm(plan.folder, plan.num_items, plan.cores_per_item, lambda name, items: run(plan, name, items))


def _settle(plan: FarmPlan) -> None:
    """Cancel what an earlier start left in the queue, in every round, wait until it is gone, and forget the rounds."""
    for folder in sorted(path for path in plan.folder.iterdir() if path.is_dir()):
        files = FarmFiles(folder)
        found = read_state(files)
        job_ids = [job.job_id for job in found[1] if job.state == "submitted" and job.job_id is not None] if found else []
        if found and job_ids and found[0] != "local":
            jobs = open_jobs(plan.shape(files))
            if trouble := jobs.cancel(job_ids):
                terminal.warn(f"{trouble}: waiting for the jobs of an earlier start to end by themselves")
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
