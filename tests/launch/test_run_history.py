"""The story of a run, from events as the trainer and the job scripts write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from prottrans_hpc.launch.run_history import Now, Start, Story, read_story, tell
from prottrans_hpc.launch.run_tables import ending, history_lines
from prottrans_hpc.run_dir import RunDir

OVER = Now(is_alive=False, step=0, saved_step=0)


def at(minute: float) -> str:
    return f"2026-01-01T10:{int(minute):02d}:{int(minute % 1 * 60):02d}.000Z"


def start(minute: float, step: int, **details: Any) -> dict[str, Any]:
    return {"time": at(minute), "event": "start", "step": step, "world_size": 4, "num_nodes": 2, **details}


def stop(minute: float, step: int, cause: str, code: int) -> dict[str, Any]:
    return {"time": at(minute), "event": "stop", "step": step, "cause": cause, "exit_code": code, "world_size": 4}


def job(minute: float, event: str, job_id: str, restart: int = 0, **details: Any) -> dict[str, Any]:
    return {"time": at(minute), "event": event, "job_id": job_id, "restart": restart, **details}


def the_only(story: Story) -> Start:
    (only,) = story.starts
    return only


def test_a_run_that_was_never_started_has_no_story(tmp_path: Path) -> None:
    assert read_story(RunDir(tmp_path), OVER) == Story((), 0, 0, 0.0, 0.0)
    assert history_lines(tell([], [], OVER)) == ["no start is recorded yet"]


def test_one_start_that_came_to_its_end() -> None:
    row = the_only(tell([start(0, 0), stop(30, 100, "done", 0)], [], Now(False, 100, 100)))
    assert (row.step, row.stop_step, row.cause, row.steps_lost) == (0, 100, "done", 0)
    assert (row.node_hours, row.node_hours_wasted) == (1.0, 0.0)
    assert ending(row) == "done"


def test_a_kill_leaves_no_word_and_the_next_start_tells_what_it_cost() -> None:
    lost = {"steps_lost": 7, "lost_s": 90.0, "last_step_at": at(15)}
    story = tell([start(0, 0, steps_lost=0, lost_s=0.0, last_step_at=None), start(20, 50, **lost), stop(50, 100, "done", 0)], [], Now(False, 100, 100))
    killed, second = story.starts
    assert ending(killed) == "killed: it left no word"
    assert (killed.stop_step, killed.steps_lost, killed.ended, killed.node_hours) == (57, 7, at(15), 0.5)
    assert killed.node_hours_wasted == pytest.approx(90 * 2 / 3600)
    assert (story.num_restarts, story.steps_lost, second.node_hours_wasted) == (1, 7, 0.0)


def test_a_kill_that_nothing_followed_yet_is_told_from_what_there_is() -> None:
    row = the_only(tell([start(0, 0)], [], Now(False, 57, 50, last_step_at=at(15), lost_s=90.0, exit_code=137)))
    assert (row.stop_step, row.steps_lost, row.exit_code, row.ended) == (57, 7, 137, at(15))
    assert ending(row) == "killed: it left no word (exit code 137)"
    assert row.node_hours_wasted == pytest.approx(90 * 2 / 3600)


def test_a_start_at_work_is_no_kill_but_a_dead_one_before_a_queued_job_is() -> None:
    assert ending(the_only(tell([start(0, 0)], [], Now(True, 5, 0)))) == "at work"
    assert ending(the_only(tell([start(0, 0)], [], Now(False, 5, 0)))) == "killed: it left no word"


def test_histories_of_older_versions_tell_steps_lost_by_where_the_next_start_begins() -> None:
    first = tell([start(0, 0), stop(9, 57, "NumericsError: not finite", 76), start(20, 50)], [], Now(True, 55, 50)).starts[0]
    assert first.steps_lost == 7


def test_the_number_of_nodes_follows_from_the_ranks_where_it_is_not_recorded() -> None:
    old = {"time": at(0), "event": "start", "step": 0, "world_size": 12}
    assert the_only(tell([old], [], Now(False, 5, 5, ranks_per_node=6))).num_nodes == 2


CHAIN_JOBS = [
    job(0, "submitted", "1", number=1, of=2),
    job(0, "submitted", "2", number=2, of=2),
    job(1, "begun", "1", nodes=["n1", "n2"], hostname="n1", step=0),
    job(22, "ended", "1", code=75, cause="SIGUSR1", step=40, num_nodes=2, elapsed_s=1260),
    job(22.5, "requeued", "1", reason="preempted: it makes room for another job"),
    job(25, "begun", "1", 1, nodes=["n3", "n4"], hostname="n3", step=40),
    job(41, "taken_over", "2", from_job_id="1", from_restart=1, ended="NODE_LOST", cause="lost node n4", lost_nodes=["n4"], step=50),
    job(41, "begun", "2", nodes=["n5", "n6", "n7"], hostname="n5", step=50),
    job(59, "ended", "2", code=76, cause="the training diverged", step=60, num_nodes=3, elapsed_s=1080, in_vain="exit code 76"),
    job(59, "cancelled_rest", "2", cancelled=["3"], not_cancelled=[], reason="exit code 76 (the training diverged)"),
]
CHAIN_HISTORY = [
    start(2, 0, steps_lost=0, lost_s=0, last_step_at=None),
    stop(21, 40, "SIGUSR1", 75),
    start(28, 40, steps_lost=0, lost_s=0, last_step_at=at(20)),
    start(43, 50, steps_lost=8, lost_s=240.0, last_step_at=at(38), num_nodes=3),
    {"time": at(50), "event": "went back", "step": 64, "to": 60, "cause": "non-finite loss or gradients"},
    stop(58, 64, "NumericsError: not finite", 76),
]


def test_a_chain_with_a_preemption_a_lost_node_and_a_divergence() -> None:
    story = tell(CHAIN_HISTORY, CHAIN_JOBS, Now(False, 64, 60, last_step_at=at(57), lost_s=60.0, exit_code=76, ranks_per_node=2))
    preempted, lost, diverged = story.starts
    assert [(row.job_id, row.restart, row.nodes[0], row.num_nodes) for row in story.starts] == [("1", 0, "n1", 2), ("1", 1, "n3", 2), ("2", 0, "n5", 3)]
    assert [(row.step, row.stop_step, row.steps_lost) for row in story.starts] == [(0, 40, 0), (40, 58, 8), (50, 64, 4)]
    assert ending(preempted) == "SIGUSR1 (exit code 75)"
    assert preempted.notes == ["requeued: reason preempted: it makes room for another job"]
    assert ending(lost) == "lost node n4"
    assert ending(diverged) == "the training diverged (NumericsError: not finite) (exit code 76)"
    assert diverged.notes[0] == "went back from step 64 to 60: non-finite loss or gradients"
    assert "exit code 76" in diverged.notes[1] and diverged.notes[1].startswith("cancelled rest")
    # Two nodes from the last step at 10:20 to the end at 10:22, then two nodes from 10:25 until the training goes on at 10:28.
    assert preempted.node_hours_wasted == pytest.approx((2 * 2 + 3 * 2) / 60)
    # Four minutes of steps on two nodes, nobody knows of a hang; then three nodes from 10:41 to 10:43.
    assert lost.node_hours_wasted == pytest.approx((4 * 2 + 2 * 3) / 60)
    assert diverged.node_hours_wasted == pytest.approx((1 * 3 + 2 * 3) / 60)
    assert preempted.node_hours == pytest.approx(21 * 2 / 60)
    assert story.num_restarts == 2 and story.steps_lost == 12
    lines = history_lines(story)
    assert len(lines) == 1 + 3 + 3 + 1
    assert lines[-1].startswith("2 restarts, 12 steps taken again, ")


def test_the_code_of_a_job_is_the_one_that_its_scheduler_saw() -> None:
    """Rank 0 ends with 75 when it has lost another; the job ends with the code of the one that was killed."""
    jobs = [job(0, "begun", "1", nodes=["n1", "n2"], hostname="n1", step=0), job(6, "ended", "1", code=137, cause="lost rank 1; n2: task 1: Killed", step=0)]
    row = the_only(tell([start(1, 0), stop(5, 9, "lost rank 1", 75)], jobs, Now(False, 9, 0)))
    assert ending(row) == "lost rank 1; n2: task 1: Killed (exit code 137)"


def test_a_job_that_never_came_to_train_is_told() -> None:
    jobs = [
        job(0, "begun", "1", nodes=["n1"], hostname="n1", step=0),
        job(6, "ended", "1", code=70, cause="an error of the program itself", step=0, num_nodes=1, elapsed_s=360),
        job(7, "ended", "2", code=0, cause="nothing was left to do", step=9, num_nodes=1, elapsed_s=0),
        job(8, "refused", "3", reason="in use by job 1"),
    ]
    crashed, idle = tell([], jobs, OVER).starts
    assert (crashed.trains_from, crashed.exit_code, crashed.node_hours_wasted) == (None, 70, 0.1)
    assert (idle.job_id, idle.cause, idle.node_hours) == ("2", "nothing was left to do", 0.0)
    assert idle.notes == ["job 3 refused: reason in use by job 1"]


def test_damaged_lines_and_events_of_other_versions_do_no_harm(tmp_path: Path) -> None:
    directory = RunDir(tmp_path)
    lines = [json.dumps(start(0, 0)), "[]", '"start"', '{"event": 5}', '{"event": "start", "time": null, "step": "x"}', json.dumps(stop(5, 9, "done", 0))]
    directory.history.write_text("\n".join(lines) + '\n{"time": "2026-01-01T1')
    directory.jobs_log.write_text('{"event": "begun"}\nnonsense\n')
    story = read_story(directory, Now(False, 9, 9))
    assert story.starts[-1].stop_step == 9
    assert history_lines(story)


def test_what_went_wrong_stands_below_its_start() -> None:
    slow = {"event": "slow node", "step": 60, "host": "n3", "node": 2, "ranks": [4, 5], "factor": 1.6}
    culprit = {"rank": 3, "host": "n2", "what": "gradient", "parameter": "layers.0.up.weight", "samples": [1, 2, 3, 4, 5]}
    events = [
        {**slow, "time": at(1)},
        {**slow, "time": at(2), "event": "node recovered", "factor": 1.02},
        {"time": at(3), "event": "hang", "step": 70, "what": "rank 1 on n1 has not come"},
        {"time": at(4), "event": "non-finite numbers", "step": 80, "verdict": "numbers", "what": "again", "where": [culprit]},
        {"time": at(5), "event": "went back", "step": 82, "to": 60, "cause": "non-finite loss or gradients"},
    ]
    assert the_only(tell([start(0, 0), *events], [], Now(True, 61, 60))).notes == [
        "step 60: node 2 (n3) is slow, 1.6 times the median: rank 4, 5",
        "step 60: node 2 (n3) is no longer slow, 1.02 times the median",
        "hang: rank 1 on n1 has not come",
        "step 80 skipped, non-finite numbers: again; rank 3 on n2, first layers.0.up.weight, samples 1 2 3 4 ...",
        "went back from step 82 to 60: non-finite loss or gradients",
    ]
