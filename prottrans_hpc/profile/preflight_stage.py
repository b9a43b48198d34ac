"""The stage `preflight`: the ranks of a training's own job measure their nodes, in seconds, before the training starts.

The pieces are those of the communication study: `comm_nodes` finds slow nodes, `comm_study` times collectives, here few
and small ones over the back end that the training will use. Rank 0 writes preflight.json; `launch.preflight` judges it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import time
from pathlib import Path
from typing import Any

import torch

from .. import durable, log, rank
from ..comm import Comm, default_device, open_comm
from ..errors import ConfigError, ProttransError
from ..rank import RankContext
from ..recipe_parallel import Parallel
from ..run_dir import Preflight, Run, RunDir, read_run
from ..stage import Request
from . import comm_report, comm_stage
from .comm_fits import fits_of
from .comm_nodes import PAIR_BYTES, measure_nodes
from .comm_study import Plan, measure

_log = logging.getLogger(__name__)

FORMAT = 1
_PLAN = Plan(max_bytes=1 << 20, repetitions=3, limit_s=0.5)
"""1 KiB to 1 MiB: what the fit needs, in some seconds."""


def check(request: Request) -> None:
    """Measure and write. Raises RankLostError, or ResourceError when the training's back end is not to be had."""
    run_dir = RunDir(Path(request["run_dir"]).resolve())
    try:
        _check(read_run(run_dir), run_dir)
    except ProttransError as error:
        _leave_reason(run_dir, error)
        raise


def _check(run: Run, run_dir: RunDir) -> None:
    settings = run.preflight or Preflight()
    context = rank.detect(os.environ)
    log.setup(run_dir, context)
    if context.world_size == 1:
        raise ConfigError("one rank has nobody to talk to: there is nothing to measure")
    began = time.monotonic()
    # Half of the limit, so that a rank that is lost is named before the time is over.
    timeout_s = max(1, settings.limit_s // 2)
    comm = open_comm(Parallel(timeout_s=timeout_s), context, run_dir=run_dir.path, device=torch.device("cpu"))
    found = _measured(comm, context, back_end_of(run.recipe.parallel, context), gate=settings.gate, timeout_s=timeout_s)
    if context.is_main:
        durable.write_json(run_dir.preflight_json, {"format": FORMAT, "machine": run.machine.name, **found, "measured_s": round(time.monotonic() - began, 3)})


def back_end_of(parallel: Parallel, context: RankContext) -> str:
    """What the training's ranks will talk over, as `open_comm` chooses it."""
    if parallel.comm == "horovod":
        return "horovod"
    return "nccl" if default_device(context).type == "cuda" else "gloo"


def _measured(comm: Comm, context: RankContext, back_end: str, *, gate: float, timeout_s: int) -> dict[str, Any]:
    """The content of preflight.json but for its beginning; leaves the gang. Where a node is slow, collectives are not timed any more."""
    gang = comm_stage.find_gang(comm, context)
    contenders, _ = comm_stage.open_back_ends(comm, gang, [back_end], timeout_s=timeout_s)
    with comm_stage.watching(comm):
        nodes, hosts = measure_nodes(comm, gang, contenders["gloo"], seed=0), comm_stage.hosts_of(comm, context)
        named = comm_stage.stand_out(nodes, hosts, gate=gate)
        slow = comm_stage.beyond(gate, named)
        samples = [] if slow else measure(comm, gang, [contenders[back_end]], _PLAN)
        comm.barrier()
    for contender in reversed(contenders.values()):
        contender.close()
    comm.close()
    return {
        "backend": back_end,
        "nodes": context.num_nodes,
        "ranks": comm.world_size,
        "gate": gate,
        "fits": [dataclasses.asdict(line) for line in fits_of(samples)],
        "slow_nodes": [{**one, "says": comm_report.slow_lines([one])[0].removeprefix("slow: ")} for one in slow],
        "node_seconds": {**dataclasses.asdict(nodes), "bytes": PAIR_BYTES},
        "hosts": hosts,
    }


def _leave_reason(run_dir: RunDir, error: ProttransError) -> None:
    """For the job script: what the first rank that failed says."""
    with contextlib.suppress(OSError), run_dir.preflight_error.open("x", encoding="utf-8") as file:  # FileExistsError: another one was first
        file.write(str(error))
