"""A projection from a machine's numbers alone: nothing in it was measured, and it says so."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import what_if
from .collectives import Fabric, Wire
from .cost_model import MIB, Manner, Work, predict
from .stragglers import NONE

ALGORITHM_OF = {"flat": "ring_or_tree", "hierarchical": "hierarchical"}
"""What a recipe's `parallel.reduction` is taken to be."""
_TEXT = {"flat": "ring or tree, whichever is faster", "hierarchical": "within nodes, between nodes, within nodes"}
SLOW_LINKS = 2.0
"""The upper edge of the band: links that reach only one part in so many of what the profile says, and answer so much later."""


def project(assumed: Mapping[str, Any], nodes: list[int], *, with_changes: bool) -> dict[str, Any]:
    """The content of projection.json; `assumed` is a `launch.assumed_scaling.Assumed` as plain values."""
    work = Work(assumed["forward_s"], assumed["backward_s"], 0.0, float(assumed["gradient_bytes"]))
    manner = Manner(float(assumed["bucket_mib"] * MIB), ALGORITHM_OF[assumed["reduction"]], assumed["sent_fraction"], assumed["micro_batches"])
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
            f"between nodes: {_link_text(network['between_nodes'])}; {_within_text(network['within_node'])}; reductions: {_TEXT[assumed['reduction']]}",
            f"the range: from links as stated to links {SLOW_LINKS:g} times slower; it is no confidence interval",
        ],
        "warnings": [],
        "points": [_point(work, manner, fabric, slow, number) for number in nodes],
        "what_if": what_if.rows(work, manner, fabric, nodes[-1], NONE) if with_changes else [],
    }


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
