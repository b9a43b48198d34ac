"""Kill an extraction by SIGKILL at many moments, resume it, and compare the bytes: kill_sweep.py FOLDER CHECKPOINT FASTA NUM_RANDOM [ALSO].

Each run is a fork of this process, so that torch is imported once. First it dies right before every K-th touch of the
file system in turn (Python announces open, mkdir, rename and unlink to audit hooks; fsync is wrapped), then at random
moments. Prints one JSON object.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}
ALSO = sys.argv[5] if len(sys.argv) > 5 else None


def extract(out: Path, checkpoint: str, fasta: str) -> None:
    from prottrans_hpc.embed import compute, proteins
    from prottrans_hpc.stage import run_stage

    # Several windows and a part for each batch: many moments at which something can be half done.
    proteins.WINDOW_RESIDUES = 3_000
    compute._PART_BYTES = 1
    choices = {"per_residue": True, "pool": "mean", "precision": "fp32", "bin_residues": 16_384, "device": "cpu", "invalid": "error", "json": False}
    run_stage("embed", {"source": checkpoint, "fasta": [fasta], "out": str(out), "also": ALSO, **choices})


def die_before(number: int, folder: Path) -> None:
    """SIGKILL this process right before its `number`-th touch of `folder`, whichever thread does it."""
    steps, lock, real_fsync = 0, threading.Lock(), os.fsync

    def step() -> None:
        nonlocal steps
        with lock:
            steps += 1
            if steps == number:
                os.kill(os.getpid(), signal.SIGKILL)

    def fsync(descriptor: int) -> None:
        step()
        real_fsync(descriptor)

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event in EVENTS and str(arguments[0]).startswith(str(folder)):
            step()

    os.fsync = fsync
    sys.addaudithook(hook)


def run(out: Path, checkpoint: str, fasta: str, *, last_step: int | None = None, seconds: float | None = None) -> int:
    """One extraction in a fork; the signal that ended it, 0 if it ended well."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            if last_step is not None:
                die_before(last_step, out.parent)
            extract(out, checkpoint, fasta)
            code = 0
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        finally:
            os._exit(code)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if not (os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0):
        raise SystemExit(f"the extraction failed: {status}")
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def check(folder: Path, out: Path, expected: bytes, *, resumed: bool) -> None:
    """The file is whole or not there; after a run to the end it is there, alone and right."""
    if out.exists() and out.read_bytes() != expected:
        raise SystemExit(f"{out} is there with other bytes")
    if resumed and sorted(os.listdir(folder)) != [out.name]:
        raise SystemExit(f"left over: {sorted(os.listdir(folder))}")


def main() -> None:
    base, checkpoint, fasta, num_random = Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
    import prottrans_hpc.embed.stage  # noqa: F401 - before the forks
    from prottrans_hpc import terminal

    terminal.set_verbosity(terminal.QUIET)
    started = time.monotonic()
    run(base / "expected.h5", checkpoint, fasta)
    whole_s = time.monotonic() - started
    expected = (base / "expected.h5").read_bytes()
    folder = base / "work"
    out = folder / "out.h5"
    kills = kept = 0
    for number in range(1, 10_000):
        folder.mkdir()
        killed = run(out, checkpoint, fasta, last_step=number)
        check(folder, out, expected, resumed=not killed)
        if killed:
            kills += 1
            kept += bool(list(folder.glob("out.h5.parts/window-*")))
            run(out, checkpoint, fasta)
            check(folder, out, expected, resumed=True)
        shutil.rmtree(folder)
        if not killed:
            break
    generator = random.Random(5)
    for _ in range(num_random):
        folder.mkdir()
        rounds = 0
        while run(out, checkpoint, fasta, seconds=generator.uniform(0.0, 1.1 * whole_s)):
            check(folder, out, expected, resumed=False)
            rounds += 1
        kills += rounds
        check(folder, out, expected, resumed=True)
        shutil.rmtree(folder)
    print(json.dumps({"kills": kills, "kills_with_parts": kept, "seconds": time.monotonic() - started}))


if __name__ == "__main__":
    main()
