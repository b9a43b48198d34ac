"""The [optimizer] section of a recipe: one record an optimizer, told apart by its `name`.

What each does with a gradient is in `prottrans_hpc.train`. Weight decay never touches biases and norm weights.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from .config import STRICT, NonNegative, Positive


@dataclass(frozen=True, config=STRICT, kw_only=True)
class _Common:
    learning_rate: Positive
    """The peak, after warm-up; a phase may have its own."""
    weight_decay: NonNegative = 0.01
    clip_norm: NonNegative = 1.0
    """Largest global L2 norm of the gradient; 0 switches clipping off."""


@dataclass(frozen=True, config=STRICT, kw_only=True)
class _TwoMoments(_Common):
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: Positive = 1e-6

    def __post_init__(self) -> None:
        if not (0.0 <= self.beta1 < 1.0 and 0.0 <= self.beta2 < 1.0):
            raise ValueError("beta1 and beta2 must be at least 0 and below 1")


@dataclass(frozen=True, config=STRICT, kw_only=True)
class Lamb(_TwoMoments):
    """You et al. 2020, algorithm 2; the decay is decoupled."""

    name: Literal["lamb"] = "lamb"


@dataclass(frozen=True, config=STRICT, kw_only=True)
class AdamW(_TwoMoments):
    """Loshchilov and Hutter 2019, algorithm 2: Adam with decoupled decay."""

    name: Literal["adamw"] = "adamw"


@dataclass(frozen=True, config=STRICT, kw_only=True)
class Adam(_TwoMoments):
    """Kingma and Ba 2015, algorithm 1; the decay is an L2 term in the gradient, added after clipping."""

    name: Literal["adam"] = "adam"
    weight_decay: NonNegative = 0.0
    epsilon: Positive = 1e-8


@dataclass(frozen=True, config=STRICT, kw_only=True)
class Adafactor(_Common):
    """Shazeer and Stern 2018, without a first moment, as T5 used it: the learning rate is relative to the size of the weights."""

    name: Literal["adafactor"] = "adafactor"
    weight_decay: NonNegative = 0.0
    clip_norm: NonNegative = 0.0
    decay_exponent: Annotated[float, Field(gt=0.0, le=1.0)] = 0.8
    """The second moment of update t forgets at the rate 1 - t^-decay_exponent (section 7.2)."""
    clip_update: Positive = 1.0
    """Largest root mean square of a tensor's update before it is multiplied by the rate: d of section 6."""
    scale_by_parameter: bool = True
    """Multiply the rate by the root mean square of the tensor (section 8), or by `smallest_scale` where that is more."""
    smallest_scale: Positive = 1e-3
    epsilon: Positive = 1e-30
    """Added to squared gradients."""


Optimizer = Annotated[Lamb | AdamW | Adam | Adafactor, Field(discriminator="name")]
