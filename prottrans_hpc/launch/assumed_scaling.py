"""A training's work on a machine that nobody measured: what a projection of its scaling starts from, in numbers, and what they assume. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .. import architecture, config
from ..errors import ConfigError
from ..machine import Machine
from ..precision_levels import LEVELS
from ..recipe import Recipe
from ..recipe_parallel import HALVED
from .batch_arithmetic import ASSUMED_MEAN_RESIDUES, PhaseBatch, mean_tokens, plan_batches
from .memory_time import recomputed_share
from .rate import Rate, rate_of
from .sharding_fit import check_sharding

_FORWARD_SHARE = 1.0 / 3.0
"""Of the operations of both passes, as the architectures count them."""
_HALF_BYTES = 2
"""Of a gradient that is sent in fp16 or bf16."""


@dataclass(frozen=True)
class Assumed:
    """What is taken for granted of one training on one machine; goes into a request as it is."""

    recipe: str
    machine: str
    ranks_per_node: int
    network: dict[str, Any]
    """As in the profile."""
    forward_s: float
    backward_s: float
    gradient_bytes: int
    bucket_mib: int
    micro_batches: int
    reduction: str
    """As in the recipe."""
    sent_fraction: float
    """Bytes on the wire for a byte of gradient; of PowerSGD, whose bytes depend on every tensor's shape, 1."""
    architecture: str
    size: str
    precision: str
    parallel: dict[str, Any]
    """The recipe's section."""
    tokens: float
    """Of a micro batch."""
    tflops: float
    """Of a rank."""
    assumptions: tuple[str, ...]
    """A line each."""


def assume(name: str, recipe: Recipe, machine: Machine, nodes: Sequence[int], *, utilisation: float | None) -> Assumed:
    """A weak study of the recipe's first phase: each rank has the share that the largest of `nodes` would give it.

    Raises ConfigError where the profile says too little of the machine, or has not so many nodes, or where the model cannot be cut over them so.
    """
    if machine.network is None:
        raise ConfigError(
            f"the profile of {machine.name} has no [network] section, so nothing is known of its links: write one (hpc/README.md has the keys), "
            f"or measure and project from that: prottrans scale {name} --machine {machine.name} ..., then prottrans project-scaling DIR"
        )
    if max(nodes) > machine.max_nodes:
        raise ConfigError(f"--nodes {max(nodes):,}: a job on {machine.name} has at most {machine.max_nodes:,} nodes")
    rate = _rate(recipe, machine, utilisation)
    batch = plan_batches(recipe, num_ranks=max(nodes) * machine.ranks_per_node)[0]
    chosen = architecture.get(recipe.architecture.name)
    shape: Any = chosen.size(recipe.architecture.size).shape
    tokens = mean_tokens(chosen, batch)
    for number in nodes:
        check_sharding(recipe, machine, chosen, shape, num_ranks=number * machine.ranks_per_node)
    compute_s = batch.sequences_per_rank * chosen.flops(shape, [tokens]) / (rate.flops_per_s * recipe.parallel.tensor_ranks)
    again = recomputed_share(recipe, chosen, shape, [tokens])
    level = LEVELS[recipe.precision]
    return Assumed(
        recipe=name,
        machine=machine.name,
        ranks_per_node=machine.ranks_per_node,
        network=config.to_json(machine.network),
        forward_s=_FORWARD_SHARE * compute_s,
        backward_s=(1.0 - _FORWARD_SHARE + again) * compute_s,
        gradient_bytes=chosen.num_parameters(shape) * level.weight_bytes,
        bucket_mib=recipe.parallel.bucket_mib,
        micro_batches=batch.num_micro_batches,
        reduction=recipe.parallel.reduction,
        sent_fraction=min(1.0, _HALF_BYTES / level.weight_bytes) if recipe.parallel.compression in HALVED else 1.0,
        architecture=chosen.name,
        size=recipe.architecture.size,
        precision=recipe.precision,
        parallel=config.to_json(recipe.parallel),
        tokens=batch.sequences_per_rank * tokens / batch.num_micro_batches,
        tflops=rate.flops_per_s / 1e12,
        assumptions=(
            _batch_line(batch, max(nodes), lanes=chosen.lanes),
            f"computing: {rate.source}: {(1.0 + again) * compute_s:.3g} s a step, {_backward_text(again)}",
            f"gradients: {chosen.num_parameters(shape) / 1e6:,.0f} M of {level.weight_bytes} bytes ({recipe.precision}), {_sending_text(recipe)}",
            "all nodes are equally fast, data and optimizer take no time, nobody else uses the network",
        ),
    )


def _backward_text(again: float) -> str:
    return "the backward pass two thirds of it" if not again else f"{100 * again / (1.0 + again):.0f} % of it layers that are computed again"


def _sending_text(recipe: Recipe) -> str:
    parallel = recipe.parallel
    if (parallel.sharding, parallel.tensor_ranks) != ("none", 1):
        return "cut over ranks with the weights, layer by layer"
    compressed = "" if parallel.compression == "none" else f", in {parallel.compression}"
    return f"in buckets of {parallel.bucket_mib} MiB, sent while the backward pass goes on{compressed}"


def _rate(recipe: Recipe, machine: Machine, utilisation: float | None) -> Rate:
    gpu = machine.node.gpu
    if gpu is None:
        raise ConfigError(f"{machine.name} has no GPUs, and what its CPU cores reach is not known: measure with prottrans scale, then project from that")
    rate = rate_of(gpu, recipe.precision, utilisation=utilisation)
    if rate is None:
        raise ConfigError(f"{gpu.name} of {machine.name} does not compute in {LEVELS[recipe.precision].products}; it does in {', '.join(gpu.peak_tflops)}")
    return rate


def _batch_line(batch: PhaseBatch, num_nodes: int, *, lanes: bool) -> str:
    length = f"{batch.mean_residues:.0f} tokens of a lane" if lanes else f"{min(batch.mean_residues, ASSUMED_MEAN_RESIDUES):.0f} residues on the mean"
    return f"batch: {batch.sequences_per_rank:.3g} sequences a rank at every size, as the recipe's first phase has on {num_nodes:,} nodes; {length}"
