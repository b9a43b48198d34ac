"""`prottrans pretrain`: check everything that can be checked, then start all ranks, or resume."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from ... import errors, terminal
from ..demand import AUTO, Demand, time_text
from ..options import account, as_minutes, command_line, examples, exclude, machine_option, path_option, preflight, settings, size, verbosity

if TYPE_CHECKING:
    from ...recipe import Recipe
    from ...run_dir import Init, Preflight
    from ..gang import Plan
    from ..prospect import Prospect

_EXAMPLES = examples(
    "prottrans pretrain tiny_prot_bert --corpus corpus",
    "prottrans pretrain tiny_prot_bert --corpus corpus --nodes 2 --steps 100 --run-dir runs/first",
    "prottrans pretrain my_recipe.toml --corpus corpus --set optimizer.learning_rate=2e-3 --set phases.0.steps=500",
    "prottrans pretrain tiny_prot_bert --corpus corpus --dry-run > job.sh",
    "prottrans pretrain prot_bert --machine summit --racks 4 --dry-run",
    "prottrans pretrain tiny_prot_bert --corpus corpus --lr-range 1e-4:1 --steps 100",
    "prottrans pretrain prot_bert_bfd --corpus bfd --machine summit --racks 52 --account ABC123 --chain 2 --dry-run",
    "prottrans pretrain prot_bert_bfd --corpus bfd --machine my_cluster.toml --nodes 64 --preflight comm",
    "prottrans pretrain prot_t5_xl_u50 --corpus uniref50 --machine my_cluster.toml --racks 2 --init runs/bfd --after runs/bfd",
)


@dataclass(frozen=True)
class _Choices:
    """The command line."""

    recipe: str
    corpus: Path | None
    machine: str
    demand: Demand
    account: str | None
    chain: int | str | None
    """Jobs of a chain, or "auto"; None: one job."""
    total_min: int | None
    excluded: tuple[str, ...] | None
    preflight: Preflight | Literal["none"] | None
    run_dir: Path | None
    init: Path | None
    init_optimizer: bool
    after: str | None
    """A job id or a run directory."""
    steps: int | None
    lr_range: str | None
    """LOW:HIGH, "" for the default; None: no sweep."""
    settings: tuple[str, ...]
    dry_run: bool
    detach: bool
    follow: bool


def _as_chain(ctx: click.Context, param: click.Parameter, value: str | None) -> int | str | None:
    if value is None or value == AUTO:
        return value
    if not (value.isascii() and value.isdecimal()) or not 1 <= int(value) <= 100:
        raise click.BadParameter(f"{value!r} is neither 'auto' nor a number of jobs from 1 to 100", ctx, param)
    return int(value)


@click.command(epilog=_EXAMPLES)
@click.argument("recipe", metavar="RECIPE")
@path_option("--corpus", metavar="CORPUS", help="A folder that `prottrans preprocess` wrote; only --dry-run goes without.")
@machine_option
@size
@account
@click.option("--chain", metavar="N|auto", callback=_as_chain, help="Submit N jobs, each resuming the one before; auto: as many as the training takes.")
@click.option("--total-time", "total_min", metavar="H:MM", callback=as_minutes, help="What the whole training takes, if you know it; for --chain auto.")
@exclude
@preflight
@path_option("--run-dir", metavar="DIR", help="Where the run lives.  [default: runs/RECIPE-ID, the same for the same experiment]")
@path_option("--init", metavar="RUN_OR_CHECKPOINT", help="Begin with the weights of another run, at its end, or of a checkpoint, trained or imported.")
@click.option("--init-optimizer", is_flag=True, help="With --init: go on with the optimizer's state, too, instead of a new one.")
@click.option("--after", metavar="JOB|RUN", help="Batch systems: wait in the queue until this job, or the last one of this run, has ended.")
@click.option("--steps", metavar="N", type=click.IntRange(1), help="End after N optimizer steps in all, resumed ones counted.")
@click.option(
    "--lr-range",
    metavar="[LOW:HIGH]",
    is_flag=False,
    flag_value="",
    help="Sweep the learning rate from LOW to HIGH over --steps steps (default 100), and print where the loss diverges.",
)
@settings
@click.option("--dry-run", is_flag=True, help="Print the job script, and do nothing else.")
@click.option("--detach", is_flag=True, help="Run in the background.")
@click.option("--follow", is_flag=True, help="Print the log of a batch job as it grows, until it ends.")
@verbosity
def pretrain(**given: Any) -> int:
    """Pre-train a model as RECIPE says: a name from jobs/, or a path that ends in .toml.

    The same command resumes a run that was stopped: by Ctrl-C, a signal, a crash or --steps. While it runs, metrics.jsonl and logs/ in the run
    directory grow; checkpoints/ holds what it resumes from. Exit code 75 means: stopped with its state saved, run the same command again.
    On a machine with a batch system the job is submitted; `prottrans plan` says what it asks for, and why.
    """
    from .. import gang
    from ..conclusion import conclude

    choices = _Choices(**given)
    if choices.follow and choices.detach:
        raise click.UsageError("--follow and --detach contradict each other")
    plan = _plan(choices)
    run = gang.existing_run(plan) if plan.corpus.sha256 else None
    _introduce(plan, gang.describe(plan, run))
    if choices.dry_run:
        sys.stdout.flush()
        sys.stdout.buffer.write(plan.script)
        return errors.DONE
    if choices.lr_range is not None:
        return _sweep(plan, follow=choices.follow)
    is_local = plan.machine.scheduler == "local"
    code = gang.carry_out(plan, detach=choices.detach) if is_local else _submit(plan, follow=choices.follow)
    is_over = not choices.detach if is_local else choices.follow and code != errors.INTERRUPTED
    if is_over:
        conclude(plan.run_dir, code)
    return code


def _sweep(plan: Plan, *, follow: bool) -> int:
    """Sweep the learning rate, unless that was done, and say what it found."""
    from .. import gang, lr_range

    if lr_range.is_over(plan):
        return lr_range.conclude(plan, errors.DONE)
    if plan.machine.scheduler == "local":
        return lr_range.conclude(plan, gang.carry_out(plan, detach=False))
    code = _submit(plan, follow=follow)
    if follow and code != errors.INTERRUPTED:
        return lr_range.conclude(plan, code)
    terminal.note("when the job has ended, the same command prints what it found")
    return code


def _plan(choices: _Choices) -> Plan:
    """Everything decided and checked, nothing touched yet."""
    from ... import config
    from ...machine import read_machine
    from ...recipe import read_recipe
    from ...run_dir import RunDir
    from .. import ancestor, checks, dry_run, epochs, exclusion, gang, lr_range, placement, planner, preflight_notes, prospect

    recipe, machine = read_recipe(choices.recipe, choices.settings), read_machine(choices.machine)
    name = gang.usable_name(choices.recipe)
    if choices.lr_range is not None:
        recipe, name = lr_range.sweep(recipe, choices), f"{name[:50]}-lr-range"
    chosen, model_size = checks.check_model(recipe)
    if choices.steps is not None and choices.steps > recipe.num_steps:
        raise errors.ConfigError(
            f"--steps {choices.steps} is more than the recipe's {recipe.num_steps}: lengthen a phase, as in --set phases.0.steps={choices.steps}"
        )
    account = dry_run.account_of(machine, choices.account, dry_run=choices.dry_run)
    corpus = dry_run.corpus_of(choices.corpus, dry_run=choices.dry_run)
    facts = checks.read_corpus_facts(corpus, must_exist=not choices.dry_run)
    after = ancestor.job_before(choices.after, machine)
    init = _init(choices, recipe, waits=after is not None)
    run_dir = RunDir((choices.run_dir or gang.default_run_dir(recipe, name, corpus, init)).resolve())
    config.check_name(run_dir.path.name, what="the name of the run directory")
    done = max(run_dir.checkpoint_steps(), default=0) if machine.scheduler != "local" else 0
    if facts.sha256:  # after the name was made: the same command finds its run again, whatever the steps come to
        recipe = epochs.resolve_warmup(recipe, chosen, facts)
    assumptions = prospect.Assumptions(choices.total_min, first_step=done, last_step=choices.steps)
    seen = prospect.look_ahead(recipe, machine, choices.demand, corpus=facts, assumptions=assumptions, keeps_bins=checks.sets_bins(choices.settings))
    terminal.note(f"model: {checks.model_line(recipe, chosen, model_size)}; {recipe.num_steps:,} steps ({choices.recipe})")
    without = exclusion.leave_out(machine, seen.allocation, choices.excluded or (), run_dir)
    measured = None if choices.preflight == "none" else choices.preflight
    later = (*exclusion.remarks(without), *preflight_notes.remarks(measured, without))
    for remark in (*checks.remarks(recipe, facts), *seen.notes, *planner.remarks(recipe, machine, without), *later):
        terminal.note(f"note: {remark}")
    allocation = placement.name_nodes(machine, without, required=not choices.dry_run)
    num_jobs = _num_jobs(choices, seen)
    plan = gang.Plan(seen.recipe, name, facts, machine, allocation, choices.steps, run_dir, terminal.flags(), account, num_jobs, init, after, measured)
    return replace(plan, command_line=command_line())


def _init(choices: _Choices, recipe: Recipe, *, waits: bool) -> Init | None:
    from .. import ancestor

    if choices.init is None:
        if choices.init_optimizer:
            raise errors.ConfigError("--init-optimizer says what is taken over by --init: give both")
        return None
    return ancestor.find(choices.init, recipe, optimizer=choices.init_optimizer, waits=waits, must_exist=not choices.dry_run)


def _num_jobs(choices: _Choices, seen: Prospect) -> int:
    """Jobs of the chain. Raises ConfigError where there can be none, or nobody knows how many."""
    if seen.machine.scheduler == "local":
        if choices.chain is not None or choices.total_min is not None:
            raise errors.ConfigError(f"--chain and --total-time are for batch systems; {seen.machine.name} has none: the same command goes on where it stopped")
        return 1
    if isinstance(choices.chain, int):
        return choices.chain
    if choices.chain is None:
        if seen.work_min is not None and seen.work_min > (seen.allocation.walltime_min or 0):
            terminal.note(f"note: about {time_text(seen.work_min)} of work do not fit into one job: --chain auto submits as many as it takes")
        return 1
    if seen.num_jobs is None:
        raise errors.ConfigError(f"how long the training takes on {seen.machine.name} is unknown: give --total-time H:MM, or --chain N")
    return seen.num_jobs


def _submit(plan: Plan, *, follow: bool) -> int:
    """Submit to the batch system; with `follow` wait for the end and give the job's exit code, or 130 when Ctrl-C ended the following."""
    from ... import run_dir
    from .. import gang

    if not follow:
        return gang.carry_out(plan, detach=True)
    from ..follow import follow as follow_log
    from ..follow import log_size

    log_from = log_size(plan.run_dir)
    gang.carry_out(plan, detach=True)
    jobs = run_dir.read_jobs(plan.run_dir)
    return follow_log(plan.run_dir, jobs.job_ids if jobs else (), log_from=log_from)


def _introduce(plan: Plan, state: str) -> None:
    from ..job import num_ranks_text

    corpus, allocation = plan.corpus, plan.allocation
    if corpus.sha256:
        terminal.note(f"corpus: {corpus.path}: {corpus.train_sequences:,} proteins, {corpus.train_residues:,} residues to train on")
    cores = f"{allocation.cpu_cores_per_rank} CPU {'core' if allocation.cpu_cores_per_rank == 1 else 'cores'} a rank"
    terminal.note(f"machine: {plan.machine.name}, {num_ranks_text(allocation)}, {cores}{', 1 GPU a rank' if allocation.gpus_per_rank else ''}")
    if allocation.walltime_min is not None:
        jobs = f", a chain of {plan.num_jobs} jobs" if plan.num_jobs > 1 else ""
        racks = f"{allocation.num_racks} whole {'rack' if allocation.num_racks == 1 else 'racks'}, " if allocation.num_racks else ""
        terminal.note(f"job: {racks}queue {allocation.queue}, walltime {time_text(allocation.walltime_min)}{jobs}")
    terminal.note(f"run directory: {plan.run_dir.path} ({state})")
