"""A pool whose workers are the nodes of a farm: tasks go out as files, results come back as files.

Every round of tasks (read, look for duplicates, write shards) is dealt out as items of about equal cost, and the main
process waits until all are done. An item may be run again at any time: what it writes does not depend on who does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .. import durable, terminal
from ..errors import DataError
from ..stage import Farm, Item, Request
from .pool import Result, Task, ThisProcess, deal, open_pool
from .task_json import FUNCTIONS, decode, encode


class TaskFolder:
    """See Pool."""

    def __init__(self, farm: Farm) -> None:
        self._farm = farm
        self._num_rounds = 0
        self.num_workers = farm.num_items * farm.num_workers

    def run(self, function: Callable[[Task], Result], tasks: Sequence[Task], *, costs: Sequence[float], advance: terminal.Advance) -> list[Result]:
        """See Pool. What is a single task, or must not be done twice, is done here."""
        name = getattr(function, "__name__", "")
        if len(tasks) < 2 or FUNCTIONS.get(name) is not function:
            return ThisProcess().run(function, tasks, costs=costs, advance=advance)
        self._num_rounds += 1
        round_name = f"{self._num_rounds:02d}-{name.replace('_', '-')}"
        results_folder = self._farm.folder / round_name / "results"
        for folder in (results_folder.parent, results_folder):
            folder.mkdir(exist_ok=True, mode=0o700)
        shares = deal(costs, min(self._farm.num_items, len(tasks)))
        items = [self._item(name, share, tasks, costs, results_folder / f"{k:05d}.json") for k, share in enumerate(shares)]
        self._farm.run(round_name, items)
        results: dict[int, Result] = {}
        for item in items:
            results |= _read_results(item.output)
            advance(sum(item.request["costs"]))
        if results.keys() != set(range(len(tasks))):
            raise DataError(f"{results_folder} does not hold the result of every task: remove {self._farm.folder}, and run the same command again")
        return [results[i] for i in range(len(tasks))]

    def _item(self, name: str, share: Sequence[int], tasks: Sequence[Any], costs: Sequence[float], output: Path) -> Item:
        content = [encode(tasks[i]) for i in share]
        request = {"function": name, "workers": self._farm.num_workers, "numbers": list(share), "tasks": content, "output": str(output)}
        return Item("preprocess-item", request | {"costs": [float(costs[i]) for i in share]}, output)


def _read_results(path: Path) -> dict[int, Any]:
    return {int(number): decode(result) for number, result in durable.read_json(path)}


def run_item(request: Request) -> None:
    """Do the tasks of an item on the cores of its node, and write the results."""
    function = FUNCTIONS.get(request["function"])
    if function is None:
        raise DataError(f"no task is called {terminal.printable(str(request['function']))!r}")
    tasks = [decode(task) for task in request["tasks"]]
    with open_pool(workers=int(request["workers"]), mpi=False, stop_file=Path()) as pool:
        results: list[Any] = pool.run(function, tasks, costs=request["costs"], advance=lambda amount: None)
    numbers = [int(number) for number in request["numbers"]]
    durable.write_json(Path(request["output"]), [[number, encode(result)] for number, result in zip(numbers, results, strict=True)])
