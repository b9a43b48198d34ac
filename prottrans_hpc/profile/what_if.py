"""What other settings would do to a step on so many nodes: one changed at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from .collectives import Fabric
from .cost_model import MIB, Manner, Work, predict, with_micro_batches
from .sharded_cost import Cut
from .stragglers import Spread

NO_CUTS: Mapping[str, Cut] = MappingProxyType({})

_BUCKETS_MIB = (5, 25, 100, 400)
_ACCUMULATION = (2, 4)
_ALGORITHM_TEXT = {
    "ring": "flat ring over all ranks",
    "tree": "two trees over the nodes (NCCL's)",
    "halving_doubling": "recursive halving and doubling (MPI's)",
    "ring_or_tree": "ring or tree, whichever is faster (NCCL)",
    "hierarchical": "hierarchical: within nodes, between nodes, within nodes",
}


def rows(work: Work, manner: Manner, fabric: Fabric, num_nodes: int, spread: Spread, *, cuts: Mapping[str, Cut] = NO_CUTS) -> list[dict[str, Any]]:
    """One row a change, "as it is" first; `speed` is samples a second relative to that, the overhead that of the same change on one node.

    `cuts` are other ways to cut the model over the ranks, by their names.
    """
    basis = predict(work, manner, fabric, num_nodes, spread).step_s
    found = []
    for text, factor, changed_work, changed in _changes(work, manner, fabric, cuts):
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


def other_cuts(cut: Cut, ranks_per_node: int) -> dict[str, Cut]:
    """The model cut over all ranks, and over those of each node, with the tensor groups that it has."""
    within = ranks_per_node // cut.tensor_ranks
    over_all = {"the model cut over all ranks": replace(cut, shards=None)}
    return over_all | ({"the model cut within each node, a copy on every node": replace(cut, shards=within)} if within > 1 else {})


def _changes(work: Work, manner: Manner, fabric: Fabric, cuts: Mapping[str, Cut]) -> Iterator[tuple[str, int, Work, Manner]]:
    yield "as it is", 1, work, manner
    if manner.cut is None:
        yield from _other_sums(work, manner, fabric)
    for factor in _ACCUMULATION:
        yield f"{factor} times the micro batches a step", factor, *with_micro_batches(work, manner, factor)
    for text, cut in cuts.items():
        if cut != manner.cut:
            yield text, 1, work, replace(manner, cut=cut)
    if manner.cut is not None and manner.cut.tensor_ranks == 1:
        yield "every rank holds the whole model", 1, work, replace(manner, cut=None)


def _other_sums(work: Work, manner: Manner, fabric: Fabric) -> Iterator[tuple[str, int, Work, Manner]]:
    """Of gradients that go in buckets."""
    for size in _BUCKETS_MIB:
        if size * MIB != manner.bucket_bytes:
            yield f"buckets of {size} MiB", 1, work, replace(manner, bucket_bytes=float(size * MIB))
    yield "one bucket: nothing overlaps", 1, work, replace(manner, bucket_bytes=work.gradient_bytes)
    yield "gradients sent in half the bytes", 1, work, replace(manner, sent_fraction=0.5 * manner.sent_fraction)
    for name, text in _ALGORITHM_TEXT.items():
        if name != manner.algorithm and (name != "hierarchical" or fabric.ranks_per_node > 1):
            yield text, 1, work, replace(manner, algorithm=name)
