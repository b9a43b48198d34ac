"""Ranks that hang: who is blamed, on made-up sightings; and real ranks that are stopped, or stand still, while the others wait."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from prottrans_hpc import whereabouts
from prottrans_hpc.run_dir import RunDir
from prottrans_hpc.train.stragglers import Place
from prottrans_hpc.train.stuck_ranks import Sighting, find_hang, read_sightings, record, sightings_file, unheard
from prottrans_hpc.train.watchdog import Limits, Watchdog, limits

STUCK = Path(__file__).with_name("stuck_rank.py")
HOSTS = ["n1", "n1", "n2", "n2"]


def waits(rank: int, position: int = 81, step: int = 9, collective: str = "an all-reduce") -> Sighting:
    return Sighting(rank, HOSTS[rank], position, step, "training", False, collective, True)


def computes(rank: int, position: int = 80, step: int = 9, phase: str = "training") -> Sighting:
    return Sighting(rank, HOSTS[rank], position, step, phase, phase != "training", None, False)


def blamed(*sightings: Sighting) -> Any:
    return find_hang({one.rank: one for one in sightings}, HOSTS)


def test_who_computes_while_the_others_wait_is_missing() -> None:
    hang = blamed(waits(0), waits(1), computes(2), waits(3))
    assert [one.rank for one in hang.missing] == [2]
    assert hang.is_certain
    assert hang.sentence == "rank 2 on n2 (computing, in training, step 9) has not come to an all-reduce of step 9, where 3 of the other ranks wait"


def test_who_says_nothing_is_missing_and_another_rank_of_the_node_may_know_why() -> None:
    hang = blamed(waits(0), waits(1), unheard(2, "n2", "T (stopped)"))
    assert [(one.rank, one.state) for one in hang.missing] == [(2, "T (stopped)"), (3, "")]
    assert "rank 2 on n2 (no sign of life, its process is T (stopped)); rank 3 on n2 (no sign of life) have not come" in hang.sentence


def test_a_backward_pass_that_sends_gradients_is_behind_those_that_wait_for_them() -> None:
    sends = replace(computes(1), position=79, collective="the start of the reduction of the gradients")
    hang = blamed(waits(0), sends, waits(2), waits(3))
    assert [one.rank for one in hang.missing] == [1]


def test_a_rank_that_waits_in_an_earlier_collective_is_behind() -> None:
    hang = blamed(waits(0), waits(1, 79, collective="a broadcast"), waits(2), waits(3))
    assert [one.rank for one in hang.missing] == [1]
    assert "rank 1 on n1 (in a broadcast, step 9)" in hang.sentence


def test_with_all_there_nobody_is_missing() -> None:
    hang = blamed(*(waits(rank) for rank in range(4)))
    assert (hang.missing, hang.num_waiting) == ((), 4)
    assert "all 4 ranks are in an all-reduce of step 9, and it does not end" in hang.sentence


def test_a_long_validation_or_checkpoint_is_no_hang_until_the_time_out_is_near() -> None:
    assert blamed(*(computes(rank, phase="validation") for rank in range(4))) is None
    saves = computes(0, phase="copying the checkpoint aside")
    assert not blamed(saves, waits(1), waits(2), waits(3)).is_certain
    assert blamed(saves, waits(1), waits(2), computes(3)).is_certain


def test_where_nobody_waits_those_that_get_nowhere_are_named() -> None:
    hang = blamed(computes(0), computes(1), computes(2), computes(3))
    assert hang.collective is None
    assert hang.sentence.startswith("nobody gets anywhere in step 9: rank 0 on n1")


@pytest.mark.parametrize(("timeout_s", "fraction"), [(600, 0.5), (10, 0.5), (600, 0.8), (60, 0.95), (7200, 0.1)])
def test_all_is_said_before_the_time_out(timeout_s: float, fraction: float) -> None:
    when = limits(timeout_s, fraction)
    assert when.speak_s == fraction * timeout_s
    assert when.speak_s + 3 * when.pause_s <= when.patient_s < timeout_s
    assert 0.05 <= when.poll_s <= 5.0


def test_sightings_are_of_this_start_the_last_word_counts_and_going_on_takes_it_back(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    (tmp_path / "logs").mkdir()
    words = [
        record(waits(0), start_id="old"),
        record(waits(0, 77), start_id="new"),
        record(waits(1), start_id="new"),
        record(unheard(0, "n1", "S (sleeping)"), start_id="new"),
        record(waits(1), start_id="new", went_on=True),
    ]
    sightings_file(run_dir, 0).write_text("".join(json.dumps(word) + "\n" for word in words) + '{"start": "new", "went')
    assert read_sightings(run_dir, [0, 1], start_id="new") == {0: waits(0, 77)}
    with sightings_file(run_dir, 0).open("a") as file:  # a line of another rank stands behind the half
        file.write("}\n" + json.dumps(record(waits(2), start_id="new")) + "\n")
    assert read_sightings(run_dir, [0, 1], start_id="new") == {0: waits(0, 77), 2: waits(2)}


def test_a_watch_that_fails_says_so_and_the_rank_trains_on(tmp_path, monkeypatch, caplog) -> None:
    (tmp_path / "logs").mkdir()
    monkeypatch.setattr("prottrans_hpc.train.watchdog.HERE", whereabouts.Whereabouts("training", step=9))
    monkeypatch.setattr(Watchdog, "_watch_hang", lambda self, since: [][0])
    with Watchdog(RunDir(tmp_path), [Place("n1", 0, os.getpid())], 0, start_id="start", limits=Limits(0.0, 0.1, 0.3, 60.0)) as watchdog:
        watchdog._thread.join(60)
    assert "nobody watches this rank any more" in caplog.text
    assert "IndexError" in caplog.text


def wait_for_hang(gang: Any, folder: Path, ranks: list[int]) -> dict[str, Any]:
    """The event that blames these ranks; a busy machine may have been told of before."""
    deadline = time.monotonic() + 240
    while True:
        over = gang.process.poll() is not None
        for event in map(json.loads, (folder / "history.jsonl").read_text().split("\n")[:-1]):
            if event["event"] == "hang" and event["ranks"] == ranks:
                return dict(event)
        assert not over and time.monotonic() < deadline, gang.story()
        time.sleep(0.05)


LONG = ("phases.0.steps=1000000", "validation.every_steps=0", "checkpoint.every_steps=1000000", "parallel.timeout_s=60", "health.hang_fraction=0.05")
"""A rank may get nowhere for 3 seconds."""


@pytest.mark.parametrize(("stopped", "num_nodes", "known"), [(0, 2, "no sign of life)"), (1, 1, "no sign of life, its process is T (stopped))")])
def test_a_stopped_rank_is_named(tmp_path, make_run, start_ranks, prottrans, stopped, num_nodes, known) -> None:
    """Rank 0 as well, whose process holds the store and the records: then another node's rank tells. One of the same node knows more."""
    folder = make_run(tmp_path / "run", *LONG, num_ranks=2)
    gang = start_ranks(folder, 2, num_nodes=num_nodes)
    assert gang.wait_for_step(2)
    gang.signal_rank(stopped, signal.SIGSTOP)
    event = wait_for_hang(gang, folder, [stopped])
    assert (event["hosts"], event["num_waiting"]) == ([os.uname().nodename], 1)
    assert event["collective"]
    gang.kill()
    assert f"hang: rank {stopped} on {os.uname().nodename} ({known}" in prottrans("runs", "show", str(folder)).stdout


