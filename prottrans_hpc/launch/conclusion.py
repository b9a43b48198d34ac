"""What a person who waited for a training is told at its end."""

from __future__ import annotations

from .. import errors, terminal
from ..run_dir import RunDir
from . import preflight_notes, verdicts


def conclude(directory: RunDir, code: int) -> None:
    """What the exit code means and what to do next."""
    path = directory.path
    if code == errors.DONE:
        terminal.note(f"done: embed with `prottrans embed {path} PROTEINS.fasta --out FILE.h5`, export with `prottrans export {path} --to hf DIR`")
    elif code == errors.REQUEUE:
        if not directory.checkpoint_steps():  # else rank 0 has told where the run goes on
            terminal.note(f"stopped before the first checkpoint: the same command starts again (exit code {code})")
    else:
        meaning = preflight_notes.closed(directory, code) or verdicts.describe_code(code)
        terminal.warn(f"the job ended with exit code {code}: {meaning}. Logs: {directory.node_log(0).parent}")
