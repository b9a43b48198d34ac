"""The background thread: order, exceptions, waiting and ending; nothing here may hang."""

import threading
import time
from itertools import count

import pytest

from prottrans_hpc.train.prefetch import Prefetcher

pytestmark = pytest.mark.timeout(60)


def running():
    return [thread for thread in threading.enumerate() if thread.name == "tested"]


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert not running()


def test_items_come_in_order_and_end():
    with Prefetcher(iter(range(100)), depth=3, name="tested") as items:
        assert list(items) == list(range(100))
        with pytest.raises(StopIteration):
            next(items)


def test_it_runs_ahead_by_its_depth_and_no_further():
    made, third = [], threading.Event()

    def source():
        for number in count():
            made.append(number)
            if number == 3:
                third.set()
            yield number

    with Prefetcher(source(), depth=3, name="tested") as items:
        assert third.wait(30)
        time.sleep(0.3)
        # Three are ready and one waits in the thread's hand.
        assert made == [0, 1, 2, 3]
        assert next(items) == 0


def test_an_exception_arrives_behind_the_items_before_it_and_stays():
    def source():
        yield 1
        raise ValueError("shard 7 is damaged")

    with Prefetcher(source(), depth=2, name="tested") as items:
        assert next(items) == 1
        for _ in range(2):
            with pytest.raises(ValueError, match="shard 7"):
                next(items)


def test_even_an_exit_in_the_thread_reaches_the_consumer():
    def source():
        yield 1
        raise SystemExit(3)

    with Prefetcher(source(), depth=1, name="tested") as items:
        assert next(items) == 1
        with pytest.raises(SystemExit):
            next(items)


def test_closing_ends_a_thread_that_waits_for_room():
    items = Prefetcher(count(), depth=1, name="tested")
    assert next(items) == 0
    items.close()
    items.close()
    assert not running()
    with pytest.raises(StopIteration):
        next(items)


def test_closing_waits_for_the_item_in_work_and_releases_the_source():
    released = threading.Event()

    def source():
        try:
            for number in count():
                time.sleep(0.2)
                yield number
        finally:
            released.set()

    items = Prefetcher(source(), depth=1, name="tested")
    next(items)
    items.close()
    assert released.wait(60)


def test_a_consumer_that_fails_leaves_no_thread():
    with pytest.raises(RuntimeError, match="model"), Prefetcher(count(), depth=2, name="tested") as items:
        next(items)
        raise RuntimeError("model")


def test_the_wait_is_measured():
    gate = threading.Event()

    def source():
        yield "early"
        gate.wait(30)
        yield "late"

    with Prefetcher(source(), depth=2, name="tested") as items:
        next(items)
        threading.Timer(0.5, gate.set).start()
        assert next(items) == "late"
        assert items.wait_s > 0.2
        assert items.wait_s < 30