def test_a_rank_that_stands_still_leaves_its_stacks_and_the_other_ends_with_75(tmp_path, make_run, start_ranks, history) -> None:
    folder = make_run(tmp_path / "run", *LONG[:3], "parallel.timeout_s=12", "health.hang_fraction=0.3", num_ranks=2)
    gang = start_ranks(folder, 2, main=STUCK, env={"STUCK": json.dumps({"rank": 1, "step": 4, "seconds": 600})})
    assert gang.wait_for_step(2)
    event = wait_for_hang(gang, folder, [1])
    assert event["step"] == 4
    assert "(computing, in training, step 4) has not come to the reduction of the gradients of step 4" in event["what"]
    (stacks,) = (folder / "logs").glob("stacks-*.txt")
    text = stacks.read_text()
    assert "rank 1 on" in text and "in stand_still" in text and "stuck_rank.py" in text
    assert "gloo:all_reduce" in text  # of torch's flight recorder
    deadline = time.monotonic() + 240
    while history(folder)[-1]["event"] != "stop":
        assert time.monotonic() < deadline, gang.story()
        time.sleep(0.05)
    assert history(folder)[-1]["exit_code"] == 75
    gang.kill()


def test_a_long_validation_is_no_hang(tmp_path, make_run, start_ranks, history) -> None:
    """It takes longer than a rank may stand still in a step, and shorter than the time-out."""
    folder = make_run(tmp_path / "run", "parallel.timeout_s=120", "health.hang_fraction=0.025", num_ranks=2, stop_after_step=5)
    gang = start_ranks(folder, 2, main=STUCK, env={"STUCK": json.dumps({"rank": 1, "step": 4, "seconds": 8, "in": "validation"})})
    gang.end(0)
    assert not [event for event in history(folder) if event["event"] == "hang" and "validation" in event["what"]]
    assert not list((folder / "logs").glob("stacks-*"))
    assert "goes on after" in (folder / "logs" / "node-0000.log").read_text()


