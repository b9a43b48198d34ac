"""The ledger of a step: what belongs to which part, on the host's clock and on a GPU's stream."""

from __future__ import annotations

import itertools
import time

import pytest
import torch

from prottrans_hpc.train import timing
from prottrans_hpc.train.timing import PARTS, StepTiming


@pytest.fixture
def clock(monkeypatch):
    """A host clock that a test moves: `clock(seconds)`."""
    moments = [100.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: moments[-1])
    return lambda seconds: moments.append(moments[-1] + seconds)


def lap(ledger: StepTiming) -> dict[str, float]:
    ledger.end_lap()
    return {name: seconds for name, seconds in zip(PARTS, ledger.read(), strict=True) if seconds}


def test_every_moment_belongs_to_one_part(clock):
    ledger = StepTiming()
    clock(1)
    for _ in range(2):
        with ledger.part("forward"):
            clock(2)
        with ledger.part("backward"):
            clock(4)
    with ledger.part("optimizer"):
        clock(8)
        with ledger.part("exposed_comm"):
            clock(16)
        clock(32)
    with ledger.part(None):
        clock(1000)
    assert lap(ledger) == {"other": 1, "forward": 4, "backward": 8, "exposed_comm": 16, "optimizer": 40}


def test_a_lap_ends_in_the_middle_of_a_part_and_the_next_goes_on_with_it(clock):
    ledger = StepTiming()
    with ledger.part("checkpoint"):
        clock(1)
        assert lap(ledger) == {"checkpoint": 1}
        clock(2)
    clock(4)
    assert lap(ledger) == {"checkpoint": 2, "other": 4}
    assert lap(ledger) == {}


def test_beginning_again_forgets(clock):
    ledger = StepTiming()
    with ledger.part("forward"):
        clock(1)
    ledger.begin()
    clock(2)
    assert lap(ledger) == {"other": 2}


def test_a_part_that_fails_ends(clock):
    ledger = StepTiming()
    with pytest.raises(ValueError, match="no"), ledger.part("forward"):
        clock(1)
        raise ValueError("no")
    clock(2)
    assert lap(ledger) == {"forward": 1, "other": 2}


def test_a_collective_within_the_update_is_communication(clock):
    ledger = StepTiming()
    add = ledger.timed("exposed_comm", lambda one, *, other: clock(2) or one + other)
    with ledger.part("optimizer"):
        clock(1)
        assert add(3, other=4) == 7
    assert lap(ledger) == {"optimizer": 1, "exposed_comm": 2}


def test_steps_are_waited_for(clock):
    ledger = StepTiming()
    slow = (clock(3) or number for number in range(2))
    taken = [number for number in ledger.waits_for(slow) if not clock(5)]
    assert taken == [0, 1]
    assert lap(ledger) == {"data_wait": 6, "other": 10}


def test_a_ledger_as_it_stands_in_files():
    seconds = [number / 3 for number in range(len(PARTS))]
    assert timing.by_name(seconds) == {f"{name}_s": round(number / 3, 6) for number, name in enumerate(PARTS)}
    assert timing.compute_s(seconds) == pytest.approx((1 + 2 + 4) / 3)


@pytest.mark.gpu
def test_a_streams_time_is_told_without_waiting_in_between():
    ledger = StepTiming(torch.device("cuda"))
    matrix = torch.randn(4096, 4096, device="cuda")
    torch.cuda.synchronize()
    for number in itertools.count():
        ledger.begin()
        began = time.perf_counter()
        with ledger.part("forward"):
            for _ in range(20):
                matrix @ matrix
        launched_s = time.perf_counter() - began
        with ledger.part("optimizer"):
            matrix @ matrix
        ledger.end_lap()
        torch.cuda.synchronize()
        total_s = time.perf_counter() - began
        seconds = dict(zip(PARTS, ledger.read(), strict=True))
        assert sum(seconds.values()) <= total_s
        if number:  # the first one loads the kernels
            break
    assert seconds["forward"] > 5 * seconds["optimizer"] > 0.0
    assert launched_s < seconds["forward"]
