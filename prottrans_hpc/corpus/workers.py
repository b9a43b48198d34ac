"""Processes of this computer that do tasks, each at the end of a pipe of its own.

A process that dies closes its pipe, even half way through an answer, so nobody waits for the dead. (The workers of
concurrent.futures share one pipe and its lock: one that is killed while it answers leaves the others, and the
command, waiting for ever.)
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any, TypeVar

from ..errors import ProttransError, ResourceError

Task = TypeVar("Task")
Result = TypeVar("Result")
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class _Worker:
    process: SpawnProcess
    pipe: Connection


class Workers:
    """Up to `num_workers` processes, started (spawned, so that no state of ours is copied into them) as they are needed."""

    def __init__(self, num_workers: int) -> None:
        self._num_workers = num_workers
        self._workers: list[_Worker] = []

    def run(self, function: Callable[[Task], Result], tasks: Sequence[Task]) -> Iterator[tuple[int, Result]]:
        """(number of the task, `function` of it) as tasks end. Raises what a task raised; ResourceError: a worker died."""
        waiting = enumerate(tasks)
        busy: dict[Connection, int] = {}

        def hand_out(pipe: Connection) -> None:
            for i, task in waiting:
                with _died_is_an_error():
                    pipe.send((function, task))
                busy[pipe] = i
                return

        try:
            for worker in self._at_least(min(self._num_workers, len(tasks))):
                hand_out(worker.pipe)
            while busy:
                for pipe in wait(list(busy)):
                    assert isinstance(pipe, Connection)
                    with _died_is_an_error():
                        answer = pipe.recv()
                    i = busy.pop(pipe)
                    if isinstance(answer, Exception):
                        raise answer
                    hand_out(pipe)
                    yield i, answer[0]
        except BaseException:
            self.close(kill=True)  # their answers would be taken for those of the next tasks
            raise

    def _at_least(self, number: int) -> list[_Worker]:
        context = multiprocessing.get_context("spawn")
        while len(self._workers) < number:
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, os.getpid()), daemon=True)
            process.start()
            theirs.close()  # the last copy must be the worker's: its death is then the end of the pipe
            self._workers.append(_Worker(process, ours))
        return self._workers

    def close(self, *, kill: bool) -> None:
        """End the workers; `kill` does not wait for what they are doing."""
        for worker in self._workers:
            if kill:
                worker.process.kill()
            worker.pipe.close()
        for worker in self._workers:
            worker.process.join()
        self._workers = []


@contextlib.contextmanager
def _died_is_an_error() -> Iterator[None]:
    try:
        yield
    except (EOFError, OSError) as error:  # OSError also where half a message has come
        raise ResourceError(
            "a worker process died before its work was done: killed, or out of memory (see the kernel's log); "
            "run the same command again, with fewer --workers if memory was short"
        ) from error


def _work(pipe: Connection, parent: int) -> None:
    _die_with_parent(parent)
    with contextlib.suppress(EOFError, OSError):  # we are no longer wanted
        while True:
            function, task = pipe.recv()
            pipe.send(_answer(function, task))


def _answer(function: Callable[[Any], Any], task: Any) -> tuple[Any] | Exception:
    try:
        return (function(task),)
    except Exception as error:
        found = sendable(error)
        found.add_note(f"in a worker process:\n{traceback.format_exc()}")
        return found


def _die_with_parent(parent: int) -> None:
    # Workers of a killed command would finish what they do first. Linux only; elsewhere nothing is lost but this.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    # The main process decides what an interrupt means, and ends us.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def sendable(error: Exception) -> Exception:
    """The error itself where it can travel between processes, else its text under the same exit code."""
    if isinstance(error, (ProttransError, OSError, MemoryError)):
        error.__cause__ = None
        return error
    return RuntimeError(f"{type(error).__name__}: {error}")
