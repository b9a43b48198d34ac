"""Copies that run beside the computation, on threads that dawdle: large model support waits where it must, and only there.

What streams and events do on a GPU (`test_lms_gpu` is for one) threads do here: one copies out, one copies back, each in its order and with random
sleeps before every copy, and new memory is full of nonsense until its copy is done.
"""

from __future__ import annotations

import random
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from prottrans_hpc.memory import lms as module
from prottrans_hpc.memory.host_pool import Block


class Done:
    """As a CUDA event."""

    def __init__(self, future: Future[None]) -> None:
        self.query, self.synchronize = future.done, future.result


class DawdlingTransfer:
    """Asynchronous copies between two places of host memory, which keep what they read no more alive than a GPU does."""

    pinned = False

    def __init__(self, seed: int) -> None:
        self.outward, self.inward = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self.dice = random.Random(seed)
        self.waits = 0

    def written(self) -> None:
        return None

    def out(self, device_bytes: Tensor, block: Block, written: None) -> Done:
        free_after, nap_s = block.free_after, self.dice.choice((0.0, 0.0, 0.002))
        memory = weakref.ref(device_bytes.untyped_storage())

        def copy() -> None:
            if free_after is not None:
                free_after.synchronize()
            time.sleep(nap_s)
            there = memory()
            assert there is not None, "given to others before it was copied"
            block.bytes[: there.nbytes()].copy_(torch.empty(0, dtype=torch.uint8).set_(there))

        return Done(self.outward.submit(copy))

    def back(self, block: Block, num_bytes: int, is_out: Done, device: torch.device) -> tuple[Tensor, Done]:
        result, nap_s = torch.full((num_bytes,), 0xFF, dtype=torch.uint8), self.dice.choice((0.0, 0.0, 0.002))

        def copy() -> None:
            is_out.synchronize()
            time.sleep(nap_s)
            result.copy_(block.bytes[:num_bytes])

        return result, Done(self.inward.submit(copy))

    def ready(self, device_bytes: Tensor, is_back: Done) -> None:
        self.waits += not is_back.query()
        is_back.synchronize()


@pytest.fixture
def transfers(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[DawdlingTransfer]]:
    made: list[DawdlingTransfer] = []

    def make() -> Any:
        made.append(DawdlingTransfer(len(made)))
        return made[-1]

    monkeypatch.setattr(module, "DirectTransfer", make)
    yield made
    for one in made:
        one.outward.shutdown()
        one.inward.shutdown()


@pytest.mark.parametrize(("limit", "ahead"), [(0, 0), (0, 1 << 17), (1 << 16, 0), (1 << 16, 1 << 17)])
def test_nothing_is_read_before_it_is_there(limit: int, ahead: int, transfers: list[DawdlingTransfer], support: Any, transformer: Any, gradients: Any) -> None:
    model = transformer()
    expected = gradients(model, model)
    lms = support(limit, ahead_bytes=ahead)
    for _ in range(4):  # later steps write to the blocks of earlier ones
        found = gradients(model, lms(model))
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert lms.counts().reclaimed > 4
    assert transfers[0].waits > 0, "else nothing was asynchronous"


def test_blocks_of_a_graph_that_died_in_the_middle_of_its_copies_are_safe(
    transfers: list[DawdlingTransfer], support: Any, transformer: Any, gradients: Any
) -> None:
    model = transformer()
    expected = gradients(model, model)
    lms = support(0, ahead_bytes=1 << 17)
    for _ in range(3):
        with lms:
            abandoned = model(torch.randn(4, 16, 32)).sum()
        del abandoned  # its copies are still on their way out
        found = gradients(model, lms(model))
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
