"""What the test of a cut model's bytes runs, in a network of its own: `cut_bytes.py RANKS UNITS` starts ranks over gloo.

Prints how many bytes a rank sends in a step, over those of the weights.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

WIDTH = 512


def sent_bytes() -> int:
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[0])


def rank_of_many(num_ranks: int, num_units: int) -> None:
    dist.init_process_group("gloo")
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(num_units)))
    for layer in model[1:]:
        fully_shard(layer)
    fully_shard(model)  # the first layer is the rest, which stays together
    samples = torch.ones(1, WIDTH)
    seen = []
    for _ in range(3):
        model(samples).sum().backward()
        dist.barrier()
        seen.append(sent_bytes())
        dist.barrier()
    if dist.get_rank() == 0:
        print((seen[2] - seen[1]) / num_ranks / (4 * num_units * WIDTH * WIDTH))
    dist.destroy_process_group()


def main() -> None:
    num_ranks, num_units = map(int, sys.argv[1:3])
    if "RANK" in os.environ:
        rank_of_many(num_ranks, num_units)
        return
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    shared = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "WORLD_SIZE": str(num_ranks), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    ranks = [subprocess.Popen([sys.executable, *sys.argv], env=shared | {"RANK": str(rank)}) for rank in range(num_ranks)]
    sys.exit(max(abs(rank.wait()) for rank in ranks))


if __name__ == "__main__":
    main()
