"""Timing collectives: every back end, collective, scope and size in an order drawn anew for each repetition.

What disturbs a machine lasts for seconds; in a fixed order it would hit one size or one back end alone. Small messages
are timed several at once, so that a clock's tick and the barrier before them do not count. The slowest rank's time is the time.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ..comm import Comm
from .comm_backends import COLLECTIVES, Call, Contender, Gang
from .comm_fits import Sample

_log = logging.getLogger(__name__)

_BATCH_S = 0.02
"""So long calls are timed at once, if one is shorter."""
_MOST_CALLS = 50
_FLOAT_BYTES = 4


@dataclass(frozen=True)
class Plan:
    """What to measure."""

    max_bytes: int
    """Largest buffer."""
    repetitions: int
    limit_s: float
    """A collective that takes longer is not measured at larger sizes."""
    seed: int = 0

    @property
    def sizes(self) -> list[int]:
        """Bytes of the buffers: 1 KiB, and four times as much each time."""
        found = [1024]
        while found[-1] * 4 <= self.max_bytes:
            found.append(found[-1] * 4)
        return found


@dataclass
class _Item:
    """One thing that is timed again and again."""

    backend: str
    collective: str
    scope: str
    num_bytes: int
    call: Call
    num_calls: int


def measure(comm: Comm, gang: Gang, contenders: Sequence[Contender], plan: Plan) -> list[Sample]:
    """The samples, the same on every rank. Collective."""
    items = [item for contender in contenders for scope in contender.scopes for item in _items(comm, gang, contender, scope, plan)]
    own = torch.zeros(len(items), plan.repetitions, dtype=torch.float64)
    order = random.Random(plan.seed)
    for repetition in range(plan.repetitions):
        for index in order.sample(range(len(items)), len(items)):
            own[index, repetition] = _time(comm, items[index].call, items[index].num_calls)
        _log.info("repetition %d of %d: %d collectives timed", repetition + 1, plan.repetitions, len(items))
    dist.all_reduce(own, op=dist.ReduceOp.MAX)
    return [Sample(item.backend, item.collective, item.scope, item.num_bytes, tuple(seconds)) for item, seconds in zip(items, own.tolist(), strict=True)]


def _items(comm: Comm, gang: Gang, contender: Contender, scope: str, plan: Plan) -> list[_Item]:
    """Warm up each collective of a back end, size by size, and find out how many calls make a timing."""
    found = []
    for collective in COLLECTIVES:
        for size in plan.sizes:
            group = len(gang.members[scope])
            numbers = -(-size // (_FLOAT_BYTES * group)) * group
            call = contender.prepare(collective, scope, numbers)
            call()
            slowest = torch.tensor([_time(comm, call, 1)], dtype=torch.float64)
            dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
            calls = max(1, min(_MOST_CALLS, int(_BATCH_S / float(slowest))))
            found.append(_Item(contender.name, collective, scope, _FLOAT_BYTES * numbers, call, calls))
            if float(slowest) > plan.limit_s:
                _log.info("%s %s (%s) takes %.1f s for %d bytes: larger ones are left out", contender.name, collective, scope, float(slowest), size)
                break
    return found


def _time(comm: Comm, call: Call, num_calls: int) -> float:
    """Seconds a call on this rank, after all have come here."""
    comm.barrier()
    began = time.perf_counter()
    for _ in range(num_calls):
        call()
    return (time.perf_counter() - began) / num_calls
