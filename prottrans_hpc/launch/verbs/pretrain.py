"""`prottrans pretrain`: check everything that can be checked, then start all ranks, or resume."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ... import errors, terminal
from ..options import examples, path_option, verbosity

if TYPE_CHECKING:
    from ..gang import Plan

_EXAMPLES = examples(
    "prottrans pretrain tiny_prot_bert --corpus corpus",
    "prottrans pretrain tiny_prot_bert --corpus corpus --nodes 2 --steps 100 --run-dir runs/first",
    "prottrans pretrain my_recipe.toml --corpus corpus --set optimizer.learning_rate=2e-3 --set phases.0.steps=500",
    "prottrans pretrain tiny_prot_bert --corpus corpus --dry-run > job.sh",
)

_RANK_FLAGS: dict[int, tuple[str, ...]] = {terminal.QUIET: ("--quiet",), terminal.NORMAL: (), terminal.VERBOSE: ("--verbose",)}


@click.command(epilog=_EXAMPLES)
@click.argument("recipe", metavar="RECIPE")
@path_option("--corpus", metavar="CORPUS", required=True, help="A folder that `prottrans preprocess` wrote.")
@click.option("--machine", metavar="NAME", default="laptop", show_default=True, help="A machine profile of hpc/, or a path that ends in .toml.")
@click.option("--nodes", metavar="N", type=click.IntRange(1), default=1, show_default=True, help="On a laptop: groups of processes.")
@path_option("--run-dir", metavar="DIR", help="Where the run lives.  [default: runs/RECIPE-ID, the same for the same experiment]")
@click.option("--steps", metavar="N", type=click.IntRange(1), help="End after N optimizer steps in all, resumed ones counted.")
@click.option("--set", "settings", metavar="KEY=VALUE", multiple=True, help="Change the recipe: section.key=value; may be repeated.")
@click.option("--dry-run", is_flag=True, help="Print the job script, and do nothing else.")
@click.option("--detach", is_flag=True, help="Run in the background.")
@verbosity
def pretrain(
    recipe: str, corpus: Path, machine: str, nodes: int, run_dir: Path | None, steps: int | None, settings: tuple[str, ...], dry_run: bool, detach: bool
) -> int:
    """Pre-train a model as RECIPE says: a name from jobs/, or a path that ends in .toml.

    The same command resumes a run that was stopped: by Ctrl-C, a signal, a crash or --steps. While it runs, metrics.jsonl and logs/ in the run
    directory grow; checkpoints/ holds what it resumes from. Exit code 75 means: stopped with its state saved, run the same command again.
    """
    from .. import gang

    plan = _plan(recipe, corpus, machine, nodes, run_dir, steps, settings, must_exist=not dry_run)
    run = gang.existing_run(plan) if plan.corpus.sha256 else None
    _introduce(plan, gang.describe(plan, run))
    if dry_run:
        sys.stdout.flush()
        sys.stdout.buffer.write(plan.script)
        return errors.DONE
    code = gang.carry_out(plan, detach=detach)
    if not detach:
        _conclude(plan, code)
    return code


def _plan(
    recipe_name: str, corpus: Path, machine_name: str, nodes: int, folder: Path | None, steps: int | None, settings: tuple[str, ...], *, must_exist: bool
) -> Plan:
    """Everything decided and checked, nothing touched yet."""
    from ... import config
    from ...machine import read_machine
    from ...recipe import read_recipe
    from ...run_dir import RunDir
    from .. import checks, gang, planner

    recipe, machine = read_recipe(recipe_name, settings), read_machine(machine_name)
    chosen, size = checks.check_model(recipe)
    if steps is not None and steps > recipe.num_steps:
        raise errors.ConfigError(f"--steps {steps} is more than the recipe's {recipe.num_steps}: lengthen a phase, as in --set phases.0.steps={steps}")
    allocation = planner.plan(recipe, machine, num_nodes=nodes)
    facts = checks.read_corpus_facts(corpus, must_exist=must_exist)
    name = gang.usable_name(recipe_name)
    path = (folder or gang.default_run_dir(recipe, name, corpus)).resolve()
    config.check_name(path.name, what="the name of the run directory")
    terminal.note(f"model: {checks.model_line(recipe, chosen, size)}; {recipe.num_steps:,} steps ({recipe_name})")
    for remark in (*checks.remarks(recipe, facts), *planner.remarks(recipe, machine, allocation)):
        terminal.note(f"note: {remark}")
    return gang.Plan(recipe, name, facts, machine, allocation, steps, RunDir(path), _RANK_FLAGS[terminal.verbosity()])


def _introduce(plan: Plan, state: str) -> None:
    from ..job import num_ranks_text

    corpus, allocation = plan.corpus, plan.allocation
    if corpus.sha256:
        terminal.note(f"corpus: {corpus.path}: {corpus.train_sequences:,} proteins, {corpus.train_residues:,} residues to train on")
    cores = f"{allocation.cpu_cores_per_rank} CPU {'core' if allocation.cpu_cores_per_rank == 1 else 'cores'} a rank"
    terminal.note(f"machine: {plan.machine.name}, {num_ranks_text(allocation)}, {cores}{', 1 GPU a rank' if allocation.gpus_per_rank else ''}")
    terminal.note(f"run directory: {plan.run_dir.path} ({state})")


def _conclude(plan: Plan, code: int) -> None:
    """What the exit code means and what to do next."""
    path = plan.run_dir.path
    if code == errors.DONE:
        terminal.note(f"done: embed with `prottrans embed {path} PROTEINS.fasta --out FILE.h5`, export with `prottrans export {path} --to hf DIR`")
    elif code == errors.REQUEUE:
        if not plan.run_dir.checkpoint_steps():  # else rank 0 has told where the run goes on
            terminal.note(f"stopped before the first checkpoint: the same command starts again (exit code {code})")
    else:
        meaning = errors.MEANING.get(code, f"killed by signal {code - 128}" if code > 128 else "see the log")
        terminal.warn(f"the job ended with exit code {code}: {meaning}. Logs: {plan.run_dir.node_log(0).parent}")
