"""What a dry run may go without: a script can be looked at before anybody knows where the corpus will be and what is charged."""

from __future__ import annotations

from pathlib import Path

from .. import terminal
from ..errors import ConfigError
from ..machine import Machine
from . import planner

CORPUS, ACCOUNT = Path("CORPUS"), "ACCOUNT"


def corpus_of(corpus: Path | None, *, dry_run: bool) -> Path:
    """The corpus, or what stands for it in a dry run. Raises ConfigError for a real one without."""
    if corpus is not None:
        return corpus
    if not dry_run:
        raise ConfigError("--corpus names what to train on, a folder that `prottrans preprocess` wrote: only --dry-run goes without")
    terminal.note(f"note: no --corpus is given; {CORPUS} stands for it, and the run directory is another with the real one")
    return CORPUS


def account_of(machine: Machine, account: str | None, *, dry_run: bool) -> str | None:
    """The project that is charged, or what stands for it in a dry run. Raises what `planner.check_account` raises."""
    if dry_run and machine.account_required and account is None:
        terminal.note(f"note: {machine.name} charges a project for every job; {ACCOUNT} stands for the --account that is not given")
        return ACCOUNT
    planner.check_account(machine, account)
    return account
