"""`prottrans scale`: the same training on more and more nodes, measured; the report of the papers' Fig. 2."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ... import errors, terminal
from ..options import account, as_minutes, command_line, examples, exclude, machine_option, path_option, run_here, settings, verbosity

if TYPE_CHECKING:
    from ..scale import Order, Standing

_EXAMPLES = examples(
    "prottrans scale tiny_prot_bert --corpus corpus --nodes 1,2 --steps 10 --out scaling",
    "prottrans scale prot_bert --corpus uniref100 --machine my_cluster.toml --nodes 1,2,4,8 --one-job --walltime 2:00 --out scaling",
    "prottrans scale prot_bert --corpus uniref100 --machine summit --nodes 1,2,18,36 --account ABC123 --out scaling --dry-run",
    "prottrans scale tiny_prot_bert --corpus corpus --nodes 1,2,4 --strong --set parallel.bucket_mib=5 --out strong",
    "prottrans scale --report-only --out scaling",
)


@dataclass(frozen=True)
class _Choices:
    """The command line."""

    recipe: str | None
    corpus: Path | None
    machine: str
    nodes: tuple[int, ...] | None
    weak: bool
    steps: int
    warmup: int
    repetitions: int
    seed: int
    out: Path
    walltime_min: int | None
    queue: str | None
    account: str | None
    excluded: tuple[str, ...] | None
    one_job: bool
    follow: bool
    report_only: bool
    settings: tuple[str, ...]
    dry_run: bool


def _as_nodes(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    from ...scaling_study import parse_nodes

    try:
        return None if value is None else parse_nodes(value)
    except ValueError:
        raise click.BadParameter(f"{value!r} is no list of numbers of nodes such as 1,2,4", ctx, param) from None


@click.command(epilog=_EXAMPLES)
@click.argument("recipe", metavar="RECIPE", required=False)
@path_option("--corpus", metavar="CORPUS", help="A folder that `prottrans preprocess` wrote.")
@machine_option
@click.option("--nodes", metavar="1,2,4", callback=_as_nodes, help="The sizes to measure; on a laptop groups of processes.")
@click.option("--weak/--strong", default=True, help="The recipe's batch is one node's and grows with them, or is all nodes' and stays.  [default: weak]")
@click.option("--steps", metavar="N", type=click.IntRange(2), default=20, show_default=True, help="Measured steps of each run.")
@click.option("--warmup", metavar="K", type=click.IntRange(0), default=5, show_default=True, help="Steps before them.")
@click.option("--repetitions", metavar="R", type=click.IntRange(1), default=3, show_default=True, help="Runs of each size.")
@click.option("--seed", metavar="S", type=click.IntRange(0), default=42, show_default=True, help="Of the order of the runs.")
@path_option("--out", metavar="DIR", required=True, help="Where the runs and the report go.")
@click.option("--walltime", "walltime_min", metavar="H:MM|auto", callback=as_minutes, help="How long a job may run.")
@click.option("--queue", metavar="Q", help="A queue of the machine.  [default: its first]")
@account
@exclude
@click.option("--one-job", is_flag=True, help="Batch systems: all runs inside one allocation of the largest size.")
@click.option("--follow", is_flag=True, help="Batch systems: wait for the jobs, then make the report.")
@click.option("--report-only", is_flag=True, help="Make the report of what is measured in DIR, and run nothing.")
@settings
@click.option("--dry-run", is_flag=True, help="Print the job scripts, and do nothing else.")
@verbosity
def scale(**given: Any) -> int:
    """Measure how a training of RECIPE scales: its first phase on each number of nodes, several times, in an order that is drawn.

    DIR gets report.html, scaling.csv, scaling.json and pictures: the overhead t(N)/t(1) - 1 with confidence intervals, efficiency, residues/s, MFU, and where
    each step's time goes. The same command goes on where it was stopped: what is measured is not run again, and more sizes or repetitions may be asked for.
    """
    choices = _Choices(**given)
    if choices.report_only:
        run_here("scale-report", {"out": str(choices.out)})
        return errors.DONE
    return _measure(choices, _order(choices))


def _order(choices: _Choices) -> Order:
    """Everything decided and checked, nothing touched yet."""
    from ...machine import read_machine
    from ...recipe import read_recipe
    from ...scaling_study import Mode, Study, StudyDir
    from .. import checks, dry_run, gang, scale

    if choices.recipe is None or choices.corpus is None or choices.nodes is None:
        raise click.UsageError("RECIPE, --corpus and --nodes say what is to be measured; with --report-only alone they may be left out")
    recipe, machine = read_recipe(choices.recipe, choices.settings), read_machine(choices.machine)
    chosen, size = checks.check_model(recipe)
    account = dry_run.account_of(machine, choices.account, dry_run=choices.dry_run)
    mode: Mode = "weak" if choices.weak else "strong"
    name = gang.usable_name(choices.recipe)
    study = Study(name, mode, choices.nodes, choices.repetitions, choices.warmup, choices.steps, choices.seed)
    order = scale.Order(
        study,
        StudyDir(choices.out.resolve()),
        recipe,
        scale.check_corpus(choices.corpus, must_exist=not choices.dry_run),
        machine,
        checks.sets_bins(choices.settings),
        choices.walltime_min,
        choices.queue,
        account,
        choices.excluded or (),
        terminal.flags(),
        command_line(),
    )
    if choices.one_job:
        scale.check_one_job(order)
    order = scale.with_what_is_there(order)
    steps = f"{order.study.warmup} + {order.study.steps} steps a run"
    terminal.note(f"model: {checks.model_line(recipe, chosen, size)}; {steps}, {mode} scaling ({choices.recipe})")
    for remark in scale.remarks(order):
        terminal.note(f"note: {remark}")
    return order


def _measure(choices: _Choices, order: Order) -> int:
    """Run or submit what is missing; the report when nothing is under way any more."""
    from .. import scale, scale_job

    standing = scale.look(order)
    _introduce(order, standing)
    if choices.dry_run:
        scale_job.write_scripts(order, standing.missing, one_job=choices.one_job)
        return errors.DONE
    if order.machine.scheduler == "local":
        failures = scale.run_in_foreground(order, standing.missing)
        return _conclude(order, failures)
    failures = scale.tell_failures(standing)
    if standing.missing:
        if choices.one_job:
            scale.refuse_while_running(standing)
            directories = [scale_job.submit(order, standing.missing)]
            terminal.note(f"submitted to {order.machine.name}; log: {directories[0].job_log}")
        else:
            directories = scale.submit_each(order, standing)
    else:
        directories = [order.folder.attempts(point)[-1] for point in standing.waiting]
    if directories and not choices.follow:
        terminal.note("when the jobs have ended, the same command makes the report")
        return errors.DONE
    if directories:
        scale.follow(directories)
        failures = scale.tell_failures(scale.look(order))
    return _conclude(order, failures)


def _introduce(order: Order, standing: Standing) -> None:
    order_text = ", ".join(point.name for point in standing.missing) or "nothing"
    waiting = f", {len(standing.waiting)} in jobs" if standing.waiting else ""
    terminal.note(f"study: {order.folder.path}: {len(standing.measured)} points measured{waiting}; to run, in this order: {order_text}")


def _conclude(order: Order, failures: list[str]) -> int:
    """The report of what is measured; a study with failed points is not done."""
    from .. import scale

    scale.forget_checkpoints(order)
    run_here("scale-report", {"out": str(order.folder.path)})
    if failures:
        raise errors.ResourceError(f"{len(failures)} points failed and are not in the report: {'; '.join(failures)}. The same command tries them again")
    return errors.DONE
