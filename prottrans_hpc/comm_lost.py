"""Which errors of torch's back ends mean that another rank is gone, or silent for too long."""

from __future__ import annotations

import torch
import torch.distributed as dist

_LOST = (
    "connection closed by peer",
    "connection reset by peer",
    "timed out",
    "timeout",
    "broken pipe",
    "connection refused",
    "socket",
    "nccl",
    "connectfullmesh",
)


def is_lost_peer(error: BaseException) -> bool:
    """Whether an error means that another rank is gone: gloo raises bare RuntimeErrors, told apart by their text alone."""
    if isinstance(error, (dist.DistError, ConnectionError)):
        return True
    if isinstance(error, (torch.OutOfMemoryError, OSError)):
        return False
    text = str(error).lower()
    return any(mark in text for mark in _LOST)
