"""Objectives: packed samples and counter-based random numbers in, a Batch out. They know residues and tokens, not models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..architecture import Batch
from ..stage import find
from .layout import Layout

Objective = Callable[[Layout, Any, int], Batch]
"""`(layout, settings, seed)` -> one micro batch of numpy arrays; `settings` is the recipe's section [objective]."""

OBJECTIVES = {"masked": "prottrans_hpc.objectives.masked:corrupt"}


def get(name: str) -> Objective:
    """The objective that a recipe names."""
    objective: Objective = find(OBJECTIVES[name])
    return objective
