"""What `reduction.py` runs as ranks: `reduction_ranks.py FOLDER SETTINGS`; rank 0 prints seconds a step and bytes into a node a step, as JSON."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from prottrans_hpc import comm, rank
from prottrans_hpc.recipe_parallel import Parallel

STEPS = 5
WIDTH = 1024
NUM_LAYERS = 2
"""8 MiB of gradients in two buckets."""


def bytes_in() -> int:
    """Into this node through its link so far."""
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("eth0:"))
    return int(line.split(":")[1].split()[0])


def measure(context: rank.RankContext, folder: Path, setting: dict[str, Any]) -> dict[str, Any]:
    """Steps of a model whose products take next to no time."""
    folder.mkdir(exist_ok=True)
    ranks = comm.open_comm(Parallel(**setting), context, run_dir=folder, device=torch.device("cpu"))
    module = torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(NUM_LAYERS)))
    model = ranks.parallel(module, 4)
    seconds, before = [], 0
    for step in range(STEPS + 1):
        ranks.barrier()
        if step == 1:  # the first step connects what talks for the first time
            before = bytes_in()
            ranks.barrier()
        began = time.perf_counter()
        model.zero_gradients()
        model.backward(model.module(torch.ones(1, WIDTH)).sum())
        model.finish_gradients()
        seconds.append(time.perf_counter() - began)
    ranks.barrier()
    came = ranks.all_gather_object([(bytes_in() - before) / STEPS if context.local_rank == 0 else 0, seconds[1:]])
    ranks.close()
    slowest = [max(step) for step in zip(*(own for _, own in came), strict=True)]
    return {"bytes_in": max(own for own, _ in came), "step_s": slowest, "gradient_bytes": 4 * NUM_LAYERS * WIDTH**2}


def main() -> None:
    """All settings, one after the other."""
    context = rank.detect(os.environ)
    found = {name: measure(context, Path(sys.argv[1], name), setting) for name, setting in json.loads(sys.argv[2]).items()}
    if context.is_main:
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
