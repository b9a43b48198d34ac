"""Slow nodes: the arithmetic on made-up windows, and a rank that is really held up, step after step."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence

import pytest

from prottrans_hpc.recipe_health import Health
from prottrans_hpc.train.stragglers import Place, Stragglers, Verdict, slowness, window_medians

SETTINGS = Health(slow_factor=1.3, slow_window_steps=4, slow_patience=2)
SIX_NODES = [Place(f"n{node}", node) for node in range(6) for _ in range(2)]


def watch_all(places: Sequence[Place], settings: Health = SETTINGS) -> list[Stragglers]:
    """The watch of every rank."""
    return [Stragglers(settings, places, rank) for rank in range(len(places))]


def take_steps(ranks: list[Stragglers], steps: range, seconds: dict[int, float], tokens: dict[int, int] | None = None) -> list[Verdict]:
    """Steps in which the ranks compute for so long (1 s unless given); what rank 0 finds, which is what every rank finds."""
    found: list[Verdict] = []
    for step in steps:
        for rank, watch in enumerate(ranks):
            watch.add(seconds.get(rank, 1.0), (tokens or {}).get(rank, 100))
        reports = [watch.report(step) for watch in ranks]
        summed = [sum(slots) for slots in zip(*reports, strict=True)]
        for watch in ranks:
            watch.receive(summed)
        assert all(watch.findings == ranks[0].findings for watch in ranks)
        found += ranks[0].findings
        for watch in ranks:
            watch.findings = []
    return found


def test_a_slow_rank_brings_its_node_into_the_log_once_and_out_of_it_once() -> None:
    ranks = watch_all(SIX_NODES)
    assert take_steps(ranks, range(1, 5), {7: 1.6}) == []  # one window is none
    assert take_steps(ranks, range(5, 9), {7: 1.5}) == [Verdict("n3", 3, (7,), pytest.approx(1.55), True)]
    assert take_steps(ranks, range(9, 33), {7: 1.5}) == []
    assert take_steps(ranks, range(33, 37), {}) == []
    assert take_steps(ranks, range(37, 41), {}) == [Verdict("n3", 3, (7,), pytest.approx(1.0), False)]


def test_single_steps_and_single_windows_name_nobody() -> None:
    ranks = watch_all(SIX_NODES)
    for step in range(1, 161):
        held_up = {step % 12: 50.0} if step % 4 == 0 else {}
        assert take_steps(ranks, range(step, step + 1), held_up) == []
    for begin in range(161, 321, 8):  # every second window is slow
        assert take_steps(ranks, range(begin, begin + 4), {3: 2.0}) == []
        assert take_steps(ranks, range(begin + 4, begin + 8), {}) == []


def test_more_work_is_not_slowness_and_neither_is_a_little_work_that_takes_little_time() -> None:
    ranks = watch_all(SIX_NODES)
    assert take_steps(ranks, range(1, 41), {2: 1.5, 5: 0.3}, {2: 150, 5: 10}) == []


def test_ranks_without_any_work_are_passed_over() -> None:
    assert window_medians([(0.1, 0), (0.1, 0)]) == (0.0, 0.0)
    assert slowness([0.0, 1.0, 2.0], [0.0, 1.0, 2.0]) == [0.0, 1.0, 2.0]
    assert slowness([0.0, 0.0], [0.0, 0.0]) == [0.0, 0.0]


def test_of_two_ranks_each_is_measured_by_the_faster_one() -> None:
    assert slowness([1.0, 1.5], [0.01, 0.015]) == pytest.approx([1.0, 1.5])


def test_a_whole_node_is_one_finding_with_all_its_ranks() -> None:
    ranks = watch_all(SIX_NODES)
    assert take_steps(ranks, range(1, 9), {4: 1.4, 5: 2.0}) == [Verdict("n2", 2, (4, 5), pytest.approx(2.0), True)]


def test_only_the_end_of_a_window_makes_the_message_longer_and_one_rank_tells_nothing() -> None:
    watch = Stragglers(SETTINGS, SIX_NODES, 3)
    watch.add(1.0, 10)
    assert [len(watch.report(step)) for step in range(1, 9)] == [0, 0, 0, 24, 0, 0, 0, 24]
    assert Stragglers(SETTINGS, SIX_NODES[:1], 0).report(4) == []


def test_a_rank_that_is_held_up_is_named_in_the_log_and_in_the_history(tmp_path, make_run, start_ranks, history, prottrans, held_up) -> None:
    quick = ("health.slow_window_steps=3", "health.slow_patience=2", "health.slow_factor=1.5", "phases.0.steps=1000000", "validation.every_steps=0")
    folder = make_run(tmp_path / "run", *quick, "checkpoint.every_steps=1000000", num_ranks=2)
    gang = start_ranks(folder, 2, num_nodes=2)
    assert gang.wait_for_step(1)

    def found() -> list[dict[str, object]]:
        return [event for event in history(folder) if event["event"] == "slow node" and event["node"] == 1]

    deadline = time.monotonic() + 240
    with held_up(gang.rank_pids()[1]):
        while not found():
            assert gang.process.poll() is None, gang.story()
            assert time.monotonic() < deadline, gang.story()
            time.sleep(0.05)
    gang.signal(signal.SIGTERM)
    gang.end(75)
    (event, *_) = found()
    assert event["ranks"] == [1]
    assert event["host"] == os.uname().nodename
    assert event["factor"] >= 1.5
    assert "node 1 (" in (folder / "logs" / "node-0000.log").read_text()
    shown = prottrans("runs", "show", str(folder)).stdout
    assert f"node 1 ({event['host']}) is slow, {event['factor']} times the median: rank 1" in shown
