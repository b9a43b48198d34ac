"""Processes that do tasks: in any order, and never a hang where one dies."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from prottrans_hpc.corpus.workers import Workers
from prottrans_hpc.errors import DataError, ResourceError

pytestmark = pytest.mark.timeout(180)


def double(number: int) -> int:
    return 2 * number


def die(number: int) -> int:
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.05)
    return number


def die_half_way_through_the_answer(number: int) -> bytes:
    if number == 0:
        return b""
    time.sleep(0.3)
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGKILL)).start()
    return bytes(50_000_000)


def fail(number: int) -> int:
    if number == 3:
        raise DataError("number 3 is bad")
    if number == 4:
        raise BrokenPipeError("of the task's own")
    time.sleep(0.05)
    return number


@pytest.fixture
def workers() -> Iterator[Workers]:
    found = Workers(2)
    yield found
    found.close(kill=True)


def test_every_task_is_answered_once(workers: Workers) -> None:
    for _ in range(2):  # the same processes serve again
        assert sorted(workers.run(double, range(20))) == [(number, 2 * number) for number in range(20)]


def test_no_more_processes_than_tasks(workers: Workers) -> None:
    assert list(workers.run(double, [4])) == [(0, 8)]
    assert len(workers._workers) == 1


def test_a_dead_worker_is_an_error(workers: Workers) -> None:
    with pytest.raises(ResourceError, match="a worker process died"):
        list(workers.run(die, range(10)))


def test_a_worker_that_dies_half_way_through_its_answer_is_an_error(workers: Workers) -> None:
    list(workers.run(double, range(2)))
    answers = workers.run(die_half_way_through_the_answer, range(2))
    assert next(answers) == (0, b"")
    workers._workers[1].process.join()  # it answered for as long as the pipe took it, and was killed
    with pytest.raises(ResourceError, match="a worker process died"):
        next(answers)


def test_the_error_of_a_task_is_raised_here_and_says_where_it_was(workers: Workers) -> None:
    with pytest.raises(DataError, match="number 3 is bad") as caught:
        list(workers.run(fail, range(4)))
    assert "in a worker process" in caught.value.__notes__[0]
    assert "in fail" in caught.value.__notes__[0]
    with pytest.raises(BrokenPipeError, match="of the task's own"):
        list(workers.run(fail, range(4, 6)))


def test_after_an_error_no_old_answer_is_taken_for_a_new_one(workers: Workers) -> None:
    with pytest.raises(DataError):
        list(workers.run(fail, [0, 1, 3, 2]))
    assert sorted(workers.run(double, range(3))) == [(0, 0), (1, 2), (2, 4)]
