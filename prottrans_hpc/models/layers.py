"""What three or more architectures share: building without default weights, tables, and recomputing a layer to save memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..memory.keeping import recompute

Built = TypeVar("Built", bound=nn.Module)


def build_empty(make: Callable[[], Built]) -> Built:
    """The modules on torch's default device; the weights are undefined until `initialise` or `load_state_dict`."""
    device = torch.get_default_device()
    with torch.device("meta"):  # spares the default initialisation, seconds for the published sizes
        module = make()
    if device.type == "meta":
        return module
    # Not to_empty(): on meta tensors that takes a path through torch which imports sympy, a second at every start.
    module._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device=device))  # type: ignore[no-untyped-call] # of torch
    return module


def table(num_rows: int, width: int) -> nn.Embedding:
    """An embedding table without weights yet."""
    # Given its weight, it draws none: on the meta device that would import torch's compiler, seconds at every start.
    return nn.Embedding(num_rows, width, _weight=torch.empty(num_rows, width))


def compute_dtype(hidden: Tensor) -> torch.dtype:
    """The type of the matrix products: autocast's where that is on."""
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def run_layer(index: int, every: int, layer: Callable[..., Any], *arguments: Any) -> Any:
    """Call the layer of this number; every `every`-th one keeps its inputs only and is computed again for the gradient (0: none).

    Chen et al. 2016, Training Deep Nets with Sublinear Memory Cost. What the layer draws at random is drawn again alike; what it keeps beside
    its inputs says the policy in force (`memory.keeping`).
    """
    if every and index % every == 0 and torch.is_grad_enabled():
        return recompute(layer, *arguments)
    return layer(*arguments)
