"""Fork children that save a checkpoint and die by SIGKILL right before their K-th call that touches a file, for every K.

crash_saves.py FOLDER. Prints one JSON object: the newest readable step after each K, and what the child was about to do.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import torch

from prottrans_hpc.comm import Solo
from prottrans_hpc.recipe import Checkpointing
from prottrans_hpc.run_dir import RunDir
from prottrans_hpc.train import checkpoint, retention
from prottrans_hpc.train.saving import Saver

TOUCHES = {"open", "write", "pwrite", "fsync", "replace", "rename", "mkdir", "unlink", "remove", "rmdir", "close", "ftruncate", "truncate", "__exit__", "flush"}


def state(step: int) -> dict[str, Any]:
    return {"format": checkpoint.FORMAT, "run_id": "r", "step": step, "identity": {}}


def tensors(step: int) -> dict[str, dict[str, torch.Tensor]]:
    return {"model": {"a": torch.full((1000,), float(step))}, "optimizer": {"m": torch.full((500,), float(step))}}


def save(run: RunDir, step: int) -> None:
    saver = Saver(run, Solo(torch.device("cpu")), Checkpointing(every_steps=1, keep_last=2), start_id=f"start{step}")
    saver.stage(step, state(step), tensors(step))
    saver.start()
    saver.drain()


def die_before(number: int, told: int) -> None:
    """From now on count the touches of all threads, tell what each is, and die before one of them."""
    lock, count = threading.Lock(), 0

    def profile(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        if event != "c_call" or getattr(argument, "__name__", "") not in TOUCHES:
            return
        with lock:
            count += 1
            if count == number:
                os.write(told, argument.__name__.encode())
                os.kill(os.getpid(), signal.SIGKILL)

    threading.setprofile(profile)
    sys.setprofile(profile)


def child(run: RunDir, number: int, told: int) -> None:
    die_before(number, told)
    retention.remove_leftovers(run)
    save(run, 3)
    sys.setprofile(None)
    os._exit(0)


def newest(run: RunDir) -> int:
    found = checkpoint.read_newest(run, run.checkpoint_steps()[::-1], agree=lambda value: value)
    assert found is not None
    assert all(tensor.eq(found.step).all() for tensor in (*found.model.values(), *found.optimizer.values()))
    return found.step


def main() -> None:
    template, results, touches = Path(sys.argv[1], "template"), [], []
    good = RunDir(template)
    good.checkpoints.mkdir(parents=True)
    for step in (1, 2):
        save(good, step)
    (good.checkpoints / ".step-00000003.tmp-killed").mkdir()
    for number in range(1, 1000):
        run = RunDir(Path(sys.argv[1], f"run-{number}"))
        shutil.copytree(template, run.path)
        reader, told = os.pipe()
        pid = os.fork()
        if pid == 0:
            child(run, number, told)
        _, status = os.waitpid(pid, 0)
        os.close(told)
        touches.append(os.read(reader, 100).decode())
        os.close(reader)
        results.append(newest(run))
        assert [checkpoint.problems(run.checkpoint(step)) for step in run.checkpoint_steps() if checkpoint.problems(run.checkpoint(step))] == []
        retention.remove_leftovers(run)
        assert [path.name for path in run.checkpoints.iterdir() if path.name.startswith(".")] == []
        save(run, 4)  # the next start goes on
        assert newest(run) == 4
        shutil.rmtree(run.path)
        if os.WIFEXITED(status):
            break
    print(json.dumps({"newest": results, "touches": touches, "last_status": status}))


if __name__ == "__main__":
    main()
