"""What a cost model has to know of a model's tensors: how many parts are brought together by themselves, and what PowerSGD makes of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..architecture import Architecture
from ..comm_compression import is_worth_it
from ..recipe_parallel import Parallel
from ..stage import find


@dataclass(frozen=True)
class ModelFacts:
    """Of one size of an architecture."""

    units: int
    """Layers, which a cut model brings together one by one, and the rest."""
    hidden_size: int
    """Of an activation of one token."""
    factor_numbers: int
    """Numbers that a rank sends for its gradients as PowerSGD's factors, those that are too small for it whole."""
    factor_flops: float
    """That making the factors, and gradients from them, takes in a step: three products of a matrix with a factor."""


def model_facts(record: Architecture, shape: Any, parallel: Parallel) -> ModelFacts:
    """Found on a model without memory."""
    with torch.device("meta"):
        module: nn.Module = find(record.build)(shape)
    gradients = [parameter for parameter in module.parameters() if parameter.requires_grad]
    rank, numbers, flops = parallel.powersgd_rank, 0, 0.0
    for gradient in gradients:
        if not is_worth_it(gradient, rank):
            numbers += gradient.numel()
            continue
        rows, columns = gradient.shape[0], gradient.numel() // gradient.shape[0]
        numbers += (rows + columns) * rank
        flops += 6.0 * rows * columns * rank
    return ModelFacts(_num_units(module), int(shape.hidden_size), numbers, flops)


def _num_units(module: nn.Module) -> int:
    """As `comm_sharded` cuts it."""
    lists = [part for part in module.modules() if isinstance(part, nn.ModuleList)]
    return 1 + sum(not isinstance(layer, nn.ModuleList) for layers in lists for layer in layers)
