"""A projection from a machine's numbers alone: nothing in it was measured, and it says so."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from .. import architecture
from ..precision_levels import LEVELS
from ..recipe_parallel import Parallel
from . import what_if
from .collectives import Fabric, Wire
from .cost_model import MIB, Manner, Work, predict
from .model_facts import ModelFacts, model_facts
from .sharded_cost import Cut
from .stragglers import NONE

ALGORITHM_OF = {"flat": "ring_or_tree", "hierarchical": "hierarchical"}
"""What a recipe's `parallel.reduction` is taken to be."""
_TEXT = {"flat": "ring or tree, whichever is faster", "hierarchical": "within nodes, between nodes, within nodes"}
SLOW_LINKS = 2.0
"""The upper edge of the band: links that reach only one part in so many of what the profile says, and answer so much later."""


def project(assumed: Mapping[str, Any], nodes: list[int], *, with_changes: bool) -> dict[str, Any]:
    """The content of projection.json; `assumed` is a `launch.assumed_scaling.Assumed` as plain values."""
    work = Work(assumed["forward_s"], assumed["backward_s"], 0.0, float(assumed["gradient_bytes"]))
    facts = _facts(assumed)
    manner = _manner(assumed, facts)
    fabric, slow = (_fabric(assumed, slower) for slower in (1.0, SLOW_LINKS))
    network = assumed["network"]
    return {
        "basis": "assumed",
        "recipe": assumed["recipe"],
        "machine": assumed["machine"],
        "algorithm": manner.algorithm,
        "fit": None,
        "hold_out": None,
        "assumptions": [
            *assumed["assumptions"],
            *_cut_lines(assumed, facts, manner),
            f"between nodes: {_link_text(network['between_nodes'])}; {_within_text(network['within_node'])}; reductions: {_TEXT[assumed['reduction']]}",
            f"the range: from links as stated to links {SLOW_LINKS:g} times slower; it is no confidence interval",
        ],
        "warnings": [],
        "points": [_point(work, manner, fabric, slow, number) for number in nodes],
        "what_if": what_if.rows(work, manner, fabric, nodes[-1], NONE, cuts=_cuts(assumed, facts, fabric)) if with_changes else [],
    }


def _facts(assumed: Mapping[str, Any]) -> ModelFacts:
    chosen = architecture.get(assumed["architecture"])
    return model_facts(chosen, chosen.size(assumed["size"]).shape, Parallel(**assumed["parallel"]))


def _manner(assumed: Mapping[str, Any], facts: ModelFacts) -> Manner:
    parallel = Parallel(**assumed["parallel"])
    plain = Manner(float(assumed["bucket_mib"] * MIB), ALGORITHM_OF[assumed["reduction"]], assumed["sent_fraction"], assumed["micro_batches"])
    if parallel.sharding != "none" or parallel.tensor_ranks > 1:
        return replace(plain, cut=_cut(assumed, facts, _shards(parallel, assumed["ranks_per_node"])))
    if parallel.compression != "powersgd":
        return plain
    sent_bytes = facts.factor_numbers * LEVELS[assumed["precision"]].weight_bytes
    return replace(plain, sent_fraction=sent_bytes / assumed["gradient_bytes"], sums=2, compress_s=facts.factor_flops / (assumed["tflops"] * 1e12))


def _shards(parallel: Parallel, ranks_per_node: int) -> int | None:
    within = parallel.shard_ranks or max(1, ranks_per_node // parallel.tensor_ranks)
    return {"none": 1, "full": None, "hybrid": within}[parallel.sharding]


def _cut(assumed: Mapping[str, Any], facts: ModelFacts, shards: int | None) -> Cut:
    num_bytes = 2 if LEVELS[assumed["precision"]].is_half else 4
    activations = assumed["tokens"] * facts.hidden_size * num_bytes
    return Cut(shards, facts.units, float(assumed["gradient_bytes"]), assumed["parallel"]["tensor_ranks"], activations)


def _cuts(assumed: Mapping[str, Any], facts: ModelFacts, fabric: Fabric) -> dict[str, Cut]:
    """Other ways to cut the same model, by their names in a table; over Horovod there are none."""
    if assumed["parallel"]["comm"] != "torch":
        return {}
    return what_if.other_cuts(_cut(assumed, facts, None), fabric.ranks_per_node)


def _cut_lines(assumed: Mapping[str, Any], facts: ModelFacts, manner: Manner) -> Iterator[str]:
    if manner.cut is not None:
        tensor = (
            f"; tensor groups of {manner.cut.tensor_ranks} sum {manner.cut.activation_bytes / MIB:.3g} MiB four times a layer"
            if manner.cut.tensor_ranks > 1
            else ""
        )
        yield f"cut: {facts.units} equal parts, each brought together before its passes while the one before is computed{tensor}"
    if manner.sums > 1:
        yield (
            f"PowerSGD: {facts.factor_numbers / 1e6:,.2f} M numbers in two sums a bucket, and {facts.factor_flops / 1e9:,.3g} GFLOP a step on top, "
            "at the same rate; its orthogonal bases take no time"
        )


def _fabric(assumed: Mapping[str, Any], slower: float) -> Fabric:
    between, within = (_wire(assumed["network"][name], slower) for name in ("between_nodes", "within_node"))
    assert between is not None
    return Fabric(assumed["ranks_per_node"], between, within)


def _wire(link: Mapping[str, float] | None, slower: float) -> Wire | None:
    return Wire(slower * link["latency_s"], link["bytes_per_s"] / slower) if link else None


def _point(work: Work, manner: Manner, fabric: Fabric, slow: Fabric, number: int) -> dict[str, Any]:
    step, latest = predict(work, manner, fabric, number), predict(work, manner, slow, number)
    # Of overheads each edge is compared with its own single node.
    overhead, most = (to.step_s / predict(work, manner, on, 1).step_s - 1.0 for to, on in ((step, fabric), (latest, slow)))
    low, high = sorted((overhead, most))
    return {
        "nodes": number,
        "ranks": number * fabric.ranks_per_node,
        "step_s": step.step_s,
        "step_s_low": step.step_s,
        "step_s_high": latest.step_s,
        "overhead": overhead,
        "overhead_low": low,
        "overhead_high": high,
        "efficiency": 1.0 / (1.0 + overhead),
        "efficiency_low": 1.0 / (1.0 + high),
        "efficiency_high": 1.0 / (1.0 + low),
        "local_s": step.local_s,
        "straggler_s": step.straggler_s,
        "communication_s": step.communication_s,
        "exposed_comm_s": step.exposed_comm_s,
    }


def _link_text(link: Mapping[str, float]) -> str:
    return f"{link['bytes_per_s'] / 1e9:g} GB/s and {1e6 * link['latency_s']:g} us"


def _within_text(link: Mapping[str, float] | None) -> str:
    return f"within a node {_link_text(link)}" if link else "within a node nothing is counted"