def test_code_that_keeps_the_interpreters_lock_is_shown_in_the_log_and_the_rank_goes_on(tmp_path, make_run, start_ranks, history) -> None:
    settings = ("validation.every_steps=0", "parallel.timeout_s=120", "health.hang_fraction=0.025")
    folder = make_run(tmp_path / "run", *settings, num_ranks=1, stop_after_step=5)
    start_ranks(folder, 1, main=STUCK, env={"STUCK": json.dumps({"rank": 0, "step": 4, "seconds": 8, "holding": True})}).end(0)
    log = (folder / "logs" / "node-0000.log").read_text()
    assert re.search(r"Stack \(most recent call first\):\n(.*\n)*?.*in stand_still", log)
    assert (history(folder)[-1]["event"], history(folder)[-1]["step"]) == ("stop", 5)


def test_a_rank_that_is_alone_and_stands_still_is_ended_with_75_and_the_next_start_goes_on(tmp_path, make_run, start_ranks, history, prottrans) -> None:
    settings = ("validation.every_steps=0", "checkpoint.every_steps=2", "parallel.timeout_s=12", "health.hang_fraction=0.3")
    folder = make_run(tmp_path / "run", *settings, num_ranks=1, stop_after_step=6)
    start_ranks(folder, 1, main=STUCK, env={"STUCK": json.dumps({"rank": 0, "step": 4, "seconds": 600})}).end(75)
    hang, stop = [event for event in history(folder) if event["event"] in ("hang", "stop")]
    assert (hang["ranks"], stop["step"], stop["exit_code"]) == ([0], 3, 75)
    assert "the only rank got nowhere for" in stop["cause"] and "step 4" in stop["cause"]
    (stacks,) = (folder / "logs").glob("stacks-*.txt")
    assert stacks.read_text().count("in stand_still") >= 2, "when it is told of, and at its end"
    assert "the only rank got nowhere" in prottrans("runs", "show", str(folder)).stdout
    start_ranks(folder, 1).end(0)
    assert (history(folder)[-1]["event"], history(folder)[-1]["step"]) == ("stop", 6)


@pytest.mark.parametrize(
    ("num_ranks", "is_patient", "went_on_after_s", "ends"), [(1, False, 0.0, True), (1, True, 0.0, False), (2, False, 0.0, False), (1, False, 60.0, False)]
)
def test_only_a_rank_that_is_alone_and_should_have_moved_is_ended(tmp_path, monkeypatch, num_ranks, is_patient, went_on_after_s, ends) -> None:
    (tmp_path / "logs").mkdir()
    codes: list[int] = []
    here = whereabouts.Whereabouts("training", is_patient=is_patient, step=9)
    monkeypatch.setattr("prottrans_hpc.train.watchdog.HERE", here)

    def end(code: int) -> None:
        codes.append(code)
        watchdog._over.wait()

    monkeypatch.setattr("prottrans_hpc.train.watchdog.os._exit", end)
    places = [Place("n1", 0, os.getpid())] * num_ranks
    watchdog = Watchdog(RunDir(tmp_path), places, 0, start_id="start", limits=Limits(0.0, 0.1, 0.3, 0.2))
    watchdog._longest_s = went_on_after_s
    with watchdog:
        deadline = time.monotonic() + (300 if ends else 1)
        while not codes and time.monotonic() < deadline:
            time.sleep(0.01)
    watchdog._thread.join()  # were it late, it would end the tests for real once this one is over
    assert codes == ([75] if ends else [])
