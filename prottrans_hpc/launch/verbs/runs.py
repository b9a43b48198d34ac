"""`prottrans runs`: what runs there are and how they do; their logs; cancel and resume. From files and schedulers alone."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ... import errors, terminal
from ..options import Command, account, as_json, examples, exclude, path_option, preflight, size, verbosity

if TYPE_CHECKING:
    from ...run_dir import RunDir
    from ..run_facts import DamagedRun, RunFacts
    from ..run_state import Verdict

_EXAMPLES = examples(
    "prottrans runs",
    "prottrans runs show tiny_prot_bert-1a2b3c4d",
    "prottrans runs logs tiny_prot_bert-1a2b3c4d --follow",
    "prottrans runs cancel tiny_prot_bert-1a2b3c4d",
    "prottrans runs resume tiny_prot_bert-1a2b3c4d",
    "prottrans runs resume tiny_prot_bert-1a2b3c4d --exclude n3,n7",
)


def _folder(command: Command) -> Command:
    """Add ``--runs DIR``; one that is given before the verb's own name counts as well, and so does ``--json``."""

    @path_option("--runs", "folder", metavar="DIR", help="Where the runs are.  [default: ./runs]")
    @functools.wraps(command)
    def wrapped(*args: Any, folder: Path | None, as_json: bool, **kwargs: Any) -> Any:
        outer = click.get_current_context().obj or {}
        return command(*args, folder=folder or outer.get("folder") or Path("runs"), as_json=as_json or bool(outer.get("json")), **kwargs)

    return wrapped


@click.group(invoke_without_command=True, epilog=_EXAMPLES)
@path_option("--runs", "folder", metavar="DIR", help="Where the runs are.  [default: ./runs]")
@as_json
@verbosity
@click.pass_context
def runs(context: click.Context, folder: Path | None, as_json: bool) -> None:
    """List the runs with their states, show one, read its log, cancel it, resume it."""
    context.obj = {"folder": folder, "json": as_json}
    if context.invoked_subcommand is None:
        _print_list(folder or Path("runs"), as_json, is_named=folder is not None)


@runs.command("list", epilog=examples("prottrans runs list", "prottrans runs list --runs /scratch/me/runs --json"))
@as_json
@_folder
@verbosity
def list_(folder: Path, as_json: bool) -> None:
    """List the runs, the one that did something last first."""
    _print_list(folder, as_json, is_named=folder != Path("runs"))


@runs.command(epilog=examples("prottrans runs show tiny_prot_bert-1a2b3c4d", "prottrans runs show /scratch/me/runs/first --json"))
@click.argument("run", metavar="RUN")
@as_json
@_folder
@verbosity
def show(run: str, folder: Path, as_json: bool) -> None:
    """Print what a run is, how it does, and every start and stop with its cause and what it cost."""
    from .. import run_report

    facts, verdict = _read(run, folder)
    if as_json:
        click.echo(json.dumps(run_report.report(facts, verdict), indent=1))
    else:
        click.echo("\n".join(run_report.report_lines(facts, verdict)))


@runs.command(epilog=examples("prottrans runs logs tiny_prot_bert-1a2b3c4d -n 50", "prottrans runs logs tiny_prot_bert-1a2b3c4d --node 3 --follow"))
@click.argument("run", metavar="RUN")
@click.option("--node", metavar="K", type=click.IntRange(0), help="The log of the K-th node of the job, from 0, instead of the job's own.")
@click.option("-n", "--lines", metavar="N", type=click.IntRange(0), default=20, show_default=True, help="Lines to begin with.")
@click.option("-f", "--follow", "follows", is_flag=True, help="Go on printing as the log grows, until the run's jobs have ended.")
@as_json
@_folder
@verbosity
def logs(run: str, node: int | None, lines: int, follows: bool, folder: Path, as_json: bool) -> int:
    """Print the end of a run's log: what the job script and rank 0 said, or one node's log."""
    from .. import follow, run_facts, run_files

    if as_json and follows:
        raise click.UsageError("--json and --follow exclude each other")
    directory = run_facts.find_run(run, folder)
    path = _log(directory, node, must_exist=not follows)
    if as_json:
        text = [line.decode("utf-8", "backslashreplace") for line in run_files.last_lines(path, lines)]
        click.echo(json.dumps({"log": str(path), "lines": text}, indent=1))
        return errors.DONE
    if not follows:
        follow.print_lines(run_files.last_lines(path, lines))
        return errors.DONE
    shown, _, begin = run_files.tail(path, lines)
    follow.print_lines(shown)
    facts = run_facts.read_facts(directory)
    watch = follow.JobWatch(directory, facts.jobs.job_ids if facts.jobs else ())
    code = follow.follow_file(directory, watch, run_files.GrowingFile(path, start=begin))
    return code if code == errors.INTERRUPTED else errors.DONE


