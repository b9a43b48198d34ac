"""`prottrans corpus show|check`: what a corpus holds, and whether every byte of it is as written."""

from __future__ import annotations

from pathlib import Path

import click

from ..options import as_json, examples, path_argument, path_option, run_here, verbosity


@click.group(epilog=examples("prottrans corpus show corpus", "prottrans corpus check corpus"))
def corpus() -> None:
    """Show what is in a corpus, or check every byte of it."""


@corpus.command(epilog=examples("prottrans corpus show corpus", "prottrans corpus show uniref50 bfd --plot lengths.png", "prottrans corpus show corpus --json"))
@path_argument("corpora", metavar="CORPUS...", nargs=-1, required=True)
@path_option("--plot", metavar="PNG", help="Draw lengths and residue frequencies, all corpora in one picture.")
@as_json
@verbosity
def show(corpora: tuple[Path, ...], plot: Path | None, as_json: bool) -> None:
    """Print proteins, residues, size on disk, length percentiles and residue frequencies, several corpora side by side."""
    run_here("corpus-show", {"corpora": [str(path) for path in corpora], "plot": str(plot) if plot else None, "json": as_json})


@corpus.command(epilog=examples("prottrans corpus check corpus", "prottrans corpus check corpus --json"))
@path_argument("corpora", metavar="CORPUS...", nargs=-1, required=True)
@as_json
@verbosity
def check(corpora: tuple[Path, ...], as_json: bool) -> None:
    """Read every shard and compare it with the index: sizes, SHA-256, counts."""
    run_here("corpus-check", {"corpora": [str(path) for path in corpora], "json": as_json})
