"""What a round hands over to a batch system, and when, over refusals and stops; the batch system is a list."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from prottrans_hpc.errors import FarmError, SubmitError
from prottrans_hpc.launch import farm_executors, farm_round
from prottrans_hpc.launch.farm_files import FarmFiles
from prottrans_hpc.launch.farm_plan import FarmPlan
from prottrans_hpc.launch.farm_round import Round
from prottrans_hpc.machine import read_machine
from prottrans_hpc.stage import Item


class Queue:
    """Jobs that are done when the test says so."""

    query_every_s = 0.0

    def __init__(self, max_submitted: int) -> None:
        self.max_submitted = max_submitted
        self.arrays: list[list[list[str]]] = []
        self.gone: set[str] = set()
        self.refuses = False
        self.complaint: str | None = None
        self.largest = 0

    def submit(self, commands: Sequence[Sequence[str]]) -> list[str]:
        if self.refuses:
            raise SubmitError("cannot submit the jobs of the farm: the queue is full")
        self.arrays.append([list(command) for command in commands])
        return [f"{len(self.arrays)}_{index}" for index in range(len(commands))]

    def alive(self, job_ids: Sequence[str]) -> Mapping[str, bool]:
        return {job_id: job_id not in self.gone for job_id in job_ids}

    def cancel(self, job_ids: Sequence[str]) -> str | None:
        if self.complaint is None:
            self.gone |= set(job_ids)
        return self.complaint

    def end(self, array: int, element: int, code: int) -> None:
        """As farm_item does."""
        folder, number, attempt, token = self.arrays[array][element][-4:]
        files = FarmFiles(Path(folder))
        job = json.loads(files.job(int(number)).read_text())
        assert job["token"] == token
        if code == 0:
            output(files.folder, int(number)).touch()
        files.outcome(int(number), int(attempt), token).write_text(json.dumps({"code": code}))
        self.gone.add(f"{array + 1}_{element}")


def output(folder: Path, number: int) -> Path:
    return folder / f"output-{number}"


def make_round(folder: Path, *, num_jobs: int, num_at_once: int) -> Round:
    plan = FarmPlan(read_machine("slurm_cluster"), folder, "name", num_jobs, num_at_once)
    files = FarmFiles(folder / "x")
    files.prepare()
    return Round(plan, "x", files, [[Item("stage", {}, output(files.folder, number))] for number in range(num_jobs)])


def step(round_: Round, queue: Queue) -> None:
    """One turn of Round.work."""
    round_._submit(queue)
    round_._look(queue.alive(round_._submitted_ids()), lambda amount: None)


def states(folder: Path) -> list[str]:
    return [job["state"] for job in json.loads((folder / "x" / "farm.json").read_text())["jobs"]]


def test_one_array_is_in_the_queue_at_a_time_but_for_what_has_a_place_beside_it(tmp_path):
    queue = Queue(max_submitted=4)
    work = make_round(tmp_path, num_jobs=9, num_at_once=2)
    for _ in range(3):
        step(work, queue)
    assert [len(array) for array in queue.arrays] == [4]
    assert states(tmp_path) == ["submitted"] * 4 + ["waiting"] * 5
    for element in (0, 1):
        queue.end(0, element, 0)
    for _ in range(3):
        step(work, queue)
    assert len(queue.arrays) == 1
    for element in (2, 3):
        queue.end(0, element, 0)
    for _ in range(3):
        step(work, queue)
    assert [len(array) for array in queue.arrays] == [4, 4]
    # Three end, one of them to be run again: one node is idle, but two jobs wait.
    for element, code in enumerate((0, 0, 71)):
        queue.end(1, element, code)
    for _ in range(3):
        step(work, queue)
    assert len(queue.arrays) == 2
    queue.end(1, 3, 0)
    for _ in range(3):
        step(work, queue)
    assert [len(array) for array in queue.arrays] == [4, 4, 2]


def test_a_failed_job_is_run_again_at_once_where_its_node_is_free(tmp_path):
    queue = Queue(max_submitted=1_000)
    work = make_round(tmp_path, num_jobs=4, num_at_once=4)
    step(work, queue)
    queue.end(0, 2, 71)
    for _ in range(2):
        step(work, queue)
    assert [len(array) for array in queue.arrays] == [4, 1]
    assert queue.arrays[1][0][-3:-1] == ["2", "2"]


def test_what_was_accepted_is_known_though_the_next_array_is_refused(tmp_path, monkeypatch):
    queue = Queue(max_submitted=2)
    work = make_round(tmp_path, num_jobs=3, num_at_once=3)
    step(work, queue)
    queue.refuses = True
    queue.end(0, 0, 0)
    for _ in range(3):
        step(work, queue)
    assert states(tmp_path) == ["done", "submitted", "waiting"]
    queue.refuses = False
    step(work, queue)
    assert states(tmp_path) == ["done", "submitted", "submitted"]
    # One that refuses for ever ends the command, with what it says.
    queue.refuses = True
    queue.end(1, 0, 71)
    monkeypatch.setattr(farm_round, "_MAX_REFUSALS", 3)
    with pytest.raises(SubmitError, match="the queue is full"):
        for _ in range(20):
            step(work, queue)


def test_a_refusal_of_the_first_jobs_ends_the_command(tmp_path):
    queue = Queue(max_submitted=2)
    queue.refuses = True
    with pytest.raises(SubmitError, match="the queue is full"):
        step(make_round(tmp_path, num_jobs=3, num_at_once=3), queue)
    assert states(tmp_path) == ["submitting", "submitting", "waiting"]
    assert make_round(tmp_path, num_jobs=3, num_at_once=3).jobs[0].state == "waiting"


def test_a_later_round_waits_until_the_jobs_of_the_one_before_have_left_the_queue(tmp_path):
    step(make_round(tmp_path, num_jobs=1, num_at_once=1), Queue(max_submitted=2))
    (tmp_path / "x").rename(tmp_path / "before")
    queue = Queue(max_submitted=2)
    queue.refuses = True
    work = make_round(tmp_path, num_jobs=1, num_at_once=1)
    step(work, queue)
    assert states(tmp_path) == ["waiting"]
    queue.refuses = False
    step(work, queue)
    assert states(tmp_path) == ["submitted"]


@pytest.mark.parametrize("complaint", [None, "scancel does not answer"])
def test_jobs_that_were_asked_to_end_are_waited_for_by_the_next_start(tmp_path, complaint, capsys):
    queue = Queue(max_submitted=2)
    queue.complaint = complaint
    work = make_round(tmp_path, num_jobs=3, num_at_once=3)
    step(work, queue)
    work.open = queue
    work.stop()
    assert ("scancel does not answer" in capsys.readouterr().err) == (complaint is not None)
    assert states(tmp_path) == ["submitted", "submitted", "waiting"]
    later = make_round(tmp_path, num_jobs=3, num_at_once=3)
    later._submit(queue)
    assert [len(array) for array in queue.arrays] == [2]
    if complaint is not None:
        for element in (0, 1):
            queue.end(0, element, 75)
    for _ in range(3):
        step(later, queue)
    assert [len(array) for array in queue.arrays] == [2, 2]
    # That they were cancelled is no failure of theirs.
    assert [job.codes for job in later.jobs] == [[], [], []]


def test_the_sizes_of_arrays(monkeypatch):
    machine = read_machine("summit")
    assert farm_executors.largest_array(machine) == 100
    assert farm_executors.largest_array(replace(machine, max_queued_jobs=None)) == 1_000
    assert farm_executors.largest_array(replace(machine, max_queued_jobs=5_000)) == 1_000


def test_a_job_that_fails_too_often_fails_for_good(tmp_path):
    queue = Queue(max_submitted=4)
    work = make_round(tmp_path, num_jobs=1, num_at_once=1)
    end = time.monotonic() + 60
    while work._is_going_on():
        assert time.monotonic() < end
        step(work, queue)
        if not queue.gone.issuperset(work._submitted_ids()):
            queue.end(len(queue.arrays) - 1, 0, 71)
    with pytest.raises(FarmError, match="exit code 71"):
        work.raise_failures()
    assert len(queue.arrays) == 3
