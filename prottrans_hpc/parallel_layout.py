"""How the ranks of a gang are laid out when a model is sharded: replicas x shards x tensor ranks. Pure, no torch.

Ranks that talk most are neighbours: those that share every matrix product are next to each other, then those that
share the weights, so that both stay within a node or a rack as long as they fit there. All ranks of one tensor group
see the same sequences; every tensor group is one rank of the data path.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from .errors import ConfigError
from .machine import Machine
from .recipe_parallel import Parallel


@dataclass(frozen=True)
class ParallelLayout:
    """rank = (replica * num_shards + shard) * num_tensor + tensor."""

    num_replicas: int
    """Copies of the model's state; their gradients are added up."""
    num_shards: int = 1
    """Ranks (tensor groups) that a copy's weights, gradients and optimizer state are cut over."""
    num_tensor: int = 1
    """Ranks that share every matrix product."""

    @property
    def num_ranks(self) -> int:
        """The world size."""
        return self.num_replicas * self.num_shards * self.num_tensor

    @property
    def num_data_ranks(self) -> int:
        """Ranks of the data path: so many shares has a step."""
        return self.num_replicas * self.num_shards

    def data_rank(self, rank: int) -> int:
        """Which share of the step a rank works on."""
        return rank // self.num_tensor

    def tensor_index(self, rank: int) -> int:
        """Which part of each matrix product a rank has; 0 speaks for its group."""
        return rank % self.num_tensor

    @property
    def is_plain(self) -> bool:
        """Whether every rank holds everything."""
        return self.num_shards == self.num_tensor == 1


def layout_on(parallel: Parallel, machine: Machine, num_ranks: int, *, degrees: Sequence[int] | None = None) -> ParallelLayout:
    """The layout of so many ranks on a machine. Raises ConfigError as `layout_of` does. Local "nodes" share one computer: nothing is far there."""
    if machine.scheduler == "local":
        return layout_of(replace(parallel, tensor_within="machine"), num_ranks=num_ranks, ranks_per_node=num_ranks, degrees=degrees)
    return layout_of(parallel, num_ranks=num_ranks, ranks_per_node=machine.ranks_per_node, nodes_per_rack=machine.nodes_per_rack, degrees=degrees)


