"""`python -m prottrans_hpc.launch.preflight SCHEDULER RUN_DIR [--quiet | --verbose] -- CMD...`: a job script has its own nodes measured before it trains.

CMD starts the ranks that measure. This process gives them a time limit, judges what they leave in preflight.json, and
notes it in the run's history. It ends with 0 when the training may start; with 71 when a node is slow, or nothing could be
measured (a closed gate costs a job, an unmeasured network of a thousand nodes may cost all of theirs); with the ranks'
own code when no other start would do better; with 75 when the job was asked to stop meanwhile.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import durable, errors, terminal
from ..errors import ProttransError
from ..run_dir import Preflight, RunDir, read_run
from . import chain, exclusion, preflight_notes, verdicts
from .children import STOP_SIGNALS, Deadline, die_with_parent, hold_signals, next_signal, shell_code, start
from .preflight_notes import Finding, Verdict
from .run_files import read_code
from .schedulers import SCHEDULERS
from .tether import CODE_FILE_PREFIX

_POLL_S = 0.5
"""Between two looks for the file that asks to stop."""
_GRACE_S = 10.0
"""So long has a starter to end its ranks."""


@dataclass(frozen=True)
class Ending:
    """How the ranks that measured ended."""

    code: int | None
    """As a shell reports it, or as the first rank that failed left it; None: they were ended."""
    asked: str | None = None
    """The signal that asked the job to stop."""


def check(run_dir: RunDir, command: Sequence[str]) -> Finding:
    """Measure, judge and note. Raises a ProttransError or OSError when the run cannot be read or written."""
    settings = read_run(run_dir).preflight or Preflight()
    for left in (run_dir.preflight_json, run_dir.preflight_error):  # an old one must not pass for what this start finds
        left.unlink(missing_ok=True)
    began = time.monotonic()
    ending = measure(run_dir, command, limit_s=settings.limit_s)
    measured, told = _measured(run_dir), _told(run_dir)
    finding = judge(ending, measured, told, settings)
    is_judged = finding.verdict in (Verdict.PASSED, Verdict.SLOW)
    preflight_notes.write(run_dir, finding, measured if is_judged and measured else {}, elapsed_s=time.monotonic() - began)
    return finding


def measure(run_dir: RunDir, command: Sequence[str], *, limit_s: float) -> Ending:
    """Run the command, which must not outlive the limit. The caller holds the signals."""
    nonce = secrets.token_hex(16)  # the ranks of the training must meet no straggler of these
    code_file = run_dir.path / f"{CODE_FILE_PREFIX}{nonce}"
    changed = {"PROTTRANS_NONCE": nonce} | ({"PROTTRANS_EXIT_CODE_FILE": str(code_file)} if "PROTTRANS_EXIT_CODE_FILE" in os.environ else {})
    stop_file = run_dir.stop_file(os.environ.get("PROTTRANS_NONCE", ""))
    child = start(command, env=os.environ | changed)
    try:
        asked = _wait(child, stop_file, limit_s)
        if asked is not None or child.poll() is None:
            return Ending(None, asked)
        # Of the first rank that failed, where the starter may hide it.
        return Ending(read_code(code_file) or shell_code(child.returncode))
    finally:
        _end(child)
        code_file.unlink(missing_ok=True)


def _wait(child: subprocess.Popen[bytes], stop_file: Path, limit_s: float) -> str | None:
    """Until the child has ended, the limit is over, or the job is asked to stop: by which signal."""
    deadline = Deadline()
    deadline.set_in(limit_s)
    while child.poll() is None and not deadline.is_past:
        number = next_signal(min(deadline.remaining_s or 0.0, _POLL_S))
        if number in (*STOP_SIGNALS, signal.SIGHUP):
            return signal.Signals(number).name
        if stop_file.exists():
            return "a signal to the job script"
    return None


def _end(child: subprocess.Popen[bytes]) -> None:
    """A starter that is asked ends its ranks; one that does not is killed, and the batch system ends what it leaves."""
    if child.poll() is not None:
        return
    child.terminate()
    try:
        child.wait(_GRACE_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def _measured(run_dir: RunDir) -> dict[str, Any] | None:
    try:
        found = durable.read_json(run_dir.preflight_json)
    except (OSError, ProttransError):
        return None
    return found if isinstance(found, dict) else None


def _told(run_dir: RunDir) -> str:
    """Why the first rank failed, in its own words."""
    told = ""
    with contextlib.suppress(OSError):
        told = run_dir.preflight_error.read_text(encoding="utf-8")
        run_dir.preflight_error.unlink()
    return terminal.printable(told, 1000)


def judge(ending: Ending, measured: dict[str, Any] | None, told: str, settings: Preflight) -> Finding:
    """What follows from how the ranks ended and what they measured. Pure."""
    if ending.asked is not None:
        return Finding(Verdict.STOPPED, errors.REQUEUE, f"stopped by {ending.asked} before anything was measured")
    if ending.code is None:
        return Finding(Verdict.FAILED, errors.NO_RESOURCES, f"it did not end within {settings.limit_s} s{f': {told}' if told else ''}")
    if ending.code == errors.DONE and measured is not None:
        if slow := measured["slow_nodes"]:
            return Finding(Verdict.SLOW, errors.NO_RESOURCES, f"slow: {'; '.join(str(one['says']) for one in slow)}. The gate is {settings.gate:g}")
        return Finding(Verdict.PASSED, errors.DONE, f"no node takes more than {settings.gate:g} times the median")
    if ending.code == errors.DONE:
        return Finding(Verdict.FAILED, errors.NO_RESOURCES, "its ranks ended well and left no figures")
    # A rank that lost another one ends with 75, and a killed one with a signal: that is no saved state, and no reason to try for ever.
    code = ending.code if ending.code in verdicts.INCURABLE else errors.NO_RESOURCES
    return Finding(Verdict.FAILED, code, told or f"its ranks ended with exit code {ending.code}: {verdicts.describe_code(ending.code)}")


def _keep_away(run_dir: RunDir, scheduler: str) -> list[str]:
    """Have the waiting jobs of this chain leave out what a new start would, where the machine's profile asks for it; those that will."""
    run, own = read_run(run_dir), SCHEDULERS[scheduler].job_id_variable
    if own is None or not run.machine.exclude_slow_nodes:
        return []
    nodes = exclusion.leave_out(run.machine, run.allocation, run.allocation.excluded_nodes, run_dir).excluded_nodes
    return chain.exclude_from_rest(run_dir, scheduler, os.environ.get(own, ""), nodes) if nodes else []


def main(arguments: list[str]) -> int:
    """Measure, say what came of it, and end with the code that the job goes on or ends with."""
    ours, command = (arguments[: arguments.index("--")], arguments[arguments.index("--") + 1 :]) if "--" in arguments else (arguments, [])
    if len(ours) < 2 or not command:
        raise SystemExit("usage: python -m prottrans_hpc.launch.preflight SCHEDULER RUN_DIR [--quiet | --verbose] -- CMD...")
    die_with_parent(os.getppid())
    hold_signals()
    run_dir = RunDir(Path(ours[1]))
    try:
        finding = check(run_dir, command)
        kept = _keep_away(run_dir, ours[0]) if finding.verdict is Verdict.SLOW else []
        if finding.code != errors.DONE or "--quiet" not in ours:
            print(terminal.printable(preflight_notes.line(run_dir, finding, scheduler=ours[0], kept_away=kept), 4000), file=sys.stderr, flush=True)
        return finding.code
    except (ProttransError, OSError) as error:
        print(f"error: the preflight could not be made: {terminal.printable_lines(errors.explain(error))}", file=sys.stderr, flush=True)
        return errors.exit_code(error)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
