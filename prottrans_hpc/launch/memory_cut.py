"""Where a model fits no rank whole: over how few ranks it has to be cut to fit. Pure arithmetic, no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from .. import architecture
from ..errors import ConfigError
from ..machine import Machine
from ..recipe import Recipe
from ..recipe_parallel import Parallel
from .batch_arithmetic import plan_batches
from .memory_fit import memory_need
from .memory_need import MemoryNeed
from .memory_policies import POLICIES, Policy
from .memory_room import room_on
from .sharding_fit import check_sharding


@dataclass(frozen=True)
class Cut:
    """A layout in which the model fits, and the policy with which it does."""

    parallel: Parallel
    num_ranks: int
    """That have one copy together."""
    policy: Policy
    peak: int
    """Bytes a rank."""

    @property
    def settings(self) -> tuple[str, ...]:
        """How a person asks for it."""
        names = ("sharding", "shard_ranks", "tensor_ranks")
        cut = tuple(f"parallel.{name}={getattr(self.parallel, name)}" for name in names if getattr(self.parallel, name) != getattr(Parallel(), name))
        return (*cut, *self.policy.settings)


def smallest_cut(recipe: Recipe, machine: Machine, num_ranks: int) -> Cut | None:
    """The fewest ranks that have to hold a copy together, and the first lossless policy with which they can; None where no cut fits,
    or the recipe has one already, or talks in a way that wants whole models."""
    room, chosen = room_on(machine, num_ranks), recipe.parallel
    if room is None or not _is_whole(chosen):
        return None
    for parallel, own_ranks in _cuts(recipe, num_ranks):
        for policy in POLICIES.values():
            if policy.memory.saved == "as_is":
                need = _need(replace(policy.of(recipe), parallel=parallel), machine, num_ranks)
                if need is not None and room.holds(need):
                    return Cut(parallel, own_ranks, policy, need.peak)
    return None


def _is_whole(parallel: Parallel) -> bool:
    return (parallel.comm, parallel.sharding, parallel.tensor_ranks, parallel.reduction, parallel.compression) == ("torch", "none", 1, "flat", "none")


def _cuts(recipe: Recipe, num_ranks: int) -> Iterator[tuple[Parallel, int]]:
    """From few ranks a copy to many; of as many, those without tensor groups first, as these talk more."""
    record = architecture.get(recipe.architecture.name)
    shape = record.size(recipe.architecture.size).shape
    degrees = record.tensor_parallel.degrees(shape) if record.tensor_parallel else [1]
    sizes = [size for size in range(2, num_ranks + 1) if num_ranks % size == 0]
    for size in sizes:
        for tensor in (degree for degree in degrees if size % degree == 0):
            shards = size // tensor
            kind: Literal["none", "full", "hybrid"] = "none" if shards == 1 else "full" if size == num_ranks else "hybrid"
            yield replace(recipe.parallel, sharding=kind, shard_ranks=shards if kind == "hybrid" else None, tensor_ranks=tensor), size


def _need(recipe: Recipe, machine: Machine, num_ranks: int) -> MemoryNeed | None:
    """Of a rank; None where the ranks cannot be laid out so."""
    record = architecture.get(recipe.architecture.name)
    shape = record.size(recipe.architecture.size).shape
    try:
        layout = check_sharding(recipe, machine, record, shape, num_ranks=num_ranks)
        batches = plan_batches(recipe, num_ranks=layout.num_data_ranks)
    except ConfigError:
        return None
    return memory_need(recipe, record, shape, batches, on_gpu=machine.node.gpu is not None, layout=layout)
