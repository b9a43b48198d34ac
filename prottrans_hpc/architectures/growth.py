"""A model of another depth: what studies of memory grow."""

from __future__ import annotations

import dataclasses
from typing import Any


def grown(shape: Any, num_layers: int) -> Any:
    """The shape with so many layers; a decoder and a generator keep their proportion to them."""
    ratio = num_layers / shape.num_layers
    changed: dict[str, Any] = {"num_layers": num_layers}
    if getattr(shape, "num_decoder_layers", 0):
        changed["num_decoder_layers"] = max(1, round(shape.num_decoder_layers * ratio))
    for field in dataclasses.fields(shape):
        value: Any = getattr(shape, field.name)
        if hasattr(value, "num_layers"):
            changed[field.name] = dataclasses.replace(value, num_layers=max(1, round(value.num_layers * ratio)))
    return dataclasses.replace(shape, **changed)
