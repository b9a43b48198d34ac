"""`prottrans preprocess`: FASTA files in, a corpus of shards out."""

from __future__ import annotations

import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from ... import terminal
from ..farm_options import FarmDemand, absolute, farm_options, plan_farm, run_on_farm
from ..options import INVALID, as_json, examples, path_argument, path_option, run_here, verbosity

_EXAMPLES = examples(
    "prottrans preprocess uniref50.fasta.gz --out corpus",
    "prottrans preprocess part1.fasta part2/ --out corpus --dedup --validation 0.01 --workers 8",
    "mpirun -np 4 prottrans preprocess uniref100.fasta --out corpus --mpi",
    "prottrans preprocess bfd.fasta --out corpus --machine slurm_cluster --nodes 4 --dry-run",
    "prottrans preprocess --campaign preprocess_uniref50 uniref50.fasta.gz --out uniref50",
)


@click.command(epilog=_EXAMPLES)
@path_argument("inputs", metavar="FASTA...", nargs=-1, required=True)
@path_option("--out", metavar="CORPUS", required=True, help="The folder to write; a rerun skips the shards that are complete.")
@click.option("--campaign", metavar="RECIPE", help="Take shards and rules from a recipe (preprocess_bfd ...); options that are given overrule it.")
@click.option("--workers", metavar="N", type=click.IntRange(1, 4096), help="Processes to use; the number does not change the result.  [default: all cores]")
@click.option("--mpi", is_flag=True, help="Share the work among the ranks that mpirun or srun started.")
@click.option("--shards", metavar="K", type=click.IntRange(1, 100_000), help="Training shards to write.  [default: by size]")
@click.option("--dedup", is_flag=True, help="Keep one of each group of identical sequences.")
@click.option("--validation", metavar="SHARE", type=click.FloatRange(0.0, 0.5), default=0.01, show_default=True, help="Share of the sequences to hold out.")
@path_option("--clusters", metavar="TSV", help="Clusters (representative, member): a cluster is held out as a whole.")
@click.option(
    "--invalid", type=click.Choice(INVALID), default="error", show_default=True, help="For letters that are no residue: stop, replace by X, skip the record."
)
@click.option("--keep-rare", is_flag=True, help="Keep B, O, U and Z instead of replacing them by X.")
@click.option("--no-names", is_flag=True, help="Do not store the names of the records.")
@click.option("--release", metavar="TEXT", help="A note on where the sequences come from, kept in the index: 'UniRef50 2024_01'.")
@farm_options
@as_json
@verbosity
@click.pass_context
def preprocess(
    context: click.Context,
    /,
    inputs: tuple[Path, ...],
    out: Path,
    workers: int | None,
    mpi: bool,
    no_names: bool,
    clusters: Path | None,
    as_json: bool,
    asked: FarmDemand,
    campaign: str | None,
    **rules: Any,
) -> None:
    """Turn FASTA files or folders of them (plain, .gz, .zst, .bz2, .xz) into CORPUS, a folder of shards that `pretrain` reads.

    One token a residue, upper case; B, O, U and Z become X as in the papers. CORPUS is whole when its index.json is there, which is written last.

    With --machine, --nodes or --items the work is cut into jobs of one node each; the corpus is the same, byte for byte.
    """
    if mpi and workers:
        raise click.UsageError("--workers and --mpi exclude each other: with --mpi the ranks are the workers")
    rules["names"] = not no_names
    if campaign:
        rules = _with_campaign(campaign, rules, context, quiet=mpi)
    request = {"inputs": [str(path) for path in inputs], "out": str(out), "workers": workers or len(os.sched_getaffinity(0)), "mpi": mpi}
    request |= {"clusters": str(clusters) if clusters else None, "compression": None, "json": as_json, **rules}
    farm = plan_farm("preprocess", asked, out=out, one_a_gpu=False)
    if farm is None:
        run_here("preprocess", request)
        if campaign and not mpi:
            _compare(campaign, out)
        return
    if mpi:
        raise click.UsageError("--mpi shares the work among ranks that were started already; leave it out with --machine, --nodes or --items")
    request |= {"inputs": absolute(inputs), "out": str(out.absolute())}
    run_on_farm("preprocess", request, replace(farm, cores=workers), first_round="01-scan", dry_run=asked.dry_run, fresh=True)
    if campaign and not asked.dry_run:
        _compare(campaign, out)


def _with_campaign(name: str, rules: dict[str, Any], context: click.Context, *, quiet: bool) -> dict[str, Any]:
    """The rules of a campaign, but for those that the command line gives."""
    from ..campaign import read_campaign
    from ..campaign_text import expectation

    chosen = read_campaign(name)
    if not quiet:  # under MPI every rank comes by here
        terminal.note(f"campaign {name}: {expectation(chosen)}")
    option_of = {"names": "no_names"}
    given = {key: value for key, value in rules.items() if context.get_parameter_source(option_of.get(key, key)) is ParameterSource.COMMANDLINE}
    return rules | asdict(chosen.rules) | {"release": chosen.expected.source} | given


def _compare(name: str, out: Path) -> None:
    """Say how the corpus differs in size from what the campaign is for: another release, or a part of it."""
    from ... import durable
    from ..campaign import read_campaign
    from ..campaign_text import comparison

    text = comparison(read_campaign(name), int(durable.read_json(out / "index.json")["sequences"]))
    if text:
        terminal.note(f"note: {text}")
