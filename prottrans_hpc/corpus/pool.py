"""Who does the work of `preprocess`: this process, local processes, MPI ranks, or the nodes of a farm
(`task_folder`). The result never depends on it.

The main process hands out lists of independent tasks and gets their results in order. A worker that fails stops
the others and its error is raised; a worker that dies ends the whole command, which never waits for the dead.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import ctypes
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NoReturn, Protocol, TypeVar

from .. import terminal
from ..errors import ProttransError, ResourceError, exit_code, explain, missing_package

Task = TypeVar("Task")
Result = TypeVar("Result")
_PR_SET_PDEATHSIG = 1
SMALL = 16e6
"""Work of less cost (bytes, residues or records) is done before a new process would have started."""


class Pool(Protocol):
    """Runs tasks."""

    @property
    def num_workers(self) -> int:
        """Processes that work at the same time."""

    def run(self, function: Callable[[Task], Result], tasks: Sequence[Task], *, costs: Sequence[float], advance: terminal.Advance) -> list[Result]:
        """`function` of every task, in order; `costs` are what `advance` is told as tasks end. Raises what a task raised."""


class ThisProcess:
    """One worker: ourselves."""

    num_workers = 1

    def run(self, function: Callable[[Task], Result], tasks: Sequence[Task], *, costs: Sequence[float], advance: terminal.Advance) -> list[Result]:
        """See Pool."""
        results = []
        for task, cost in zip(tasks, costs, strict=True):
            results.append(function(task))
            advance(cost)
        return results


class LocalProcesses:
    """Processes of this computer, started afresh (spawned) so that no state of ours is copied into them."""

    def __init__(self, num_workers: int) -> None:
        self.num_workers = num_workers
        context = multiprocessing.get_context("spawn")
        self._executor = concurrent.futures.ProcessPoolExecutor(num_workers, mp_context=context, initializer=_die_with_parent, initargs=(os.getpid(),))

    def run(self, function: Callable[[Task], Result], tasks: Sequence[Task], *, costs: Sequence[float], advance: terminal.Advance) -> list[Result]:
        """See Pool."""
        if len(tasks) < 2 or sum(costs) < SMALL:
            return ThisProcess().run(function, tasks, costs=costs, advance=advance)
        try:
            futures = [self._executor.submit(function, task) for task in tasks]
            cost_of = dict(zip(futures, costs, strict=True))
            for future in concurrent.futures.as_completed(futures):
                future.result()
                advance(cost_of[future])
            return [future.result() for future in futures]
        except BrokenProcessPool as error:
            raise ResourceError(
                "a worker process died before its work was done: killed, or out of memory (see the kernel's log); "
                "run the same command again, with fewer --workers if memory was short"
            ) from error

    def close(self, *, kill: bool) -> None:
        """End the workers; `kill` does not wait for what they are doing."""
        workers = list((self._executor._processes or {}).values())  # no public way to end a running task before 3.14
        if kill:
            for worker in workers:
                worker.kill()
        self._executor.shutdown(cancel_futures=True)


def _die_with_parent(parent: int) -> None:
    # Workers of a killed command would wait for tasks for ever. Linux only; elsewhere nothing is lost but this.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    # The main process decides what an interrupt means, and ends us.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class MpiRanks:
    """The ranks that mpirun or srun started: rank 0 hands out the tasks, by cost, and does its share."""

    def __init__(self, comm: Any, stop_file: Path) -> None:
        self._comm = comm
        self._stop_file = stop_file
        self.num_workers = int(comm.size)

    def run(self, function: Callable[[Task], Result], tasks: Sequence[Task], *, costs: Sequence[float], advance: terminal.Advance) -> list[Result]:
        """See Pool."""
        shares = deal(costs, self.num_workers)
        self._comm.bcast((function, [[(i, tasks[i]) for i in share] for share in shares], str(self._stop_file)))
        done, failure = _run_share(function, [(i, tasks[i]) for i in shares[0]], self._stop_file, lambda i: advance(costs[i]))
        gathered = self._comm.gather((done, failure))
        failures = [failure for _, failure in gathered if failure is not None]
        if failures:
            raise min(failures, key=lambda failure: failure[0])[1]
        results = {i: result for done, _ in gathered for i, result in done}
        for share in shares[1:]:
            advance(sum(costs[i] for i in share))
        return [results[i] for i in range(len(tasks))]

    def close(self, code: int) -> None:
        """Let the other ranks go, with the exit code of this one."""
        self._comm.bcast(code)


def deal(costs: Sequence[float], num_workers: int) -> list[list[int]]:
    """Share tasks out, the costliest first, each to the worker with the least so far; a worker's tasks are in order."""
    shares: list[list[int]] = [[] for _ in range(num_workers)]
    loads = [0.0] * num_workers
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        worker = loads.index(min(loads))
        shares[worker].append(i)
        loads[worker] += costs[i] or 1.0
    return [sorted(share) for share in shares]


def _run_share(
    function: Callable[[Any], Any], share: list[tuple[int, Any]], stop_file: Path, advance: Callable[[int], None]
) -> tuple[list[tuple[int, Any]], tuple[int, Exception] | None]:
    """Our tasks' results, or the first error, on which the other ranks are told to stop by a file that all can see."""
    done: list[tuple[int, Any]] = []
    for i, task in share:
        if stop_file.exists():
            break
        try:
            done.append((i, function(task)))
        except Exception as error:
            with contextlib.suppress(OSError):
                stop_file.touch()
            return done, (i, _sendable(error))
        advance(i)
    return done, None


def _sendable(error: Exception) -> Exception:
    """The error itself where it can travel between ranks, else its text under the same exit code."""
    if isinstance(error, (ProttransError, OSError, MemoryError)):
        error.__cause__ = None
        return error
    return RuntimeError(f"{type(error).__name__}: {error}")


def _serve(comm: Any) -> NoReturn:
    """A rank other than 0: work until told to stop, and end with the exit code of the whole."""
    try:
        while not isinstance(message := comm.bcast(None), int):
            function, shares, stop_file = message
            comm.gather(_run_share(function, shares[comm.rank], Path(stop_file), lambda i: None))
    except BaseException as error:
        # The others wait for us in a collective that we shall never join.
        terminal.warn(f"rank {comm.rank}: {explain(error)}")
        comm.Abort(exit_code(error))
    raise SystemExit(message)


@contextlib.contextmanager
def open_pool(*, workers: int, mpi: bool, stop_file: Path) -> Iterator[Pool]:
    """The workers that the user asked for. Under MPI only rank 0 gets a pool; the other ranks work inside and never return."""
    if mpi:
        with _mpi_pool(stop_file) as ranks:
            yield ranks
    elif workers == 1:
        yield ThisProcess()
    else:
        processes = LocalProcesses(workers)
        try:
            yield processes
        except BaseException:
            processes.close(kill=True)
            raise
        processes.close(kill=False)


@contextlib.contextmanager
def _mpi_pool(stop_file: Path) -> Iterator[Pool]:
    try:
        from mpi4py import MPI
    except ModuleNotFoundError as error:
        raise missing_package("mpi4py", "mpi", "--mpi") from error
    except (ImportError, RuntimeError) as error:
        raise ResourceError(f"--mpi needs an MPI library that mpi4py can load: {error}") from error
    comm = MPI.COMM_WORLD
    if comm.rank != 0:
        _serve(comm)
    ranks = MpiRanks(comm, stop_file)
    code = 0
    try:
        yield ranks
    except BaseException as error:
        code = exit_code(error)
        raise
    finally:
        ranks.close(code)
