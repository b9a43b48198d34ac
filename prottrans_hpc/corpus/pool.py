"""Who does the work of `preprocess`: this process, local processes, MPI ranks, or the nodes of a farm
(`task_folder`). The result never depends on it.

The main process hands out lists of independent tasks and gets their results in order. A worker that fails stops
the others and its error is raised; a worker that dies ends the whole command, which never waits for the dead.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, Protocol, TypeVar

from .. import terminal
from ..errors import ResourceError, exit_code, explain, missing_package
from .workers import Workers, sendable

Task = TypeVar("Task")
Result = TypeVar("Result")
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
    """Processes of this computer."""

    def __init__(self, num_workers: int) -> None:
        self.num_workers = num_workers
        self._workers = Workers(num_workers)

    def run(self, function: Callable[[Task], Result], tasks: Sequence[Task], *, costs: Sequence[float], advance: terminal.Advance) -> list[Result]:
        """See Pool."""
        if len(tasks) < 2 or sum(costs) < SMALL:
            return ThisProcess().run(function, tasks, costs=costs, advance=advance)
        results: dict[int, Result] = {}
        for i, result in self._workers.run(function, tasks):
            results[i] = result
            advance(costs[i])
        return [results[i] for i in range(len(tasks))]

    def close(self, *, kill: bool) -> None:
        """End the workers; `kill` does not wait for what they are doing."""
        self._workers.close(kill=kill)


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
            return done, (i, sendable(error))
        advance(i)
    return done, None


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
