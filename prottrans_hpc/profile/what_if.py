"""What other settings would do to a step on so many nodes: one changed at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from .collectives import Fabric
from .cost_model import MIB, Manner, Work, predict, with_micro_batches
from .stragglers import Spread

_BUCKETS_MIB = (5, 25, 100, 400)
_ACCUMULATION = (2, 4)
_ALGORITHM_TEXT = {
    "ring": "flat ring over all ranks",
    "tree": "two trees over the nodes (NCCL's)",
    "halving_doubling": "recursive halving and doubling (MPI's)",
    "ring_or_tree": "ring or tree, whichever is faster (NCCL)",
    "hierarchical": "hierarchical: within nodes, between nodes, within nodes",
}


def rows(work: Work, manner: Manner, fabric: Fabric, num_nodes: int, spread: Spread) -> list[dict[str, Any]]:
    """One row a change, "as it is" first; `speed` is samples a second relative to that, the overhead that of the same change on one node."""
    basis = predict(work, manner, fabric, num_nodes, spread).step_s
    found = []
    for text, factor, changed_work, changed in _changes(work, manner, fabric):
        step = predict(changed_work, changed, fabric, num_nodes, spread)
        alone = predict(changed_work, changed, fabric, 1, spread)
        found.append(
            {
                "change": text,
                "nodes": num_nodes,
                "step_s": step.step_s,
                "exposed_comm_s": step.exposed_comm_s,
                "overhead": step.step_s / alone.step_s - 1.0,
                "efficiency": alone.step_s / step.step_s,
                "speed": factor * basis / step.step_s,
            }
        )
    return found


def _changes(work: Work, manner: Manner, fabric: Fabric) -> Iterator[tuple[str, int, Work, Manner]]:
    yield "as it is", 1, work, manner
    for size in _BUCKETS_MIB:
        if size * MIB != manner.bucket_bytes:
            yield f"buckets of {size} MiB", 1, work, replace(manner, bucket_bytes=float(size * MIB))
    yield "one bucket: nothing overlaps", 1, work, replace(manner, bucket_bytes=work.gradient_bytes)
    yield "gradients sent in half the bytes", 1, work, replace(manner, sent_fraction=0.5 * manner.sent_fraction)
    for factor in _ACCUMULATION:
        yield f"{factor} times the micro batches a step", factor, *with_micro_batches(work, manner, factor)
    for name, text in _ALGORITHM_TEXT.items():
        if name != manner.algorithm and (name != "hierarchical" or fabric.ranks_per_node > 1):
            yield text, 1, work, replace(manner, algorithm=name)
