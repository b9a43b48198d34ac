"""The recipe's section `[health]`: when a node counts as slow and a rank as stuck."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from .config import STRICT, Count


@dataclass(frozen=True, config=STRICT)
class Health:
    """How the ranks watch one another; none of it changes what is computed."""

    slow_factor: Annotated[float, Field(gt=1.0)] = 1.3
    """A rank is slow in a window whose steps it computes in this multiple of the median rank's time, or longer."""
    slow_window_steps: Count = 20
    """Steps of a window; a rank tells the medians over it, so that single steps do not count."""
    slow_patience: Count = 3
    """Windows in a row after which a node with a slow rank is named, and after which it is taken back."""
    hang_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    """A rank that gets nowhere for this fraction of `parallel.timeout_s` writes down where it is."""
