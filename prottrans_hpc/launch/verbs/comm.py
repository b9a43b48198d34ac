"""`prottrans comm`: how fast the ranks of a machine talk, over which back end, and which node is slow."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ... import errors, terminal
from ..demand import Demand
from ..options import account, as_json, examples, machine_option, path_option, size, verbosity

if TYPE_CHECKING:
    from ..comm_job import CommPlan

BACKENDS = ("gloo", "mpi", "horovod", "nccl")

_EXAMPLES = examples(
    "prottrans comm --nodes 2 --out studies/comm",
    "prottrans comm --machine laptop_mpi --nodes 4 --backends gloo,mpi,horovod --out studies/comm",
    "prottrans comm --machine my_cluster.toml --nodes 16 --backends gloo,nccl --out studies/comm --dry-run",
    "prottrans comm --machine my_cluster.toml --nodes 16 --max-mib 1 --repetitions 3 --gate 3 --out preflight",
)


def _as_backends(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[str, ...] | None:
    if value is None:
        return None
    names = tuple(dict.fromkeys(value.replace(" ", "").split(",")))
    unknown = [name for name in names if name not in BACKENDS]
    if unknown:
        raise click.BadParameter(f"no back end is called {unknown[0]!r}; they are {', '.join(BACKENDS)}", ctx, param)
    return names


@dataclass(frozen=True)
class _Choices:
    """The command line."""

    machine: str
    demand: Demand
    account: str | None
    backends: tuple[str, ...] | None
    """None: those that the machine can have."""
    out: Path
    max_mib: int
    repetitions: int
    limit_s: float
    timeout_s: int
    gate: float | None
    seed: int
    dry_run: bool
    as_json: bool


@click.command(epilog=_EXAMPLES)
@machine_option
@size
@account
@click.option("--backends", metavar="NAME,...", callback=_as_backends, help=f"Of {', '.join(BACKENDS)}.  [default: those that the machine can have]")
@path_option("--out", metavar="DIR", required=True, help="Where comm.json, comm.txt and comm.png go.")
@click.option("--max-mib", metavar="M", type=click.IntRange(1, 1024), default=16, show_default=True, help="Largest buffer; the smallest has 1 KiB.")
@click.option("--repetitions", metavar="N", type=click.IntRange(2, 100), default=7, show_default=True, help="Timings of each collective and size.")
@click.option("--limit", "limit_s", metavar="S", type=click.FloatRange(0.001), default=1.0, show_default=True, help="No larger sizes beyond so many seconds.")
@click.option("--timeout", "timeout_s", metavar="S", type=click.IntRange(1), default=600, show_default=True, help="After which a silent rank counts as lost.")
@click.option(
    "--gate", metavar="FACTOR", type=click.FloatRange(1.0, min_open=True), help="End with 71 when a node is more than FACTOR times slower than the median."
)
@click.option("--seed", metavar="N", type=click.IntRange(0), default=0, show_default=True, help="Of the order in which things are measured.")
@click.option("--dry-run", is_flag=True, help="Print the job script, and do nothing else.")
@as_json
@verbosity
def comm(**given: Any) -> int:
    """Measure all-reduce, reduce-scatter and all-gather between the ranks of a machine, and find slow nodes.

    Latency and bandwidth are fitted for each back end among all ranks (world), those of a node (node), and those of equal
    local rank (between); the fastest is named for each size, with the reason. A back end that is not to be had is
    left out, with what installs it. Nodes whose link, ranks or cores are slow are named; with --gate the command fails then,
    so that a large job need not start: `prottrans comm ... --gate 3 && prottrans pretrain ...`.
    """
    from .. import comm_job

    choices = _Choices(**given)
    plan = _plan(choices)
    if choices.dry_run:
        sys.stdout.flush()
        sys.stdout.buffer.write(plan.script)
        return errors.DONE
    code = comm_job.carry_out(plan)
    report = plan.out.path / ("comm.json" if choices.as_json else "comm.txt")
    if report.exists():
        sys.stdout.write(report.read_text(encoding="utf-8"))
        terminal.note(f"written: {', '.join(str(plan.out.path / name) for name in comm_job.RESULTS if (plan.out.path / name).exists())}")
    return code


def _plan(choices: _Choices) -> CommPlan:
    """Everything decided and checked, nothing touched yet."""
    from ... import config
    from ...machine import read_machine
    from ...run_dir import RunDir
    from .. import comm_job, dry_run, placement, planner
    from ..job import num_ranks_text

    machine = read_machine(choices.machine)
    account = dry_run.account_of(machine, choices.account, dry_run=choices.dry_run)
    allocation = placement.name_nodes(machine, planner.allocate(machine, choices.demand), required=not choices.dry_run)
    out = RunDir(choices.out.resolve())
    config.check_name(out.path.name, what="the name of the folder")
    backends = choices.backends or comm_job.default_backends(machine)
    names = ("repetitions", "limit_s", "timeout_s", "gate", "seed")
    request = {"machine": machine.name, "max_bytes": choices.max_mib << 20, "backends": backends, **{name: getattr(choices, name) for name in names}}
    plan = comm_job.CommPlan(machine, allocation, out, request, terminal.flags(), account)
    terminal.note(f"machine: {machine.name}, {num_ranks_text(allocation)}; back ends {', '.join(backends)}; results in {out.path}")
    return plan