def layout_of(
    parallel: Parallel, *, num_ranks: int, ranks_per_node: int, nodes_per_rack: int | None = None, degrees: Sequence[int] | None = None
) -> ParallelLayout:
    """What the recipe's section asks of so many ranks. Raises ConfigError that names the nearest sizes when they do not divide, or a group reaches too far.

    `degrees` are the sizes of tensor groups that the model can have, if they are known: others are not offered.
    """
    tensor = parallel.tensor_ranks
    _check_tensor_reach(parallel, ranks_per_node, nodes_per_rack, degrees)
    _check_whole(num_ranks, tensor, ranks_per_node, nodes_per_rack, f"tensor groups of {tensor} ranks (parallel.tensor_ranks)")
    shards = _SHARDS[parallel.sharding](parallel, num_ranks // tensor, ranks_per_node)
    if parallel.sharding == "hybrid" and num_ranks > 1:
        _check_copy(shards, tensor, ranks_per_node, nodes_per_rack)
        _check_whole(num_ranks, shards * tensor, ranks_per_node, nodes_per_rack, f"copies of the model over {shards * tensor} ranks")
    return ParallelLayout(num_ranks // (tensor * shards), shards, tensor)


def _hybrid_shards(parallel: Parallel, num_groups: int, ranks_per_node: int) -> int:
    return min(num_groups, parallel.shard_ranks or max(1, ranks_per_node // parallel.tensor_ranks))


_SHARDS: dict[str, Callable[[Parallel, int, int], int]] = {
    "none": lambda parallel, num_groups, ranks_per_node: 1,
    "full": lambda parallel, num_groups, ranks_per_node: num_groups,
    "hybrid": _hybrid_shards,
}
"""`(section, tensor groups, ranks of a node)` -> tensor groups that a copy is cut over."""


def _check_whole(num_ranks: int, unit: int, ranks_per_node: int, nodes_per_rack: int | None, what: str) -> None:
    if num_ranks % unit:
        nodes, step = num_ranks / ranks_per_node, unit // math.gcd(unit, ranks_per_node)
        # Who asked for whole racks is offered whole racks.
        whole_racks = nodes_per_rack is not None and num_ranks != ranks_per_node and num_ranks % (ranks_per_node * nodes_per_rack) == 0
        step = math.lcm(step, nodes_per_rack or 1) if whole_racks else step
        # Local ranks all count as one node: there, ranks are what can be chosen.
        now, step, of = (num_ranks, unit, "ranks") if num_ranks == ranks_per_node else (int(nodes), step, f"nodes of {ranks_per_node} ranks")
        near = [size for size in (now // step * step, (now // step + 1) * step) if size]
        racks = f" ({_either((size // (nodes_per_rack or 1) for size in near), 'or')} racks)" if whole_racks else ""
        raise ConfigError(f"{num_ranks:,} ranks are no whole number of {what}: take {_either(near, 'or')} {of}{racks}")


def _check_tensor_reach(parallel: Parallel, ranks_per_node: int, nodes_per_rack: int | None, degrees: Sequence[int] | None) -> None:
    tensor, within = parallel.tensor_ranks, parallel.tensor_within
    num_nodes = (nodes_per_rack or 1) if within == "rack" else 1
    if within == "machine" or _fits(tensor, ranks_per_node, num_nodes):
        return
    place = f"a rack of {num_nodes} nodes x {ranks_per_node} ranks" if num_nodes > 1 else f"a node of {ranks_per_node} ranks"
    near = _nearest(tensor, [size for size in tensor_sizes(parallel, ranks_per_node, nodes_per_rack) if size > 1 and (degrees is None or size in degrees)])
    offer = f"the nearest that would do{'' if degrees is None else ', for the model too'}: {_either(near)}"
    offer = offer if near else f"no size that the model can have does ({_either(size for size in degrees or () if size > 1)})"
    reaches = "rack" if within == "node" and nodes_per_rack and _fits(tensor, ranks_per_node, nodes_per_rack) else "machine"
    raise ConfigError(
        f"parallel.tensor_ranks = {tensor} does not divide {place}, and a tensor group talks twice a layer in both directions: "
        f"{offer}; or let a group reach further: --set parallel.tensor_within={reaches}"
    )


def tensor_sizes(parallel: Parallel, ranks_per_node: int, nodes_per_rack: int | None) -> list[int]:
    """Sizes of tensor groups that stay as near as the section wants them, ascending; not for groups that may reach over the machine."""
    return _sizes(ranks_per_node, (nodes_per_rack or 1) if parallel.tensor_within == "rack" else 1)


def _check_copy(shards: int, tensor: int, ranks_per_node: int, nodes_per_rack: int | None) -> None:
    if shards * tensor == 1:
        raise ConfigError(
            f"parallel.sharding = 'hybrid' cuts a copy of the model over the ranks of a node, and a node here has {ranks_per_node}: "
            "say over how many with --set parallel.shard_ranks=N, or take parallel.sharding=full"
        )
    if not _fits(shards * tensor, ranks_per_node, nodes_per_rack):
        possible = [size // tensor for size in _sizes(ranks_per_node, nodes_per_rack or shards * tensor) if size % tensor == 0]
        racks = f" and racks of {nodes_per_rack} nodes" if nodes_per_rack else ""
        raise ConfigError(
            f"copies of the model over {shards * tensor} ranks fit neither nodes of {ranks_per_node} ranks{racks}: "
            f"the nearest values of parallel.shard_ranks that do are {_either(_nearest(shards, possible))}"
        )


def _fits(group: int, ranks_per_node: int, nodes: int | None) -> bool:
    """Whether groups of neighbours never straddle a node, or are whole nodes that never straddle so many (None: no limit)."""
    if ranks_per_node % group == 0:
        return True
    return group % ranks_per_node == 0 and (nodes is None or nodes % (group // ranks_per_node) == 0)


def _sizes(ranks_per_node: int, nodes: int | None) -> list[int]:
    whole = [ranks_per_node * number for number in range(1, (nodes or 1) + 1) if (nodes or 1) % number == 0]
    return sorted({size for size in range(1, ranks_per_node + 1) if ranks_per_node % size == 0} | set(whole))


def _nearest(wanted: int, possible: Iterable[int]) -> list[int]:
    ordered = sorted(possible)
    below, above = [size for size in ordered if size < wanted], [size for size in ordered if size > wanted]
    return [*below[-1:], *above[:1]]


def _either(sizes: Iterable[int], word: str = "and") -> str:
    return f" {word} ".join(f"{size:,}" for size in sizes)
