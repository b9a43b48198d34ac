"""The ways to spend less memory that are compared side by side, and what each costs in time. Pure arithmetic, no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..recipe import Recipe
from ..recipe_memory import Memory


@dataclass(frozen=True)
class Policy:
    """One way."""

    memory: Memory
    says: str
    """What it does, for people."""

    @property
    def settings(self) -> tuple[str, ...]:
        """How a person asks for it."""
        default, given = Memory(), vars(self.memory)
        return tuple(
            f"memory.{name}={value:g}" if isinstance(value, float) else f"memory.{name}={value}"
            for name, value in given.items()
            if value != getattr(default, name)
        )

    def of(self, recipe: Recipe) -> Recipe:
        """The recipe with it."""
        return replace(recipe, memory=self.memory)


POLICIES = {
    "none": Policy(Memory(), "everything is kept"),
    "bf16 saved": Policy(Memory(saved="bf16"), "fp32 numbers are kept in bf16; lossy"),
    "every 2nd layer": Policy(Memory(recompute_every=2), "every second layer is computed again"),
    "attention and half": Policy(
        Memory(recompute_every=1, recompute_keeps="attention_and_half"), "of layers, attention's results and every second product are kept"
    ),
    "attention and narrow": Policy(
        Memory(recompute_every=1, recompute_keeps="attention_and_narrow"), "of layers, attention's results and products that narrow are kept"
    ),
    "attention": Policy(Memory(recompute_every=1, recompute_keeps="attention"), "of layers, attention's results are kept"),
    "every layer": Policy(Memory(recompute_every=1), "layers are computed again from their inputs"),
    "LMS": Policy(Memory(lms_limit_gib=0.0), "what is kept waits in host memory"),
    "host optimizer": Policy(Memory(optimizer_on="host"), "the optimizer's state is in host memory, and the CPU updates"),
    "LMS, host optimizer": Policy(Memory(lms_limit_gib=0.0, optimizer_on="host"), "both of these"),
    "every layer, host optimizer": Policy(Memory(recompute_every=1, optimizer_on="host"), "both of these"),
}
"""By name, from what keeps most."""
