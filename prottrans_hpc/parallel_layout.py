"""How the ranks of a gang are laid out when a model is sharded: replicas x shards x tensor ranks. Pure, no torch.

Ranks that talk most are neighbours: those that share every matrix product are next to each other, then those that
share the weights, so that both stay within a node or a rack as long as they fit there. All ranks of one tensor group
see the same sequences; every tensor group is one rank of the data path.
"""

from __future__ import annotations

from dataclasses import dataclass


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
