"""Which queue and bin a job falls into, and how long it may run there. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..errors import ConfigError
from ..machine import Bin, Machine, Queue
from .demand import Demand, time_text
from .racks import has_whole_racks, racks_text


@dataclass(frozen=True)
class Slot:
    """A place in a queue."""

    queue: Queue
    bin: Bin
    walltime_min: int


def choose(machine: Machine, num_nodes: int, demand: Demand) -> Slot:
    """The place of a job of so many nodes. Raises ConfigError with the nearest plan that works."""
    queue = machine.queue(demand.queue)
    found = bin_of(queue, num_nodes)
    if found is None:
        raise ConfigError(_no_bin(machine, queue, num_nodes))
    walltime_min = demand.walltime_min or found.max_walltime_min
    if walltime_min > found.max_walltime_min:
        raise ConfigError(_too_long(machine, queue, found, num_nodes, demand))
    if walltime_min <= machine.warning_min:
        raise ConfigError(
            f"a walltime of {time_text(walltime_min)} leaves no time to work: jobs on {machine.name} save and stop "
            f"{machine.warning_min} minutes before its end (warning_min); take up to {time_text(found.max_walltime_min)}"
        )
    return Slot(queue, found, walltime_min)


def bin_of(queue: Queue, num_nodes: int) -> Bin | None:
    """The bin of a queue that takes so many nodes."""
    return next((row for row in queue.bins if row.min_nodes <= num_nodes <= row.max_nodes), None)


def bin_text(row: Bin) -> str:
    """ "bin 2 (922-2,764 nodes)"."""
    return f"bin{f' {row.name}' if row.name else ''} ({row.min_nodes:,}-{row.max_nodes:,} nodes)"


def smallest_in(machine: Machine, row: Bin, *, whole_racks: bool) -> int | None:
    """The smallest size in a bin, in whole racks where they are wanted; None: no such size is in it."""
    per_rack = machine.nodes_per_rack if whole_racks else None
    smallest = -(-row.min_nodes // per_rack) * per_rack if per_rack else row.min_nodes
    return smallest if smallest <= min(row.max_nodes, machine.max_nodes) else None


def largest_in(machine: Machine, row: Bin, *, whole_racks: bool) -> int | None:
    """The largest size in a bin, in whole racks where they are wanted; None: no such size is in it."""
    limit = min(row.max_nodes, machine.max_nodes)
    per_rack = machine.nodes_per_rack if whole_racks else None
    largest = limit // per_rack * per_rack if per_rack else limit
    return largest if largest >= row.min_nodes else None


def size_text(machine: Machine, num_nodes: int, *, whole_racks: bool) -> str:
    """ "52 racks = 936 nodes", or the nodes alone."""
    if whole_racks and machine.nodes_per_rack:
        return racks_text(num_nodes // machine.nodes_per_rack, machine.nodes_per_rack)
    return f"{num_nodes} {'node' if num_nodes == 1 else 'nodes'}"


def _no_bin(machine: Machine, queue: Queue, num_nodes: int) -> str:
    ranges = ", ".join(f"{row.min_nodes:,} to {row.max_nodes:,}" for row in queue.bins)
    others = [f"--queue {other.name}" for other in machine.queues if other is not queue and bin_of(other, num_nodes)]
    hint = f": take {' or '.join(others)}, or another size" if others else ": take another size"
    return f"the queue {queue.name} of {machine.name} takes jobs of {ranges} nodes; {num_nodes:,} were asked for{hint}"


def _too_long(machine: Machine, queue: Queue, row: Bin, num_nodes: int, demand: Demand) -> str:
    asked = demand.walltime_min or 0
    longest = time_text(row.max_walltime_min)
    offers = [f"--walltime {longest} at this size", *_sizes_that_run(machine, queue, num_nodes, demand), *_queues_that_run(machine, queue, num_nodes, asked)]
    return (
        f"{num_nodes:,} {'node is' if num_nodes == 1 else 'nodes are'} in {bin_text(row)} of the queue {queue.name} of {machine.name}, "
        f"where a job runs at most {longest}; "
        f"{time_text(asked)} was asked for. What works: {'; '.join(offers)}. Work that takes longer: --chain"
    )


def _sizes_that_run(machine: Machine, queue: Queue, num_nodes: int, demand: Demand) -> Iterator[str]:
    """The nearest size in this queue that may run so long."""
    whole = has_whole_racks(machine) and not demand.partial_rack
    asked = demand.walltime_min or 0
    rows = [row for row in queue.bins if row.max_walltime_min >= asked]
    larger = [size for row in rows if row.min_nodes > num_nodes and (size := smallest_in(machine, row, whole_racks=whole))]
    smaller = [size for row in rows if row.max_nodes < num_nodes and (size := largest_in(machine, row, whole_racks=whole))]
    if larger:
        yield f"{size_text(machine, min(larger), whole_racks=whole)}, the smallest size that may run {time_text(asked)}"
    elif smaller:
        yield f"{size_text(machine, max(smaller), whole_racks=whole)}, the largest size that may run {time_text(asked)}"


def _queues_that_run(machine: Machine, queue: Queue, num_nodes: int, asked: int) -> Iterator[str]:
    for other in machine.queues:
        row = bin_of(other, num_nodes)
        if other is not queue and row is not None and row.max_walltime_min >= asked:
            yield f"--queue {other.name}{' (preemptable)' if other.preemptable else ''}"