def _log(directory: RunDir, node: int | None, *, must_exist: bool) -> Path:
    """The log to read; a job in the foreground has told its terminal, and node 0's log, what the job log would have."""
    if node is None:
        if directory.job_log.exists() or not directory.node_log(0).exists():
            path = directory.job_log
        else:
            terminal.note(f"the job ran in the foreground; this is {directory.node_log(0).name}")
            path = directory.node_log(0)
    else:
        path = directory.node_log(node)
    if must_exist and not path.exists():
        there = ", ".join(sorted(found.name for found in path.parent.glob("*.log"))) or "none"
        raise errors.CheckpointError(f"there is no {path.name} in {path.parent}; the logs there are: {there}")
    return path


@runs.command(epilog=examples("prottrans runs cancel tiny_prot_bert-1a2b3c4d"))
@click.argument("run", metavar="RUN")
@as_json
@_folder
@verbosity
def cancel(run: str, folder: Path, as_json: bool) -> None:
    """Ask the running job of a run to save and stop, and take those that wait out of the queue.

    The run can be resumed later. Nothing to cancel is no error.
    """
    from .. import cancelling, run_facts
    from ..job_state import State

    facts = run_facts.read_facts(run_facts.find_run(run, folder))
    done = cancelling.cancel(facts)
    if as_json:
        click.echo(json.dumps([{"job": job.job_id, "was": str(job.state)} for job in done], indent=1))
        return
    for job in done:
        click.echo(f"job {job.job_id}: " + ("taken out of the queue" if job.state is State.PENDING else "asked to save and stop"))
    if not done:
        click.echo(f"nothing to cancel: no job of {facts.name} runs or waits")


@runs.command(epilog=examples("prottrans runs resume tiny_prot_bert-1a2b3c4d", "prottrans runs resume tiny_prot_bert-1a2b3c4d --nodes 2 --steps 200 --detach"))
@click.argument("run", metavar="RUN")
@click.option("--machine", metavar="NAME", help="Another machine profile than before.")
@size
@click.option("--steps", metavar="N", type=click.IntRange(1), help="End after N optimizer steps in all, those done counted.  [default: as before]")
@click.option("--chain", "num_jobs", metavar="N", type=click.IntRange(1), help="Jobs to submit, each resuming the one before.  [default: as before]")
@account
@exclude
@preflight
@click.option("--dry-run", is_flag=True, help="Print the job script, and do nothing else.")
@click.option("--detach", is_flag=True, help="Run in the background.")
@click.option("-f", "--follow", "follows", is_flag=True, help="Print the job's log until it has ended; its exit code is this command's.")
@as_json
@_folder
@verbosity
def resume(run: str, folder: Path, as_json: bool, **choices: Any) -> int:
    """Start a run again from its newest checkpoint: nobody needs the command line that began it.

    Recipe and corpus are those of run.json; machine, size, walltime, queue, chain, account, excluded nodes and preflight stay as they were
    unless they are given.
    """
    from .. import resuming

    if choices["follows"] and choices["detach"]:
        raise click.UsageError("--follow and --detach contradict each other")
    facts, verdict = _read(run, folder)
    return resuming.resume(facts, verdict, resuming.Changes(**choices), as_json=as_json)


def _read(name: str, folder: Path) -> tuple[RunFacts, Verdict]:
    from .. import run_facts, run_state

    facts = run_facts.read_facts(run_facts.find_run(name, folder))
    return facts, run_state.judge([facts])[0]


def _print_list(folder: Path, as_json: bool, *, is_named: bool) -> None:
    from .. import run_facts, run_state, run_tables

    found = run_facts.find_runs(folder) if is_named or folder.exists() else []
    read = [_read_or_damaged(directory) for directory in found]
    intact = [facts for facts in read if isinstance(facts, run_facts.RunFacts)]
    verdicts = dict(zip((facts.run_dir for facts in intact), run_state.judge(intact), strict=True))
    rows = [
        run_tables.describe(facts, verdicts[facts.run_dir]) if isinstance(facts, run_facts.RunFacts) else run_tables.describe_damaged(facts)
        for facts in sorted(read, key=lambda facts: (-facts.activity, facts.name))
    ]
    if as_json:
        click.echo(json.dumps(rows, indent=1))
    elif rows:
        run_tables.print_list(rows)
        for row in rows:
            if row["state"] == run_state.RunState.DAMAGED:
                terminal.warn(f"{row['name']} is damaged: {terminal.printable(row['reason'], 500)}")
    else:
        terminal.note(f"no runs in {folder}")


def _read_or_damaged(directory: RunDir) -> RunFacts | DamagedRun:
    from ...errors import ProttransError, explain
    from .. import run_facts

    try:
        return run_facts.read_facts(directory)
    except (ProttransError, OSError) as error:
        return run_facts.DamagedRun(directory, explain(error), run_facts.last_activity(directory))
