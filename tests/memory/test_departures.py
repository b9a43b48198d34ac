"""What goes out takes memory until it is there: a host that runs ahead of its device waits, and waits for no more than it has to.

Streams and events are strict fakes: nothing is copied before somebody waits for it, and copies keep nothing alive.
"""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from prottrans_hpc.memory import lms as module
from prottrans_hpc.memory import transfer as transfers
from prottrans_hpc.memory.host_pool import Block
from prottrans_hpc.memory.transfer import CudaTransfer
from prottrans_hpc.profile.storage_tracker import StorageTracker

KIB = 1024


class Queued:
    """A copy on a stream; with it all that were queued before are made."""

    def __init__(self, stream: LazyStream, copy: Any) -> None:
        self.stream, self.copy, self.is_done = stream, copy, False

    def query(self) -> bool:
        return self.is_done

    def synchronize(self) -> None:
        self.stream.waited += not self.is_done
        while not self.is_done:
            first = self.stream.queue.pop(0)
            first.copy()
            first.is_done = True


class LazyStream:
    def __init__(self) -> None:
        self.queue: list[Queued] = []
        self.waited = 0

    def add(self, copy: Any) -> Queued:
        self.queue.append(Queued(self, copy))
        return self.queue[-1]


class LazyTransfer:
    """A device that is always late."""

    pinned = False

    def __init__(self) -> None:
        self.outward, self.inward = LazyStream(), LazyStream()

    def written(self) -> None:
        return None

    def out(self, device_bytes: Tensor, block: Block, written: None) -> Queued:
        memory, free_after = weakref.ref(device_bytes.untyped_storage()), block.free_after

        def copy() -> None:
            if free_after is not None:
                free_after.synchronize()
            there = memory()
            assert there is not None, "given to others before it was copied"
            with torch._C._DisableTorchDispatch():
                block.bytes[: there.nbytes()].copy_(torch.empty(0, dtype=torch.uint8).set_(there))

        return self.outward.add(copy)

    def back(self, block: Block, num_bytes: int, is_out: Queued, device: torch.device) -> tuple[Tensor, Queued]:
        result = torch.full((num_bytes,), 0xFF, dtype=torch.uint8)

        def copy() -> None:
            is_out.synchronize()
            with torch._C._DisableTorchDispatch():
                result.copy_(block.bytes[:num_bytes])

        return result, self.inward.add(copy)

    def ready(self, device_bytes: Tensor, is_back: Queued) -> None:
        is_back.synchronize()


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> list[LazyTransfer]:
    made: list[LazyTransfer] = []
    monkeypatch.setattr(module, "DirectTransfer", lambda: made.append(LazyTransfer()) or made[-1])  # type: ignore[func-returns-value]
    return made


@pytest.mark.parametrize(("limit", "ahead"), [(0, 0), (0, 32 * KIB), (40 * KIB, 0), (40 * KIB, 32 * KIB)])
def test_a_host_that_runs_ahead_holds_no_more_than_the_limit_and_what_may_be_under_way(
    limit: int, ahead: int, late: list[LazyTransfer], support: Any, assert_nothing_is_left: Any
) -> None:
    lms, weight, one = support(limit, ahead_bytes=ahead), torch.ones((), requires_grad=True), 8 * KIB
    with StorageTracker(weight) as tracker:
        with lms:
            total = sum((weight * torch.full((2 * KIB,), float(number))).sum() for number in range(32))
            # One storage is being saved, its product is summed up, and one may go whatever the limit is; sums are a few bytes.
            assert tracker.peak_bytes <= limit + max(ahead, one) + 2 * one + KIB
            assert tracker.live_bytes >= limit + max(ahead, one) - one, "nothing goes before it must"
        assert late[0].outward.waited > 32 - (limit + ahead) // one - 3
        total.backward()  # type: ignore[union-attr]
    assert float(weight.grad) == 2 * KIB * sum(range(32))  # type: ignore[arg-type]
    del total
    lms.reclaim_inactive()
    assert_nothing_is_left(lms)


def test_what_was_moved_on_request_is_gone_then(late: list[LazyTransfer], support: Any) -> None:
    lms, weight = support(1 << 30), torch.ones((), requires_grad=True)
    with StorageTracker(weight) as tracker, lms:
        total = sum((weight * torch.full((2 * KIB,), float(number))).sum() for number in range(8))
        assert lms.reclaim_inactive() == 8 * 8 * KIB
        assert tracker.live_bytes < KIB
    total.backward()  # type: ignore[union-attr]
    assert float(weight.grad) == 2 * KIB * sum(range(8))  # type: ignore[arg-type]


def test_nothing_is_given_away_under_a_copy_when_all_is_dropped(late: list[LazyTransfer], support: Any) -> None:
    lms, weight = support(ahead_bytes=1 << 30), torch.ones((), requires_grad=True)
    with lms:
        total = (weight * torch.full((2 * KIB,), 3.0)).sum()
    assert late[0].outward.queue
    del total, lms
    gc.collect()
    assert late[0].outward.queue == [], "it was waited for"


class Stream:
    """Notes what it was told to wait for: how much work of which stream."""

    def __init__(self, *_: Any) -> None:
        self.work = 0
        self.waits: list[tuple[Stream, int]] = []

    def record_event(self) -> tuple[Stream, int]:
        return self, self.work

    def wait_event(self, event: tuple[Stream, int]) -> None:
        self.waits.append(event)

    def wait_stream(self, other: Stream) -> None:
        self.waits.append((other, other.work))


@pytest.fixture
def computing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stream]:
    stream = Stream()
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: stream)
    monkeypatch.setattr(transfers.torch.cuda, "stream", lambda _stream: contextlib.nullcontext())
    yield stream


def test_a_copy_out_waits_for_what_wrote_the_tensor_and_not_for_what_was_computed_since(computing: Stream) -> None:
    transfer, block, earlier = CudaTransfer(torch.device("cuda", 0)), Block(torch.empty(16, dtype=torch.uint8)), (Stream(), 5)
    computing.work = 3
    written = transfer.written()
    computing.work = 9
    block.free_after = earlier
    transfer.out(torch.arange(16, dtype=torch.uint8), block, written)
    assert transfer._outward.waits == [(computing, 3), earlier]
    assert block.bytes.tolist() == list(range(16))
