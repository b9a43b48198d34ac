"""Whether a model can be laid out over the ranks as a recipe's `[parallel]` asks, before anything is queued. Pure, no torch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .. import architecture
from ..architecture import Architecture
from ..errors import ConfigError
from ..machine import Machine
from ..parallel_layout import ParallelLayout, layout_on
from ..recipe import Recipe


def check_sharding(recipe: Recipe, machine: Machine, chosen: Architecture, shape: Any, *, num_ranks: int) -> ParallelLayout:
    """The layout of so many ranks. Raises ConfigError that says which sizes are possible instead."""
    degrees = chosen.tensor_parallel.degrees(shape) if chosen.tensor_parallel else None
    if recipe.parallel.tensor_ranks > 1:
        _check_products(recipe, machine, chosen, shape, num_ranks)
    return layout_on(recipe.parallel, machine, num_ranks, degrees=degrees)


def layout_text(layout: ParallelLayout) -> str:
    """A layout in words."""
    if layout.is_plain:
        return f"{_number(layout.num_replicas, 'whole copy', 'whole copies')} of the model"
    cut = f", each cut over {layout.num_shards * layout.num_tensor:,} ranks" if layout.num_replicas * layout.num_shards > 1 or layout.num_tensor > 1 else ""
    groups = f" = {_number(layout.num_shards, 'tensor group', 'tensor groups')} of {layout.num_tensor}" if layout.num_tensor > 1 else ""
    return f"{_number(layout.num_replicas, 'copy', 'copies')} of the model{cut}{groups}; {_number(layout.num_data_ranks, 'share', 'shares')} of every step"


def _number(number: int, one: str, many: str) -> str:
    return f"{number:,} {one if number == 1 else many}"


def _check_products(recipe: Recipe, machine: Machine, chosen: Architecture, shape: Any, num_ranks: int) -> None:
    tensor_ranks = recipe.parallel.tensor_ranks
    if chosen.tensor_parallel is None:
        able = [record.name for record in architecture.available() if record.tensor_parallel]
        raise ConfigError(
            f"the matrices of {chosen.name} cannot be shared by a tensor group; those of {', '.join(able)} can. "
            "Take parallel.tensor_ranks=1; parallel.sharding = 'full' or 'hybrid' makes any model fit more ranks"
        )
    numbers = chosen.tensor_parallel.divides(shape)
    bad = {name: number for name, number in numbers.items() if number % tensor_ranks}
    if bad:
        listed = ", ".join(f"{name} {number:,}" for name, number in bad.items())
        raise ConfigError(
            f"parallel.tensor_ranks = {tensor_ranks} does not divide {listed} of {chosen.name}: a rank takes whole heads and an equal part of the "
            f"feed-forward width. {_possible_text(recipe, machine, chosen.tensor_parallel.degrees(shape), num_ranks)}"
        )


def _possible_text(recipe: Recipe, machine: Machine, degrees: list[int], num_ranks: int) -> str:
    """Which sizes the model can have, and which of them have room as near as the recipe wants them."""
    near = [size for size in degrees if size > 1 and _has_room(recipe, machine, size, num_ranks)]
    possible = f"Possible are {', '.join(map(str, degrees))}"
    if not near:
        is_widest = recipe.parallel.tensor_within == "machine" or machine.scheduler == "local"
        wider = "" if is_widest else f" within a {recipe.parallel.tensor_within}; --set parallel.tensor_within=machine lets groups reach further"
        return f"{possible}; none of them but 1 has room on {num_ranks:,} ranks of {machine.name}{wider}"
    return f"{possible}; on {num_ranks:,} ranks of {machine.name} {' and '.join(map(str, near))} would do"


def _has_room(recipe: Recipe, machine: Machine, size: int, num_ranks: int) -> bool:
    try:
        layout_on(replace(recipe.parallel, tensor_ranks=size), machine, num_ranks)
    except ConfigError:
        return False
    return True
