"""What `test_slow_links` runs as ranks: `reduction_bytes.py FOLDER SETTINGS`; rank 0 prints what comes into a node a step."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

from prottrans_hpc import comm, rank
from prottrans_hpc.recipe_parallel import Parallel

STEPS = 4
WIDTH = 1536
"""9 MiB of gradients."""


def bytes_in() -> int:
    """Into this node through its link so far."""
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("eth0:"))
    return int(line.split(":")[1].split()[0])


def into_nodes(context: rank.RankContext, meeting: Path, setting: dict[str, str]) -> list[float]:
    """Bytes that come into each node in a step, in sizes of the gradient."""
    meeting.mkdir(exist_ok=True)
    ranks = comm.open_comm(Parallel(**setting), context, run_dir=meeting, device=torch.device("cpu"))
    module = torch.nn.Linear(WIDTH, WIDTH, bias=False)
    model = ranks.parallel(module, 1024)
    ranks.barrier()
    before = bytes_in()
    ranks.barrier()
    for _ in range(STEPS):
        model.zero_gradients()
        model.backward(model.module(torch.ones(1, WIDTH)).sum())
        model.finish_gradients()
    ranks.barrier()
    came = ranks.all_gather_object((bytes_in() - before) / STEPS / module.weight.nbytes if context.local_rank == 0 else None)
    ranks.close()
    return [value for value in came if value is not None]


def main() -> None:
    context = rank.detect(os.environ)
    found = {name: max(into_nodes(context, Path(sys.argv[1], name), setting)) for name, setting in json.loads(sys.argv[2]).items()}
    if context.is_main:
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
