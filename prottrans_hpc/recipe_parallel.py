"""The recipe's section `[parallel]`: how the ranks share the work and how they talk."""

from __future__ import annotations

from typing import Literal

from pydantic.dataclasses import dataclass

from .config import STRICT, Count


@dataclass(frozen=True, config=STRICT)
class Parallel:
    """How ranks talk."""

    comm: Literal["torch", "horovod"] = "torch"
    """torch.distributed (DDP over gloo or nccl) or Horovod; one rank needs neither."""
    bucket_mib: Count = 25
    """Size of a gradient bucket, MiB."""
    timeout_s: Count = 600
    """A collective that takes longer means a dead rank: the whole gang ends."""
