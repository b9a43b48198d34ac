"""The precisions that a recipe can name: what weights, products and updates are computed in. No torch here.

They are APEX's levels O0 to O3, of which O1 to O3 exist in both half types, and TF32. fp16 overflows at 65,504 and
loses gradients below 6e-8, so with it the loss is scaled before the backward pass (Micikevicius et al. 2018).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Name = Literal["fp32", "tf32", "bf16", "fp16", "bf16_o2", "fp16_o2", "bf16_o3", "fp16_o3"]


@dataclass(frozen=True)
class Level:
    """One precision."""

    products: str
    """What matrix products are computed in; the key of the hardware's peak."""
    weights: str = "fp32"
    """What the model holds, and its gradients with it."""
    has_masters: bool = False
    """Whether the optimizer keeps and updates an fp32 copy of half weights; norms stay fp32 then."""
    apex: str = ""
    """APEX's name of it."""

    @property
    def is_half(self) -> bool:
        """Whether products are of 16 bits; autocast then decides which other operation runs in which type."""
        return self.products in ("bf16", "fp16")

    @property
    def scales_loss(self) -> bool:
        """Whether gradients would under- and overflow without a scale."""
        return self.products == "fp16"

    @property
    def weight_bytes(self) -> int:
        """Of one weight in the model, and of its gradient."""
        return 4 if self.weights == "fp32" else 2


LEVELS: dict[str, Level] = {
    "fp32": Level("fp32", apex="O0"),
    "tf32": Level("tf32"),
    "bf16": Level("bf16", apex="O1 in bf16"),
    "fp16": Level("fp16", apex="O1"),
    "bf16_o2": Level("bf16", weights="bf16", has_masters=True, apex="O2 in bf16"),
    "fp16_o2": Level("fp16", weights="fp16", has_masters=True, apex="O2"),
    "bf16_o3": Level("bf16", weights="bf16", apex="O3 in bf16"),
    "fp16_o3": Level("fp16", weights="fp16", apex="O3"),
}
