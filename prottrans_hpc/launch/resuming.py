"""Resuming a run from its run.json, so that nobody needs the command line that began it."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from .. import errors, run_dir, terminal
from ..errors import ConfigError, SubmitError
from ..machine import Allocation, Machine, read_machine
from ..run_dir import Preflight
from . import checks, conclusion, exclusion, follow, gang, placement, planner, preflight_notes
from .demand import Demand
from .gang import Plan
from .job import num_ranks_text
from .options import command_line
from .run_facts import RunFacts
from .run_state import Verdict


@dataclass(frozen=True)
class Changes:
    """What may be another than at the last start (None: as it was), and how to start."""

    machine: str | None = None
    demand: Demand = field(default_factory=Demand)
    """An empty one stands for the size, walltime and queue of the last start."""
    steps: int | None = None
    """In all."""
    num_jobs: int | None = None
    """Of the chain."""
    account: str | None = None
    excluded: tuple[str, ...] | None = None
    """Nodes that the job must not get."""
    preflight: Preflight | Literal["none"] | None = None
    dry_run: bool = False
    detach: bool = False
    follows: bool = False


def resume(facts: RunFacts, verdict: Verdict, changes: Changes, *, as_json: bool = False) -> int:
    """Start the run again; the exit code of a job that was waited for, else 0.

    Raises SubmitError when it is at work, ConfigError when it is done or cannot be planned, IdentityError for another corpus.
    """
    plan = plan_again(facts, changes)
    if plan.corpus.sha256:
        gang.existing_run(plan)
    if changes.dry_run:
        sys.stdout.flush()
        sys.stdout.buffer.write(plan.script)
        return errors.DONE
    check_can_resume(facts, verdict, plan)
    terminal.note(f"resuming on {plan.machine.name}, {num_ranks_text(plan.allocation)} ({gang.describe(plan, facts.run)})")
    log_from = follow.log_size(facts.run_dir)
    code = gang.carry_out(plan, detach=changes.detach or changes.follows)
    jobs = run_dir.read_jobs(facts.run_dir)
    if as_json:
        print(json.dumps({"path": str(facts.run_dir.path), "scheduler": jobs.scheduler, "jobs": list(jobs.job_ids)} if jobs else {}), flush=True)
    if changes.follows and jobs is not None:
        code = follow.follow(facts.run_dir, jobs.job_ids, log_from=log_from)
    if code != errors.INTERRUPTED and (changes.follows or not (changes.detach or plan.machine.scheduler != "local")):
        conclusion.conclude(facts.run_dir, code)
    return code


def check_can_resume(facts: RunFacts, verdict: Verdict, plan: Plan) -> None:
    """Raises SubmitError when the run is, or may be, at work; ConfigError when it has nothing left to do."""
    name = facts.name
    if verdict.state.is_alive:
        doubt = f" ({verdict.reason})" if verdict.reason else ""
        raise SubmitError(f"{name} is {verdict.state}{doubt}: two jobs must never train into one run directory. Stop it with: prottrans runs cancel {name}")
    last_step = min(plan.recipe.num_steps, plan.stop_after_step or plan.recipe.num_steps)
    if facts.saved_step >= last_step:
        more = f"; it can go on with --steps {plan.recipe.num_steps}" if facts.saved_step < plan.recipe.num_steps else ""
        raise ConfigError(f"{name} is done: it has step {facts.saved_step} of {last_step}{more}")


def plan_again(facts: RunFacts, changes: Changes) -> Plan:
    """The plan of the next start: the run as it was, but for the changes. Raises what `planner.plan` and `checks` raise."""
    run = facts.run
    if changes.steps is not None and changes.steps > run.recipe.num_steps:
        raise ConfigError(f"--steps {changes.steps} is more than the recipe's {run.recipe.num_steps}")
    checks.check_model(run.recipe)
    machine = read_machine(changes.machine) if changes.machine else run.machine
    account = changes.account or (facts.jobs.account if facts.jobs and not changes.machine and machine.scheduler != "local" else None)
    planner.check_account(machine, account)
    # Of another machine the nodes have other names.
    excluded = changes.excluded if changes.excluded is not None else () if changes.machine else run.allocation.excluded_nodes
    allocation = exclusion.leave_out(machine, replace(_allocation(facts, machine, changes), node_names=()), excluded, facts.run_dir)
    preflight = run.preflight if changes.preflight is None else None if changes.preflight == "none" else changes.preflight
    for remark in (*exclusion.remarks(allocation), *preflight_notes.remarks(preflight, allocation)):
        terminal.note(f"note: {remark}")
    before = len(facts.jobs.job_ids) if facts.jobs and facts.jobs.scheduler != "local" else 1
    return Plan(
        run.recipe,
        run.recipe_name,
        checks.read_corpus_facts(Path(run.corpus), must_exist=not changes.dry_run),
        machine,
        # Nodes that were named then may be down or busy now.
        placement.name_nodes(machine, allocation, required=not changes.dry_run),
        changes.steps if changes.steps is not None else run.stop_after_step,
        facts.run_dir,
        terminal.flags(),
        account,
        num_jobs=1 if machine.scheduler == "local" else changes.num_jobs or before,
        preflight=preflight,
        command_line=command_line(),
    )


def _allocation(facts: RunFacts, machine: Machine, changes: Changes) -> Allocation:
    """As at the last start; planned anew for another machine or size, and for this computer, whose cores may be others than then."""
    run, demand = facts.run, changes.demand
    if machine.scheduler != "local" and changes.machine is None and demand == Demand():
        return run.allocation
    if (demand.num_racks, demand.num_nodes, demand.num_gpus) == (None, None, None):
        queue = None if changes.machine else run.allocation.queue
        demand = replace(demand, num_nodes=run.allocation.num_nodes, partial_rack=run.allocation.num_racks is None, queue=demand.queue or queue)
    return planner.plan(run.recipe, machine, demand)
