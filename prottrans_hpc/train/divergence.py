"""A watch on the loss: steps far above what the steps before them had are a spike, the beginning of a divergence.

A step's robust z-score is its distance from the median of the window before it, in units of 1.4826 times the median
absolute deviation (the standard deviation of a normal distribution; Iglewicz and Hoaglin 1993). The state is a
function of the losses, which are the same on all ranks, and stands in checkpoints: so all ranks, and a resumed run,
decide alike.
"""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass
from typing import Any

from ..recipe import Divergence

_SIGMAS_OF_MAD = 1.4826
_LEAST_SIGMA = 1e-3
"""Share of the median: a loss that stands still has no deviation of its own."""


@dataclass(frozen=True)
class Spike:
    """What was seen at the last of a few steps that were all too high."""

    loss: float
    median: float
    z_score: float


class SpikeDetector:
    """Looks at every step's loss. `rate_factor` is what the learning rate is multiplied by after rollbacks."""

    def __init__(self, settings: Divergence) -> None:
        self._settings = settings
        self._num_high = 0
        self.take(None)

    def observe(self, loss: float) -> Spike | None:
        """The spike that this step completes, if any; told once for as long as the loss stays high."""
        found = None
        if len(self._losses) == self._settings.window:
            median = statistics.median(self._losses)
            deviation = statistics.median(abs(value - median) for value in self._losses)
            z_score = (loss - median) / max(_SIGMAS_OF_MAD * deviation, _LEAST_SIGMA * abs(median), 1e-12)
            self._num_high = self._num_high + 1 if z_score > self._settings.z_score else 0
            if self._num_high == self._settings.patience:
                found = Spike(loss, median, z_score)
        self._losses.append(loss)
        return found

    @property
    def is_suspicious(self) -> bool:
        """Whether the newest steps are high, so that a checkpoint of now would be a bad one to go back to."""
        return self._settings.action == "rollback" and self._num_high > 0

    @property
    def may_roll_back(self) -> bool:
        """Whether the recipe allows one more."""
        return self.num_rollbacks < self._settings.max_rollbacks

    def lower(self, rate_factor: float, num_rollbacks: int) -> None:
        """After a return to a checkpoint: the factor and the count before it, each one further."""
        self.rate_factor, self.num_rollbacks, self._num_high = rate_factor * self._settings.rate_factor, num_rollbacks + 1, 0

    def to_json(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"losses": list(self._losses), "num_high": self._num_high, "rate_factor": self.rate_factor, "num_rollbacks": self.num_rollbacks}

    def take(self, values: dict[str, Any] | None) -> None:
        """From a checkpoint; None: from the beginning."""
        known = values or {}
        self._losses = deque((float(loss) for loss in known.get("losses", ())), maxlen=self._settings.window)
        self._num_high = int(known.get("num_high", 0))
        self.rate_factor = float(known.get("rate_factor", 1.0))
        self.num_rollbacks = int(known.get("num_rollbacks", 0))
