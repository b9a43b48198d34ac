"""The points of a scaling study as gangs: planned like trainings, run one after another, those that are measured left alone."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from .. import config, errors, run_dir, terminal
from ..errors import ConfigError, IdentityError, SubmitError
from ..machine import Machine
from ..recipe import Recipe
from ..run_dir import RunDir
from ..scaling_study import Study, StudyDir, StudyPoint, read_study, united, write_study
from . import checks, exclusion, gang, placement, planner, prospect, run_facts, submission, verdicts
from .checks import CorpusFacts
from .demand import Demand
from .follow import follow as follow_log
from .gang import Plan


@dataclass(frozen=True)
class Order:
    """A study and what it is run with."""

    study: Study
    folder: StudyDir
    """Its path is absolute."""
    recipe: Recipe
    corpus: CorpusFacts
    machine: Machine
    keeps_bins: bool
    """A person has chosen the micro batches."""
    walltime_min: int | None = None
    queue: str | None = None
    account: str | None = None
    excluded: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    """For the ranks."""
    command_line: str | None = None
    """What a person typed."""


def with_what_is_there(order: Order) -> Order:
    """The order, with the sizes and repetitions that its folder has already. Raises IdentityError when another study is in there."""
    if not order.folder.study_json.is_file():
        _check_free(order.folder.path)
        return order
    old = read_study(order.folder)
    study = united(old, order.study)
    if (changed := config.differences(_plain(replace(old, nodes=study.nodes, repetitions=study.repetitions)), _plain(study))) and any(
        order.folder.attempts(point) for point in old.points()
    ):
        raise IdentityError(f"{order.folder.path} holds another study (then -> now): {'; '.join(changed)}. Choose another --out, or give what it was made with")
    return replace(order, study=study)


def _plain(study: Study) -> object:
    return config.to_json(study)


def _check_free(path: Path) -> None:
    if path.exists() and (not path.is_dir() or any(not child.name.startswith(".") for child in path.iterdir())):
        raise ConfigError(f"{path} is there already and is no scaling study: choose another --out")


def plan_of(order: Order, point: StudyPoint, directory: RunDir) -> Plan:
    """A point as a training job. Raises ConfigError that says what is possible instead."""
    recipe = order.study.recipe_of(order.recipe, point.nodes)
    demand = Demand(num_nodes=point.nodes, partial_rack=True, walltime_min=order.walltime_min, queue=order.queue)
    seen = prospect.look_ahead(recipe, order.machine, demand, corpus=order.corpus, keeps_bins=order.keeps_bins)
    without = exclusion.leave_out(order.machine, seen.allocation, order.excluded, directory)
    allocation = placement.name_nodes(order.machine, without, required=False)
    plan = Plan(seen.recipe, order.study.recipe_name, order.corpus, order.machine, allocation, None, directory, order.flags, order.account)
    return replace(plan, command_line=order.command_line)


def remarks(order: Order) -> list[str]:
    """What works but may surprise, one line each."""
    largest = plan_of(order, StudyPoint(order.study.nodes[-1], 1), order.folder.job)
    return planner.remarks(largest.recipe, order.machine, largest.allocation)


@dataclass(frozen=True)
class Standing:
    """What has become of the points."""

    measured: tuple[RunDir, ...]
    waiting: dict[StudyPoint, str]
    """Point -> the job that it is in, which is alive."""
    missing: tuple[StudyPoint, ...]
    """Those that nobody measures yet: new ones, and ones that failed; in order."""
    failed: tuple[RunDir, ...]
    """Last attempts of missing points."""


def look(order: Order) -> Standing:
    """What is measured, under way, missing. Raises IdentityError when a point was measured otherwise than this order says; SubmitError."""
    measured, waiting, missing, failed = [], dict[StudyPoint, str](), [], []
    for point in order.study.points():
        found = order.folder.measured(order.study, point)
        attempts = order.folder.attempts(point)
        if found is not None:
            _check_same(plan_of(order, point, found))
            measured.append(found)
        elif attempts and (job_id := _alive_job(attempts[-1])):
            waiting[point] = job_id
        else:
            missing.append(point)
            failed += attempts[-1:]
    return Standing(tuple(measured), waiting, tuple(missing), tuple(failed))


def _check_same(plan: Plan) -> None:
    run = run_dir.read_run(plan.run_dir)
    old = {"recipe": config.to_json(run.recipe), "corpus": run.corpus_sha256, "machine": run.machine.name, "ranks_per_node": run.allocation.ranks_per_node}
    new = {"recipe": config.to_json(plan.recipe), "corpus": plan.corpus.sha256 or run.corpus_sha256, "machine": plan.machine.name}
    new["ranks_per_node"] = plan.allocation.ranks_per_node
    if changed := config.differences(old, new):
        raise IdentityError(f"{plan.run_dir.path} was measured otherwise (then -> now): {'; '.join(changed)}. Choose another --out, or the settings of then")


def _alive_job(directory: RunDir) -> str | None:
    jobs = run_dir.read_jobs(directory)
    if jobs is None or jobs.scheduler == "local":
        return None
    states = submission.states(jobs.scheduler, jobs.job_ids)
    return next((job_id for job_id, state in states.items() if state.is_alive), None)


def run_in_foreground(order: Order, missing: Sequence[StudyPoint]) -> list[str]:
    """Run the points one after another; what failed, a line each. Raises RequeueRequested when a signal stopped one."""
    failures = []
    write_study(order.folder, order.study)
    for number, point in enumerate(missing, start=1):
        plan = plan_of(order, point, order.folder.next_attempt(point))
        terminal.note(f"point {number} of {len(missing)}: {_size_text(point)}")
        code = gang.carry_out(plan, detach=False)
        if code in _STOPPED:
            raise errors.RequeueRequested(f"stopped at {point.name}; the same command measures it anew, and those after it")
        if code:
            failures.append(_failure(plan.run_dir, code))
            terminal.warn(failures[-1])
    return failures


_STOPPED = (errors.REQUEUE, errors.INTERRUPTED, 128 + signal.SIGTERM)


def _size_text(point: StudyPoint) -> str:
    return f"{point.nodes} {'node' if point.nodes == 1 else 'nodes'}, repetition {point.repetition}"


def _failure(directory: RunDir, code: int | None) -> str:
    meaning = f"exit code {code}: {verdicts.describe_code(code)}" if code is not None else "without a word"
    return f"{directory.path.name} has not taken its steps ({meaning}); logs: {directory.node_log(0).parent}"


def forget_checkpoints(order: Order) -> None:
    """Remove the states of runs that were only to be timed; one whose job still writes it is left to the next time."""
    for point in order.study.points():
        found = order.folder.measured(order.study, point)
        if found is not None and found.checkpoints.exists() and not _alive_job(found):
            shutil.rmtree(found.checkpoints, ignore_errors=True)


def submit_each(order: Order, standing: Standing) -> list[RunDir]:
    """A job a point, each waiting for the one before it: points that run side by side would disturb each other."""
    write_study(order.folder, order.study)
    before: str | None = [*standing.waiting.values()][-1] if standing.waiting else None
    submitted = []
    for point in standing.missing:
        plan = replace(plan_of(order, point, order.folder.next_attempt(point)), after=before)
        gang.carry_out(plan, detach=True)
        jobs = run_dir.read_jobs(plan.run_dir)
        before = jobs.job_ids[-1] if jobs else before
        submitted.append(plan.run_dir)
    return submitted


def follow(directories: Sequence[RunDir]) -> None:
    """Print the logs of jobs as they run, until the last has ended. Raises RequeueRequested when Ctrl-C ended the following."""
    for directory in directories:
        jobs = run_dir.read_jobs(directory)
        if jobs is not None and follow_log(directory, jobs.job_ids, log_from=0) == errors.INTERRUPTED:
            raise errors.RequeueRequested("stopped following; the jobs go on, and the same command makes the report when they have ended")


def tell_failures(standing: Standing) -> list[str]:
    """The last attempts of points that failed, a line each."""
    failures = [_failure(directory, run_facts.read_exit_code(directory)) for directory in standing.failed]
    for line in failures:
        terminal.warn(line)
    return failures


def check_one_job(order: Order) -> None:
    """Raises ConfigError where there are no jobs."""
    if order.machine.scheduler == "local":
        raise ConfigError(f"--one-job is for batch systems; {order.machine.name} has none: points run here one after another in any case")


def check_corpus(corpus: Path, *, must_exist: bool) -> CorpusFacts:
    """What is known of the corpus; a dry run may be for another machine."""
    return checks.read_corpus_facts(corpus, must_exist=must_exist)


def refuse_while_running(standing: Standing) -> None:
    """Raises SubmitError where points of the study are in a job already."""
    if standing.waiting:
        jobs = ", ".join(sorted(set(standing.waiting.values())))
        raise SubmitError(f"points of this study are in job {jobs} already: wait for it, and give the same command again")
