"""Two ranks save the halves of tensors, and one of them dies by SIGKILL right before its K-th call that touches a file; then the other is killed.

crash_shards.py FOLDER. Prints one JSON object: by rank the newest readable step after each K, and what it was about to do.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch._dynamo  # DTensor imports it at its first use, which every forked rank would have to do
import torch.distributed as dist
from crash_saves import die_before, newest, state
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from prottrans_hpc.comm_torch import TorchComm
from prottrans_hpc.rank import RankContext
from prottrans_hpc.recipe import Checkpointing
from prottrans_hpc.run_dir import RunDir
from prottrans_hpc.train import checkpoint, retention
from prottrans_hpc.train.saving import Saver

NUM_RANKS = 2
EVERY = {0: 5, 1: 2}
"""Which calls of a rank are tried: rank 0's are many, and those of a save by one rank are all tried elsewhere."""


def halves(num_rows: int, num_columns: int, step: int) -> DTensor:
    """A tensor of which each rank has half the rows."""
    mesh, own = init_device_mesh("cpu", (NUM_RANKS,)), torch.full((num_rows // NUM_RANKS, num_columns), float(step))
    return DTensor.from_local(own, mesh, [Shard(0)], run_check=False, shape=torch.Size((num_rows, num_columns)), stride=(num_columns, 1))


def start_rank(rank: int, run: RunDir, step: int, dying: tuple[int, int, int] | None) -> int:
    """A forked rank's process id; `dying` says which rank dies before which of its calls, and where it tells what that is."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        dist.init_process_group("gloo", init_method=f"file://{run.path}/meet-{step}", rank=rank, world_size=NUM_RANKS, timeout=timedelta(seconds=60))
        comm = TorchComm(RankContext(rank, NUM_RANKS, rank, NUM_RANKS, 0, 1, "localhost", "none"), torch.device("cpu"), 60)
        saver = Saver(run, comm, Checkpointing(every_steps=1, keep_last=2), start_id=f"start{step}")
        model = {"a": halves(6, 100, step), "b": torch.full((50,), float(step))}
        optimizer = {"m": halves(4, 50, step)}
        if rank == 0:
            retention.remove_leftovers(run)
        comm.barrier()
        if dying and dying[0] == rank:
            die_before(dying[1], dying[2])
        saver.stage(step, state(step), {"model": model, "optimizer": optimizer})
        saver.start()
        saver.drain()
        sys.setprofile(None)
        code = 0
    finally:
        os._exit(code)


def gang(run: RunDir, step: int, dying: tuple[int, int, int] | None = None) -> bool:
    """Save on all ranks; whether all of them came to the end. The first to fail takes the others with it."""
    ranks = {start_rank(rank, run, step, dying) for rank in range(NUM_RANKS)}
    fine = True
    while ranks:
        pid, status = os.wait()
        ranks.discard(pid)
        if status and fine:
            fine = False
            for other in ranks:
                os.kill(other, signal.SIGKILL)
    return fine


def main() -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    template, results = RunDir(Path(sys.argv[1], "template")), []
    template.checkpoints.mkdir(parents=True)
    assert gang(template, 1) and gang(template, 2) and newest(template) == 2
    for rank, every in EVERY.items():
        for number in range(1, 1000, every):
            run = RunDir(Path(sys.argv[1], f"run-{rank}-{number}"))
            shutil.copytree(template.path, run.path)
            reader, told = os.pipe()
            fine = gang(run, 3, (rank, number, told))
            os.close(told)
            results.append({"rank": rank, "touch": os.read(reader, 100).decode(), "newest": newest(run)})
            os.close(reader)
            assert [checkpoint.problems(run.checkpoint(step)) for step in run.checkpoint_steps() if checkpoint.problems(run.checkpoint(step))] == []
            if fine:
                break
        assert gang(run, 4) and newest(run) == 4
    print(json.dumps(results))


if __name__ == "__main__":
    main()
