"""Objectives: packed samples and counter-based random numbers in, a Batch out. They know residues and tokens, not models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..architecture import Batch
from ..stage import find
from .lane_layout import LaneLayout
from .layout import Layout

Objective = Callable[[Layout, Any, int], Batch] | Callable[[Layout | LaneLayout, Any, int], Batch]
"""`(layout, settings, seed)` -> one micro batch of numpy arrays; `settings` is the recipe's section [objective]. Objectives of
architectures with lanes get pieces of lanes to train with and whole sequences to validate with."""

OBJECTIVES = {"masked": "prottrans_hpc.objectives.masked:corrupt"}


def get(name: str) -> Objective:
    """The objective that a recipe names."""
    objective: Objective = find(OBJECTIVES[name])
    return objective
