"""`prottrans machines new`: write a profile of the Slurm cluster that this shell is on."""

from __future__ import annotations

import datetime
from pathlib import Path

import click

from ... import terminal
from ...errors import ConfigError
from ..options import examples, path_option, verbosity


@click.command(epilog=examples("prottrans machines new --out my_cluster.toml", "prottrans machines new --out gpu.toml --partition gpu"))
@path_option("--out", metavar="FILE.toml", required=True, help="Where the profile goes; a file that exists is left alone.")
@click.option("--partition", metavar="NAME", help="Describe the nodes of this partition.  [default: the cluster's default one]")
@verbosity
def new(out: Path, partition: str | None) -> None:
    """Write a machine profile from what sinfo and scontrol say on the cluster at hand.

    It asks the Slurm of the login node and changes nothing. What Slurm does not know is marked CHECK in the file.
    """
    from ... import durable
    from .. import discover, slurm_facts, submission

    if out.suffix != ".toml":
        raise ConfigError(f"--out {out} must end in .toml: so `--machine` knows a path from a name")
    if out.exists():
        raise ConfigError(f"{out} exists, and may hold what somebody has put right: choose another --out, or remove it first")
    answers = [submission.ask("slurm", argv, "tell about the cluster") for argv in slurm_facts.QUESTIONS]
    when = datetime.datetime.now(datetime.UTC).date().isoformat()
    text, machine = discover.profile(slurm_facts.parse(*answers), partition=partition, when=when)
    durable.write_bytes(out, text.encode())
    num_marked = text.count("CHECK:")
    terminal.note(
        f"wrote {out}: {machine.description}\n  {num_marked} lines are marked CHECK; try it with: prottrans pretrain RECIPE --machine ./{out} --dry-run"
    )
