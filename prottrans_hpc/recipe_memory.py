"""The recipe's section `[memory]`: what is given up so that a model fits."""

from __future__ import annotations

from typing import Literal

from pydantic.dataclasses import dataclass

from .config import STRICT, Natural


@dataclass(frozen=True, config=STRICT)
class Memory:
    """What is given up for memory; none of it changes a bit of the result."""

    recompute_every: Natural = 0
    """Every so many-th layer keeps its input alone and is computed again for the gradient: 1 all, 2 every second, 0 none."""
    optimizer_on: Literal["device", "host"] = "device"
    """Where the optimizer's state and its update are: "host" spares the GPU 8 to 12 bytes a parameter, and is the same thing where ranks compute on CPUs."""
