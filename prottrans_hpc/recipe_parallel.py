"""The recipe's section `[parallel]`: how the ranks share the work and how they talk."""

from __future__ import annotations

from typing import Any, Literal

from pydantic.dataclasses import dataclass

from .config import STRICT, Count


@dataclass(frozen=True, config=STRICT)
class Parallel:
    """How ranks talk."""

    comm: Literal["torch", "horovod"] = "torch"
    """torch.distributed (gloo or nccl) or Horovod; one rank needs neither."""
    bucket_mib: Count = 25
    """Size of a gradient bucket, MiB."""
    timeout_s: Count = 600
    """A collective that takes longer means a dead rank: the whole gang ends."""
    sharding: Literal["none", "full", "hybrid"] = "none"
    """Every rank holds the whole model; or one copy of weights, gradients and optimizer state is cut over all ranks; or over the
    ranks of a node (`shard_ranks`), with a copy on every node."""
    shard_ranks: Count | None = None
    """With sharding = "hybrid": over so many ranks (tensor groups, where there are any) a copy is cut; without it, over those of a node."""
    tensor_ranks: Count = 1
    """So many neighbouring ranks share every large matrix product: each has some of the attention heads and a part of the feed-forward width."""
    tensor_within: Literal["node", "rack", "machine"] = "node"
    """How far ranks of a tensor group may be apart: they talk twice a layer in both directions."""
    reduction: Literal["flat", "hierarchical"] = "flat"
    """Gradients are summed over all ranks at once, or within each node first, so that less of them crosses between the nodes."""
    compression: Literal["none", "fp16", "bf16", "powersgd"] = "none"
    """What gradients are made smaller by on their way; all but none are lossy, and part of what defines the result."""
    powersgd_rank: Count = 4
    """Rank of the two factors that stand for a gradient with compression = "powersgd"; more is nearer to the gradient, and larger."""

    def __post_init__(self) -> None:
        if self.comm == "horovod" and (self.sharding, self.tensor_ranks) != ("none", 1):
            raise ValueError("Horovod keeps the whole model on every rank: sharding and tensor_ranks are those of torch.distributed, so set comm = 'torch'")
        if self.shard_ranks is not None and self.sharding != "hybrid":
            raise ValueError(f"shard_ranks is for sharding = 'hybrid'; it is {self.sharding!r}")
        if (self.sharding, self.tensor_ranks) != ("none", 1) and (self.reduction, self.compression) != ("flat", "none"):
            raise ValueError("reduction and compression are for models that every rank holds whole: leave them out with sharding and tensor_ranks")


HALVED = ("fp16", "bf16")
"""Compressions that are exchanged in 16 bits, and summed within the nodes first, whatever the reduction is."""


def lossy(parallel: Parallel) -> dict[str, Any]:
    """What of this section changes the result of a run: nothing by default."""
    if parallel.compression == "none":
        return {}
    rank = {"rank": parallel.powersgd_rank} if parallel.compression == "powersgd" else {}
    return {"compression": {"name": parallel.compression, **rank}}
