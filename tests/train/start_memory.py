"""What the start of a cut model takes of a rank's host memory: start_memory.py memory FOLDER LAYOUT. Each rank leaves FOLDER/<layout>-<rank>.json, in bytes.

Peaks are the kernel's (VmHWM), over what the process had just before; "whole" is what a start from a whole model takes.
"""

from __future__ import annotations

import ctypes
import gc
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import shard_gang

from prottrans_hpc import architecture, comm, comm_sharded
from prottrans_hpc.parallel_layout import ParallelLayout
from prottrans_hpc.stage import find
from prottrans_hpc.train import checkpoint, pieces, starting_weights

LAYOUTS = {"fsdp4": ParallelLayout(1, 4, 1), "fsdp2xtp2": ParallelLayout(1, 2, 2)}
RECORD = architecture.get("prot_bert")
TINY = RECORD.size("tiny").shape
LARGE = replace(TINY, hidden_size=512, intermediate_size=2048, num_layers=10, num_heads=8)
"""33 million parameters; the largest has one."""


def memory(folder: Path, layout: str, ranks: Any) -> None:
    start(ranks, TINY, layout)  # what torch allocates once is no part of a start
    report = {"parameters": 4 * RECORD.num_parameters(LARGE)}
    if ranks.rank == 0:
        report["whole"], whole = rise(build_whole)
        path = checkpoint.RunDir(folder / layout).checkpoint(0)
        checkpoint.write_model_checkpoint(path, record=RECORD, shape=LARGE, weights=whole.state_dict(), origin={})
        del whole
    ranks.barrier()
    report["start"], module = rise(lambda: start(ranks, LARGE, layout))
    report["pieces"] = sum(pieces.local(parameter).nbytes for parameter in module.parameters())
    path = checkpoint.RunDir(folder / layout).checkpoint(0)
    report["read"], found = rise(lambda: checkpoint.read_checkpoint(path, kinds=("model",), own={"model": module.state_dict()}))
    assert all(pieces.local(tensor).equal(found.model[name]) for name, tensor in module.state_dict().items())
    (folder / f"{layout}-{ranks.rank}.json").write_text(json.dumps(report))


def start(ranks: Any, shape: Any, layout: str) -> Any:
    module = starting_weights.build_without_memory(RECORD, shape)
    comm_sharded.shard(ranks, module, LAYOUTS[layout], RECORD.tensor_parallel.split)
    comm.check_same(ranks, "the starting weights", starting_weights.put_starting_weights(module, {}, RECORD, shape, 5))
    return module


def build_whole() -> Any:
    module = find(RECORD.build)(LARGE)
    module.initialise(5)
    return module


def rise(work: Callable[[], Any]) -> tuple[int, Any]:
    """How far the peak of `work` is above what was there before it."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what is free is given back, so that it is seen when it is taken again
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what there is
    before = _status("VmHWM")
    result = work()
    return _status("VmHWM") - before, result


def _status(key: str) -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key + ":"))
    return int(line.split()[1]) << 10


if __name__ == "__main__":
    shard_gang.SCENARIOS["memory"] = memory
    shard_gang.main()
