"""The recipe's section `[memory]`: what is given up so that a model fits."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from .config import STRICT, Natural


@dataclass(frozen=True, config=STRICT)
class Memory:
    """What is given up for memory; of all this only `saved` changes the result."""

    recompute_every: Natural = 0
    """Every so many-th layer keeps its input alone and is computed again for the gradient: 1 all, 2 every second, 0 none."""
    recompute_keeps: Literal["nothing", "attention", "attention_and_narrow", "attention_and_half"] = "nothing"
    """What such a layer keeps beside its input: the results of attention; those and the products that narrow (the second of the feed-forward
    part); or those and every second product with a weight."""
    saved: Literal["as_is", "bf16"] = "as_is"
    """What is kept for the gradient: the numbers themselves, or fp32 ones in bf16. Lossy: another experiment."""
    lms_limit_gib: Annotated[float, Field(ge=0.0)] | None = None
    """What is kept for the gradient may take so much of the GPU; the rest waits in pinned host memory (large model support). 0: all of it waits there,
    but for small tensors. None: all stays. On CPUs it is done, too, and spares nothing."""
    optimizer_on: Literal["device", "host"] = "device"
    """Where the optimizer's state and its update are: "host" spares the GPU 8 to 12 bytes a parameter, and is the same thing where ranks compute on CPUs."""

    def __post_init__(self) -> None:
        if self.recompute_keeps != "nothing" and not self.recompute_every:
            raise ValueError(f"recompute_keeps = {self.recompute_keeps!r} needs layers that are recomputed: set recompute_every (1: all of them)")


def lossy(memory: Memory) -> dict[str, Any]:
    """What of this section changes the result of a run: nothing by default."""
    return {} if memory.saved == "as_is" else {"saved": memory.saved}
