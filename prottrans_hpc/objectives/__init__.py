"""Objectives: packed samples and counter-based random numbers in, a Batch out. They know residues and tokens, not models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..architecture import Batch
from ..stage import find

Objective = Callable[[Any, Any, int], Batch]
"""`(layout, settings, seed)` -> one micro batch of numpy arrays; `settings` is the recipe's section [objective]. The layout is a
`layout.Layout`; objectives of architectures with lanes get a `lane_layout.LaneLayout` to train with and a Layout to validate with."""

OBJECTIVES = {
    "causal": "prottrans_hpc.objectives.causal:predict",
    "denoising": "prottrans_hpc.objectives.denoising:corrupt",
    "masked": "prottrans_hpc.objectives.masked:corrupt",
    "permutation": "prottrans_hpc.objectives.permutation:permute",
    "replaced_token": "prottrans_hpc.objectives.replaced_token:corrupt",
}


def get(name: str) -> Objective:
    """The objective that a recipe names."""
    objective: Objective = find(OBJECTIVES[name])
    return objective
