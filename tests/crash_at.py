"""Run a save in this process and die by SIGKILL right before its K-th touch of the file system: crash_at.py K SCENARIO FOLDER.

Python announces each open, mkdir, rename and unlink to audit hooks; fsync has no such event and is wrapped. Prints
"alive" and ends with 0 when the save needs fewer than K steps.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from prottrans_hpc import durable

EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir", "os.listdir", "shutil.rmtree"}


def replace_file(folder: Path) -> None:
    durable.write_bytes(folder / "state.json", b"new" * 1000)


def new_folder(folder: Path) -> None:
    with durable.new_folder(folder / "step-2") as temporary:
        (temporary / "a.bin").write_bytes(b"a" * 5000)
        (temporary / "b.bin").write_bytes(b"b" * 10)


def remove_folder(folder: Path) -> None:
    durable.remove_folder(folder / "step-1")


SCENARIOS = {"replace_file": replace_file, "new_folder": new_folder, "remove_folder": remove_folder}


def main() -> None:
    last_step, scenario, folder = int(sys.argv[1]), SCENARIOS[sys.argv[2]], Path(sys.argv[3])
    steps = 0
    watching = True

    def step() -> None:
        nonlocal steps
        steps += watching
        if steps == last_step:
            os.kill(os.getpid(), signal.SIGKILL)

    real_fsync = os.fsync

    def fsync(descriptor: int) -> None:
        step()
        real_fsync(descriptor)

    os.fsync = fsync
    sys.addaudithook(lambda event, _: step() if event in EVENTS and watching else None)
    scenario(folder)
    watching = False
    print("alive")


if __name__ == "__main__":
    main()
