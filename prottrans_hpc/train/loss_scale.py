"""Dynamic loss scaling for fp16, as in APEX and torch.amp: double after so many good steps, halve when gradients overflow.

Micikevicius et al. 2018, section 3.2. Nothing is agreed upon here: it goes by the norm of the reduced gradients, whose
bits are the same on all ranks. Scales are powers of two, so scaling rounds nothing.
"""

from __future__ import annotations

import math
from typing import Any

from ..recipe import LossScaling, Phase

_CEILING = 2.0**24


class LossScale:
    """The scale of the mean loss, and how many steps it has been good for."""

    def __init__(self, settings: LossScaling) -> None:
        self._settings = settings
        self.value = settings.initial
        self.num_good_steps = 0

    def multiplier(self, phase: Phase) -> float:
        """What to multiply a summed loss by: the scale over the residues of a step, rounded up to a power of two.

        The number of targets is not known before all ranks have run; this is a function of the recipe alone.
        """
        residues = phase.global_batch_residues or (phase.global_batch_size or 1) * phase.max_residues
        return self.value / 2.0 ** math.ceil(math.log2(residues))

    def grow(self) -> None:
        """Count a good step."""
        self.num_good_steps += 1
        if self.num_good_steps >= self._settings.growth_every:
            self.value, self.num_good_steps = self.value if self.value >= _CEILING else 2.0 * self.value, 0

    def back_off(self) -> bool:
        """Halve after an overflow; False when the scale is as low as it may be, so that something else is wrong."""
        self.num_good_steps = 0
        if self.value <= self._settings.floor:
            return False
        self.value = max(self.value / 2.0, self._settings.floor)
        return True

    def to_json(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"value": self.value, "num_good_steps": self.num_good_steps}

    def take(self, values: dict[str, Any] | None) -> None:
        """From a checkpoint; None: from the beginning."""
        self.value = float(values["value"]) if values else self._settings.initial
        self.num_good_steps = int(values["num_good_steps"]) if values else 0
