"""A plan in words: one line for each thing that was chosen, and why. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from ..errors import ConfigError
from ..machine import Licence, Machine
from ..parallel_layout import layout_on
from . import planner, queues
from .batch_arithmetic import ASSUMED_MEAN_RESIDUES, PhaseBatch
from .demand import time_text
from .duration import START_UP_MIN
from .memory_fit import need_text
from .memory_room import GIB, MARGIN, host_memory_gib, host_text, memory_gib
from .prospect import Prospect
from .sharding_fit import layout_text


def describe(prospect: Prospect) -> Iterator[tuple[str, str]]:
    """(what, words) of everything in a plan, for people."""
    yield "size", _size_text(prospect)
    layout = layout_on(prospect.recipe.parallel, prospect.machine, prospect.allocation.num_ranks)
    if not layout.is_plain:
        yield "layout", layout_text(layout)
    yield from _queue_lines(prospect)
    yield from (("licence", _licence_text(prospect.machine, licence)) for licence in prospect.machine.licences)
    yield from (("batch", _batch_text(prospect, batch)) for batch in prospect.batches)
    yield from (("warm-up", _warmup_text(prospect, number)) for number in range(len(prospect.recipe.phases)))
    yield "lengths", _lengths_text(prospect)
    yield "memory", _memory_text(prospect)
    yield "time", _time_text(prospect)
    yield from _job_lines(prospect)
    yield from _storage_lines(prospect)
    yield from (("note", note) for note in prospect.notes)
    yield from (("note", remark) for remark in planner.remarks(prospect.recipe, prospect.machine, prospect.allocation))


def to_json(prospect: Prospect, *, recipe_name: str) -> dict[str, Any]:
    """The plan as plain values."""
    allocation, machine = prospect.allocation, prospect.machine
    slot = queues.bin_of(machine.queue(allocation.queue), allocation.num_nodes) if allocation.queue else None
    jobs, problem = _count_jobs(prospect)
    return {
        "recipe": recipe_name,
        "machine": machine.name,
        "allocation": asdict(allocation) | {"num_ranks": allocation.num_ranks},
        "layout": asdict(layout_on(prospect.recipe.parallel, machine, allocation.num_ranks)),
        "bin": asdict(slot) if slot else None,
        "phases": [
            asdict(batch)
            | {"sequences_per_rank": batch.sequences_per_rank, "num_idle_ranks": batch.num_idle_ranks, "mean_is_assumed": prospect.mean_residues is None}
            | {"steps": phase.steps, "warmup_steps": phase.warmup_steps, "warmup_epochs": phase.warmup_epochs}
            | {"steps_per_epoch": prospect.steps_per_epoch[batch.phase] if prospect.steps_per_epoch else None}
            for batch, phase in zip(prospect.batches, prospect.recipe.phases, strict=True)
        ],
        "memory": asdict(prospect.memory) | {"peak": prospect.memory.peak} if prospect.memory else None,
        "memory_gib": memory_gib(machine, allocation.num_ranks),
        "host_memory_gib": host_memory_gib(machine, allocation.num_ranks),
        "work_min": prospect.work_min,
        "utilisation": prospect.rate.utilisation if prospect.rate else None,
        "rate": prospect.rate.source if prospect.rate else None,
        "num_jobs": jobs,
        "chain_problem": problem,
        "node_hours_per_job": prospect.node_hours_per_job,
        "gpu_hours_per_job": prospect.gpu_hours_per_job,
        "corpus_bytes": prospect.corpus.num_bytes if prospect.corpus and prospect.corpus.sha256 else None,
        "staging": machine.staging,
        "why": [text for what, text in describe(prospect) if what == "why"],
    }


def _size_text(prospect: Prospect) -> str:
    allocation, gpu = prospect.allocation, prospect.machine.node.gpu
    racks = f"{allocation.num_racks} {'rack' if allocation.num_racks == 1 else 'racks'} = " if allocation.num_racks else ""
    nodes = f"{allocation.num_nodes:,} {'node' if allocation.num_nodes == 1 else 'nodes'}"
    on = f", one {gpu.name} each" if gpu else ""
    cores = f"{allocation.cpu_cores_per_rank} CPU {'core' if allocation.cpu_cores_per_rank == 1 else 'cores'} a rank"
    return f"{racks}{nodes} x {allocation.ranks_per_node} = {allocation.num_ranks:,} {'rank' if allocation.num_ranks == 1 else 'ranks'}{on}, {cores}"


def _queue_lines(prospect: Prospect) -> Iterator[tuple[str, str]]:
    allocation, machine = prospect.allocation, prospect.machine
    if allocation.queue is None or allocation.walltime_min is None:
        return
    row = queues.bin_of(machine.queue(allocation.queue), allocation.num_nodes)
    assert row is not None  # the planner chose it
    longest = " (the longest there)" if allocation.walltime_min == row.max_walltime_min else f" (at most {time_text(row.max_walltime_min)} there)"
    yield "queue", f"{allocation.queue}, {queues.bin_text(row)}, walltime {time_text(allocation.walltime_min)}{longest}"
    whole = allocation.num_racks is not None
    smallest, largest = (edge(machine, row, whole_racks=whole) for edge in (queues.smallest_in, queues.largest_in))
    if smallest is None or largest is None or len(machine.queue(allocation.queue).bins) == 1:
        return
    name = f"bin {row.name}" if row.name else "this bin"
    text = f"{name} holds {queues.size_text(machine, smallest, whole_racks=whole)} to {queues.size_text(machine, largest, whole_racks=whole)}"
    which = "this" if allocation.num_nodes == smallest else "the first"
    this = f"; {which} is the smallest{' whole-rack' if whole else ''} size that may run {time_text(row.max_walltime_min)}"
    shorter = [other for other in machine.queue(allocation.queue).bins if other.max_nodes < row.min_nodes]
    yield "why", text + (this if shorter and shorter[-1].max_walltime_min < row.max_walltime_min else "")


def _licence_text(machine: Machine, licence: Licence) -> str:
    racks = f" = {licence.max_nodes // machine.nodes_per_rack} racks" if machine.nodes_per_rack else ""
    return f"{licence.name} (parallel.comm = {licence.comm!r}) ends at {licence.max_nodes} nodes{racks}"


def _batch_text(prospect: Prospect, batch: PhaseBatch) -> str:
    phase = prospect.recipe.phases[batch.phase]
    given = f"{batch.num_sequences:,}" if phase.global_batch_size else f"about {batch.num_sequences:,}"
    steps = f"phase {batch.phase}, {phase.steps:,} steps of {given} sequences up to {phase.max_residues:,} residues"
    fill = f"about {batch.residues_per_micro_batch:,.0f} of {batch.bin_residues:,} residues in each"
    micro = f"{batch.num_micro_batches} {'bin' if batch.num_micro_batches == 1 else 'bins (accumulation steps)'} a rank and step"
    idle = f"; {batch.num_idle_ranks:,} ranks have no sequence" if batch.num_idle_ranks else ""
    return f"{steps}: {batch.sequences_per_rank:,.2f} a rank, {micro}, {fill}{idle}"


def _warmup_text(prospect: Prospect, number: int) -> str:
    phase = prospect.recipe.phases[number]
    peak = phase.learning_rate or prospect.recipe.optimizer.learning_rate
    length = f"{phase.warmup_epochs:g} epochs" if phase.warmup_epochs is not None else f"{phase.warmup_steps:,} steps"
    moments = ", with new moments" if phase.optimizer_state == "reset" else ""
    way = "at" if prospect.recipe.schedule.warmup == "constant" else "to"
    text = f"phase {number}, {length} {way} a learning rate of {peak:g}{moments}"
    if prospect.steps_per_epoch is None:
        return text
    epoch = prospect.steps_per_epoch[number]
    return f"{text}: {phase.warmup_steps / epoch:,.2f} epochs of {epoch:,.1f} steps; the phase has {phase.steps / epoch:,.2f}"


def _lengths_text(prospect: Prospect) -> str:
    if prospect.mean_residues is not None:
        return f"{prospect.mean_residues:,.0f} residues a sequence on the mean, from the corpus; cut to each phase's limit"
    return f"{ASSUMED_MEAN_RESIDUES:,.0f} residues a sequence on the mean are assumed (--corpus CORPUS tells), cut to each phase's limit"


def _memory_text(prospect: Prospect) -> str:
    memory = memory_gib(prospect.machine, prospect.allocation.num_ranks)
    if prospect.memory is None or memory is None:
        return f"not checked: the profile of {prospect.machine.name} does not say how much there is"
    on_host = host_text(prospect.memory, prospect.machine, prospect.allocation.num_ranks)
    return f"{need_text(prospect.memory)}; {memory:,.1f} GiB are there, {100 * MARGIN:.0f} % of them kept free{f'; {on_host}' if on_host else ''}"


def _time_text(prospect: Prospect) -> str:
    assumed = prospect.assumptions
    if assumed.total_min is not None and prospect.work_min is not None:
        done = f", {time_text(prospect.work_min)} of it left" if assumed.first_step else ""
        return f"{time_text(assumed.total_min)} of work, as given{done}"
    if prospect.work_min is None or prospect.rate is None:
        return "unknown: the profile has no GPU with a peak (--total-time H:MM gives one)"
    again = "; layers that are computed again are counted" if prospect.recipe.memory.recompute_every else ""
    return f"about {time_text(prospect.work_min)} of work, at {prospect.rate.source}{again}"


def _job_lines(prospect: Prospect) -> Iterator[tuple[str, str]]:
    allocation = prospect.allocation
    if allocation.walltime_min is None:
        return
    jobs, problem = _count_jobs(prospect)
    if problem:
        yield "jobs", problem
    if jobs is not None:
        lost = f"each gives {START_UP_MIN} minutes to starting and {prospect.machine.warning_min} to saving"
        yield "jobs", f"{jobs} {'job' if jobs == 1 else 'chained jobs (--chain)'} of {time_text(allocation.walltime_min)}; {lost}"
    hours = prospect.node_hours_per_job or 0.0
    gpu_hours = f", {prospect.gpu_hours_per_job:,.0f} GPU-hours" if allocation.gpus_per_rank else ""
    total = f"; {jobs} jobs: at most {jobs * hours:,.0f} node-hours" if jobs and jobs > 1 else ""
    yield "cost", f"{hours:,.0f} node-hours{gpu_hours} a job{total}"


def _count_jobs(prospect: Prospect) -> tuple[int | None, str | None]:
    """The number of jobs, or why there is none: a plan is worth reading all the same."""
    try:
        return prospect.num_jobs, None
    except ConfigError as error:
        return None, str(error)


def _storage_lines(prospect: Prospect) -> Iterator[tuple[str, str]]:
    machine, corpus = prospect.machine, prospect.corpus
    known = corpus is not None and bool(corpus.sha256)
    size = f"{corpus.num_bytes / GIB:,.1f} GiB" if corpus is not None and known else "the corpus"
    if machine.staging == "node_local":
        disk = f" of {machine.node.local_disk_gib:,.0f} GiB" if machine.node.local_disk_gib else ""
        yield "storage", f"each node copies {size} to {machine.node.local_disk_path}{disk} and reads it there"
    elif known:
        yield "storage", f"{size} are read from the shared file system"
