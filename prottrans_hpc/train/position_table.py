"""More or fewer rows in a model's learned position table, when somebody asks for them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from ..architecture import Architecture
from ..errors import ConfigError

_TABLE = "positions.weight"
"""How every architecture with such a table names it; its shape says `max_positions` and `initializer_range`."""
_SEED = 0


def with_positions(
    record: Architecture, shape: Any, weights: Mapping[str, torch.Tensor], num_positions: int
) -> tuple[Any, dict[str, torch.Tensor], tuple[str, ...]]:
    """The shape and the weights with so many rows, and what there is to say about it.

    Rows that are there keep their weights. New ones are drawn as before a training, the same at every call: a model
    computes with them, but has not learned them. Raises ConfigError for a model without such a table, or for no rows.
    """
    tables = [name for name in weights if name.split(".")[-2:] == _TABLE.split(".")]
    if not hasattr(shape, "max_positions") or not tables:
        raise ConfigError(f"{record.name} has no table of positions: it takes sequences of any length as it is")
    if num_positions < 1:
        raise ConfigError(f"a model needs at least one position; {num_positions} were asked for")
    before = shape.max_positions
    if num_positions == before:
        return shape, dict(weights), ()
    resized = {name: _resized(weights[name], num_positions, shape.initializer_range) for name in tables}
    change = f"the position table has {num_positions:,} rows now instead of {before:,}: "
    note = change + (
        f"rows {before:,} and up are random and need training" if num_positions > before else f"sequences of more than {num_positions:,} tokens are refused"
    )
    return dataclasses.replace(shape, max_positions=num_positions), dict(weights) | resized, (note,)


def _resized(table: torch.Tensor, num_rows: int, spread: float) -> torch.Tensor:
    drawn = torch.empty(max(0, num_rows - len(table)), table.shape[1]).normal_(0.0, spread, generator=torch.Generator().manual_seed(_SEED))
    return torch.cat((table[:num_rows], drawn.to(table.dtype)))
