"""What the tests of `comm` run as ranks: `rank_work.py SCENARIO BACK_END OUT [TIMEOUT_S]`. Each rank leaves OUT/<rank>.json and .safetensors."""

from __future__ import annotations

import copy
import json
import os
import signal
import sys
import threading
from pathlib import Path

import torch
from safetensors.torch import save_file

from prottrans_hpc import comm, errors, rank
from prottrans_hpc.recipe_parallel import Parallel

NUM_SAMPLES = 12


class Net(torch.nn.Module):
    """About 3 MiB in fp32, hence several buckets of 1 MiB; the small layer is defined last and used first."""

    def __init__(self, width=512):
        super().__init__()
        self.hidden = torch.nn.Linear(width, width)
        self.out = torch.nn.Linear(width, width)
        self.scale = torch.nn.Parameter(torch.ones(width))
        self.embed = torch.nn.Linear(16, width)

    def forward(self, batch):
        hidden = torch.tanh(self.hidden(self.embed(batch) * self.scale))
        return (self.out(hidden) ** 2).sum()


def net(seed, dtype=torch.float32):
    torch.manual_seed(seed)
    return Net().to(dtype)


def samples(step, dtype=torch.float32):
    return torch.randn(NUM_SAMPLES, 16, generator=torch.Generator().manual_seed(step)).to(dtype)


def take_step(model, ranks, step, dtype=torch.float32):
    """Summed gradients of a step whose samples are dealt out; the last rank's first micro batch is empty."""
    own = samples(step, dtype)[ranks.rank :: ranks.world_size].to(ranks.device)
    cut = 0 if ranks.rank == ranks.world_size - 1 else len(own) // 2
    model.zero_gradients()
    with model.no_sync():
        model.backward(model.module(own[:cut]))
    model.backward(model.module(own[cut:]))
    model.finish_gradients()


def gradients(module):
    return {name: parameter.grad.clone() for name, parameter in module.named_parameters()}


def agreement(ranks, out):
    """Objects, sums, parameters and gradients."""
    report = {"name": ranks.name, "rank": ranks.rank, "world_size": ranks.world_size}
    for dtype in (torch.float32, torch.float64, torch.int64):
        given = torch.tensor([[ranks.rank + 1, 10], [0, 2]], dtype=dtype)
        summed = ranks.all_reduce_sum(given)
        report[f"sum {dtype}"] = summed.tolist()
        assert summed.dtype == dtype
        assert given.tolist() == [[ranks.rank + 1, 10], [0, 2]]  # what was given stays as it was
    report["number"] = ranks.all_reduce_sum(torch.tensor(float(ranks.rank), dtype=torch.float64)).item()
    mine = {"rank": ranks.rank, "text": '\u00e4\n"\u2028' + "x" * 1000 * ranks.rank, "none": None, "list": [1.5, True]}
    report["broadcast"] = ranks.broadcast_object(mine)
    report["gathered"] = ranks.all_gather_object(mine)
    report["empty"] = [ranks.broadcast_object(""), ranks.all_gather_object(None)]
    ranks.barrier()
    module = net(seed=ranks.rank)
    model = ranks.parallel(module, 1)
    report["parameters"] = comm.parameter_digest(module).hex()
    take_step(model, ranks, 1)
    take_step(model, ranks, 2)
    save_file(gradients(module), out / f"{ranks.rank}.safetensors")
    exact = net(seed=ranks.rank, dtype=torch.float64)
    take_step(ranks.parallel(exact, 1), ranks, 2, torch.float64)
    save_file(gradients(exact), out / f"{ranks.rank}.float64.safetensors")
    try:
        comm.check_same(ranks, "the digests", b"same" if ranks.rank != 1 else b"odd!")
    except errors.NumericsError as error:
        report["odd"] = str(error)
    comm.check_same(ranks, "the digests", b"same again")
    return report


def layout(ranks, out):
    """The same step as the third of one start and as the first of another."""
    module = net(seed=0)
    straight, resumed = ranks.parallel(module, 1), None
    for step in (1, 2, 3):
        take_step(straight, ranks, step)
    save_file(gradients(module), out / f"{ranks.rank}.straight.safetensors")
    again = copy.deepcopy(net(seed=0))
    resumed = ranks.parallel(again, 1)
    take_step(resumed, ranks, 3)
    save_file(gradients(again), out / f"{ranks.rank}.resumed.safetensors")
    return {"rank": ranks.rank}


def train(ranks, out, fate):
    """Steps for ever; the last rank meets its fate half a second into them."""
    model = ranks.parallel(net(seed=0), 1)
    for step in range(10**9):
        take_step(model, ranks, step)
        if step == 2:
            (out / f"{ranks.rank}.pid").write_text(str(os.getpid()))
            if ranks.rank == ranks.world_size - 1:
                threading.Timer(0.5, os.kill, (os.getpid(), fate)).start()


def reduce_for_ever(ranks, out, fate):
    """The same with large all-reduces alone."""
    large = torch.ones(4 << 20)
    if ranks.rank == ranks.world_size - 1:
        threading.Timer(0.5, os.kill, (os.getpid(), fate)).start()
    while True:
        ranks.all_reduce_sum(large)


SCENARIOS = {
    "agreement": agreement,
    "layout": layout,
    "killed-in-training": lambda ranks, out: train(ranks, out, signal.SIGKILL),
    "stopped-in-training": lambda ranks, out: train(ranks, out, signal.SIGSTOP),
    "killed-in-sum": lambda ranks, out: reduce_for_ever(ranks, out, signal.SIGKILL),
    "stopped-in-sum": lambda ranks, out: reduce_for_ever(ranks, out, signal.SIGSTOP),
    "nothing": lambda ranks, out: {"rank": ranks.rank},
}


def main():
    scenario, back_end, out = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    context = rank.detect(os.environ)
    timeout_s = int(sys.argv[4]) if len(sys.argv) > 4 else 60
    report = {}
    try:
        ranks = comm.open_comm(Parallel(comm=back_end, timeout_s=timeout_s), context, run_dir=out)
        report = SCENARIOS[scenario](ranks, out)
        ranks.close()
    except errors.ProttransError as error:
        report = {"rank": context.rank, "error": type(error).__name__, "message": str(error)}
        (out / f"{context.rank}.json").write_text(json.dumps(report))
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(error.exit_code)  # as prottrans_hpc.__main__ does
    (out / f"{context.rank}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main()
