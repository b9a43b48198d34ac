"""What a plan comes to: batches, memory, time, chained jobs, cost, storage. Pure; `plan_text` says it in words."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from .. import architecture
from ..errors import ConfigError
from ..machine import Allocation, Machine
from ..recipe import Recipe
from . import planner
from .batch_arithmetic import PhaseBatch, plan_batches
from .checks import CorpusFacts
from .demand import Demand
from .duration import count_jobs, estimate_minutes
from .epochs import steps_per_epoch
from .memory_fit import check_memory, fitting_bins
from .memory_need import MemoryNeed
from .memory_room import GIB
from .rate import Rate, rate_of


@dataclass(frozen=True)
class Assumptions:
    """What a plan is told, or takes for granted, about speed and time."""

    total_min: int | None = None
    """Minutes that the whole training takes, where they are known; None: estimated."""
    utilisation: float | None = None
    """Model-FLOP utilisation that the estimate assumes; None: by the machine profile."""
    first_step: int = 0
    """Steps that are done already."""
    last_step: int | None = None
    """Where the run ends; None: the recipe's end."""


@dataclass(frozen=True)
class Prospect:
    """A plan and what it comes to."""

    recipe: Recipe
    """With micro batches that fit."""
    machine: Machine
    allocation: Allocation
    batches: list[PhaseBatch]
    memory: MemoryNeed | None
    """None: the profile does not say how much memory there is."""
    work_min: float | None
    """Minutes that the training still takes; None: unknown."""
    rate: Rate | None
    """What the estimated time rests on; None: unknown, or the time was given."""
    assumptions: Assumptions
    corpus: CorpusFacts | None
    notes: tuple[str, ...] = ()
    """What was changed to make it work, a line each."""

    @property
    def num_jobs(self) -> int | None:
        """Chained jobs that the work takes; None: unknown, or no batch system. Raises ConfigError when no job could work, or too many were needed."""
        if self.work_min is None or self.allocation.walltime_min is None:
            return None
        return count_jobs(self.work_min, walltime_min=self.allocation.walltime_min, warning_min=self.machine.warning_min)

    @property
    def mean_residues(self) -> float | None:
        """Mean length in the corpus; None: it was assumed."""
        return self.corpus.mean_residues if self.corpus else None

    @property
    def steps_per_epoch(self) -> list[float] | None:
        """Of each phase; None: the corpus is not known."""
        if self.mean_residues is None or self.corpus is None:
            return None
        return steps_per_epoch(self.recipe, architecture.get(self.recipe.architecture.name), self.corpus)

    @property
    def node_hours_per_job(self) -> float | None:
        """What a job that uses its whole walltime is charged; None without a batch system."""
        return None if self.allocation.walltime_min is None else self.allocation.num_nodes * self.allocation.walltime_min / 60.0

    @property
    def gpu_hours_per_job(self) -> float | None:
        """GPUs times hours of such a job; 0 without GPUs."""
        return None if self.node_hours_per_job is None else self.node_hours_per_job * self.allocation.ranks_per_node * self.allocation.gpus_per_rank


def look_ahead(
    recipe: Recipe,
    machine: Machine,
    demand: Demand,
    *,
    corpus: CorpusFacts | None = None,
    assumptions: Assumptions | None = None,
    keeps_bins: bool = False,
) -> Prospect:
    """Plan, and work out what the plan comes to. Raises ConfigError that says what is possible instead.

    Micro batches that do not fit into the memory are made smaller, which changes no result; not where `keeps_bins` says
    that a person has chosen them.
    """
    assumptions = assumptions or Assumptions()
    mean = corpus.mean_residues if corpus else None
    notes: tuple[str, ...] = ()
    if not keeps_bins:
        recipe, notes = _with_fitting_bins(recipe, machine, planner.allocate(machine, demand).num_ranks, mean)
    allocation = planner.plan(recipe, machine, demand, mean_residues=mean)
    chosen = architecture.get(recipe.architecture.name)
    shape: Any = chosen.size(recipe.architecture.size).shape
    batches = plan_batches(recipe, num_ranks=allocation.num_ranks, mean_residues=mean)
    check_storage(machine, corpus)
    gpu = machine.node.gpu
    rate = rate_of(gpu, recipe.precision, utilisation=assumptions.utilisation) if gpu and assumptions.total_min is None else None
    work_min = _given_minutes(recipe, assumptions)
    if rate:
        work_min = estimate_minutes(recipe, chosen, shape, batches, rate, first_step=assumptions.first_step, last_step=assumptions.last_step)
    memory = check_memory(recipe, machine, chosen, shape, batches)
    return Prospect(recipe, machine, allocation, batches, memory, work_min, rate, assumptions, corpus, notes)


def _given_minutes(recipe: Recipe, assumptions: Assumptions) -> float | None:
    if assumptions.total_min is None:
        return None
    end = assumptions.last_step or recipe.num_steps
    return assumptions.total_min * max(0, end - assumptions.first_step) / end


def _with_fitting_bins(recipe: Recipe, machine: Machine, num_ranks: int, mean_residues: float | None) -> tuple[Recipe, tuple[str, ...]]:
    chosen = architecture.get(recipe.architecture.name)
    batches = plan_batches(recipe, num_ranks=num_ranks, mean_residues=mean_residues)
    fitting = fitting_bins(recipe, machine, chosen, chosen.size(recipe.architecture.size).shape, batches)
    if fitting is None:
        return recipe, ()
    wanted = recipe.loading.bin_residues
    note = f"micro batches have at most {fitting:,} residues, not the recipe's {wanted:,}: so they fit into the memory; the step stays the same"
    return replace(recipe, loading=replace(recipe.loading, bin_residues=fitting)), (note,)


def check_storage(machine: Machine, corpus: CorpusFacts | None) -> None:
    """Raises ConfigError when a corpus that is to be staged is larger than the node-local disk."""
    disk = machine.node.local_disk_gib
    if machine.staging == "node_local" and corpus and disk and corpus.num_bytes > disk * GIB:
        raise ConfigError(
            f"the corpus {corpus.path} has {corpus.num_bytes / GIB:,.1f} GiB, the node-local disk of {machine.name} {disk:,.0f} GiB: "
            "set staging = 'none' in a copy of the machine profile to read it from the shared file system"
        )
