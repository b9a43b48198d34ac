"""A run that was killed, stopped or moved to another world size is the run that was never stopped: with real processes."""

from __future__ import annotations

import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

STEPS = 16
Outcome = dict[str, Any]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, make_run: Callable[..., Path], outcome: Callable[[Path], Outcome]) -> Callable[[Any, int], Outcome]:
    """What an unbroken run of a world size leaves; each is run once."""
    known: dict[int, Outcome] = {}

    def run(start_ranks: Any, num_ranks: int) -> Outcome:
        if num_ranks not in known:
            folder = make_run(tmp_path_factory.mktemp("straight") / "run", num_ranks=num_ranks)
            start_ranks(folder, num_ranks).end(0)
            known[num_ranks] = outcome(folder)
            assert [line["step"] for line in known[num_ranks]["metrics"]] == list(range(1, STEPS + 1))
            assert [line["step"] for line in known[num_ranks]["validation"]] == [4, 8, 12, 16]
        return known[num_ranks]

    return run


def _kill_once(gang: Any, dice: random.Random) -> None:
    """SIGKILL at a random moment between the start of training and its end; saves run most of the time."""
    gang.wait_for_step(dice.randint(0, STEPS - 2))
    time.sleep(dice.random() * 0.05)
    gang.kill()


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_killed_and_resumed_is_bitwise_the_straight_run(num_ranks, tmp_path, make_run, start_ranks, straight, outcome, same):
    expected = straight(start_ranks, num_ranks)
    folder = make_run(tmp_path / "run", "checkpoint.every_steps=1", num_ranks=num_ranks)
    dice = random.Random(num_ranks)
    _kill_once(start_ranks(folder, num_ranks), dice)
    start_ranks(folder, num_ranks).end(0)
    same(outcome(folder), expected)
    assert not [path for path in (folder / "checkpoints").iterdir() if path.name.startswith(".")]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(24))
def test_many_random_kills(seed, tmp_path, make_run, start_ranks, straight, outcome, same):
    num_ranks = (2, 1, 3)[seed % 3]
    expected = straight(start_ranks, num_ranks)
    dice = random.Random(1000 + seed)
    folder = make_run(tmp_path / "run", f"checkpoint.every_steps={dice.choice([1, 2, 3])}", num_ranks=num_ranks)
    for _ in range(dice.randint(1, 3)):
        _kill_once(start_ranks(folder, num_ranks), dice)
    start_ranks(folder, num_ranks).end(0)
    same(outcome(folder), expected)


def test_resume_at_other_world_sizes(tmp_path, make_run, start_ranks, straight, outcome):
    expected = straight(start_ranks, 2)
    half = make_run(tmp_path / "half", num_ranks=2, stop_after_step=7)
    start_ranks(half, 2).end(0)
    for num_ranks in (1, 3, 4):
        folder = tmp_path / f"on-{num_ranks}"
        shutil.copytree(half, folder)
        make_run(folder, num_ranks=num_ranks)
        start_ranks(folder, num_ranks).end(0)
        _same_to_tolerance(outcome(folder), expected)


def _same_to_tolerance(found: Outcome, expected: Outcome) -> None:
    exact = ("step", "phase", "epoch", "samples", "order", "lr", "num_sequences", "num_residues", "num_targets")
    assert [[line[key] for key in exact] for line in found["metrics"]] == [[line[key] for key in exact] for line in expected["metrics"]]
    # The same numbers are added in another order: 16 steps of fp32 stay within a few parts in 100,000.
    assert [line["loss"] for line in found["metrics"]] == pytest.approx([line["loss"] for line in expected["metrics"]], rel=3e-5)
    assert [line["loss"] for line in found["validation"]] == pytest.approx([line["loss"] for line in expected["validation"]], rel=3e-5)
    assert found["state"] == expected["state"]


STORMS: dict[str, Callable[[Any, random.Random], None]] = {
    # While Python starts and torch is imported: the starter holds the signals back until somebody can take them.
    "while starting": lambda gang, dice: (time.sleep(dice.random() * 2.0), gang.signal(signal.SIGTERM)),
    "one rank only": lambda gang, dice: (gang.wait_for_step(2), gang.signal_rank(1, signal.SIGUSR1)),
    "CONT and TERM, twice": lambda gang, dice: (gang.wait_for_step(5), gang.signal_rank(0, signal.SIGCONT), *(gang.signal(signal.SIGTERM) for _ in range(2))),
    "a storm to the end": lambda gang, dice: _storm(gang, dice),
}


def _storm(gang: Any, dice: random.Random) -> None:
    gang.wait_for_step(9)
    pids = gang.rank_pids()
    numbers = [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT]
    while gang.process.poll() is None:
        gang.signal_pid(dice.choice(pids), dice.choice(numbers)) if dice.random() < 0.5 else gang.signal(dice.choice(numbers))
        time.sleep(dice.random() * 0.003)


def test_preempted_again_and_again_is_bitwise_the_straight_run(tmp_path, make_run, start_ranks, straight, outcome, same, history):
    expected = straight(start_ranks, 2)
    # A large limit on the right keeps a loaded machine from finishing before the signal comes: every step saves.
    folder = make_run(tmp_path / "run", "checkpoint.every_steps=1", num_ranks=2)
    dice = random.Random(7)
    for name, storm in STORMS.items():
        gang = start_ranks(folder, 2)
        storm(gang, dice)
        code = gang.end(None)
        assert code == 75, f"{name}: exit code {code}\n{gang.story()}"
    start_ranks(folder, 2).end(0)
    same(outcome(folder), expected)
    stops = [event for event in history(folder) if event["event"] == "stop"]
    assert [event["exit_code"] for event in stops][-1] == 0
    assert {event["exit_code"] for event in stops[:-1]} == {75}
    assert all(event["world_size"] == 2 for event in stops)


def test_a_finished_run_says_so_and_trains_no_more(tmp_path, make_run, start_ranks, outcome):
    folder = make_run(tmp_path / "run", num_ranks=1, stop_after_step=3)
    start_ranks(folder, 1).end(0)
    before = outcome(folder)
    again = start_ranks(folder, 1)
    again.end(0)
    assert "nothing to do" in again.errors.read_text()
    assert outcome(folder) == before
