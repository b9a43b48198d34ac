"""Racks, nodes and GPUs into nodes."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prottrans_hpc.errors import ConfigError
from prottrans_hpc.launch.demand import Demand
from prottrans_hpc.launch.racks import count_nodes, has_whole_racks, largest_rack_count
from prottrans_hpc.machine import read_machine

WORKING = [
    ("summit", {"num_racks": 52}, (936, 52)),
    ("summit", {"num_nodes": 936}, (936, 52)),
    ("summit", {"num_gpus": 5616}, (936, 52)),
    ("summit", {"num_racks": 256}, (4608, 256)),
    ("summit", {"num_nodes": 930, "partial_rack": True}, (930, None)),
    ("summit", {"num_gpus": 6, "partial_rack": True}, (1, None)),
    ("summit", {"partial_rack": True}, (1, None)),
    # Whole racks may fill the nodes by chance: --partial-rack still means any nodes.
    ("summit", {"num_nodes": 18, "partial_rack": True}, (18, None)),
    ("nvl72", {"num_gpus": 144}, (36, 2)),
    # A rack is only a number of nodes where a job cannot ask for whole ones.
    ("frontier", {"num_racks": 2}, (256, None)),
    ("frontier", {"num_nodes": 130}, (130, None)),
    ("perlmutter", {"num_gpus": 8}, (2, None)),
    ("slurm_cluster", {}, (1, None)),
    ("laptop", {}, (1, None)),
    ("laptop", {"num_nodes": 3}, (3, None)),
]


@pytest.mark.parametrize(("machine", "sizes", "expected"), WORKING)
def test_sizes_that_work(machine: str, sizes: dict[str, Any], expected: tuple[int, int | None]) -> None:
    assert count_nodes(read_machine(machine), Demand(**sizes)) == expected


REFUSED = [
    ("summit", {"num_nodes": 930}, "take 51 racks = 918 nodes or 52 racks = 936 nodes, or give --partial-rack"),
    ("summit", {"num_nodes": 1}, "take 1 rack = 18 nodes, or give --partial-rack"),
    ("summit", {"num_nodes": 4607}, "take 255 racks = 4590 nodes or 256 racks = 4608 nodes"),
    ("summit", {"num_nodes": 4609}, "1 to 4608 nodes (256 racks); 4609 were"),
    ("summit", {"num_racks": 257}, "1 to 256 racks of 18 nodes; 257 were"),
    ("summit", {"num_racks": 0}, "1 to 256 racks"),
    ("summit", {}, "--racks R (1 to 256 of 18 nodes on summit)"),
    ("summit", {"num_gpus": 5617}, "take 5,616 GPUs = 52 racks = 936 nodes or 5,724 GPUs = 53 racks = 954 nodes, or give --partial-rack"),
    ("summit", {"num_gpus": 5600}, "take 5,508 GPUs = 51 racks = 918 nodes or 5,616 GPUs = 52 racks = 936 nodes, or give --partial-rack"),
    ("summit", {"num_gpus": 5600, "partial_rack": True}, "take 5,598 GPUs = 933 nodes or 5,604 GPUs = 934 nodes"),
    ("perlmutter", {"num_gpus": 5}, "take 4 GPUs = 1 node or 8 GPUs = 2 nodes"),
    ("summit", {"num_gpus": 5}, "take 108 GPUs = 1 rack = 18 nodes, or"),
    ("summit", {"num_gpus": 27_649}, "take 27,648 GPUs = 256 racks = 4608 nodes"),
    ("frontier", {"num_racks": 75}, "1 to 74 racks of 128 nodes; 75 were"),
    ("slurm_cluster", {"num_racks": 1}, "has no racks that a job could ask for: give --nodes N (1 to 4)"),
    ("laptop", {"num_racks": 1}, "has no racks"),
    ("laptop", {"num_gpus": 1}, "laptop has no GPUs"),
    ("rhea", {"num_gpus": 1}, "rhea has no GPUs"),
]


@pytest.mark.parametrize(("machine", "sizes", "said"), REFUSED)
def test_sizes_that_do_not_work_are_answered_with_the_nearest(machine: str, sizes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        count_nodes(read_machine(machine), Demand(**sizes))
    assert said in str(caught.value)


@given(st.integers(1, 4608))
def test_every_node_count_is_whole_racks_or_is_offered_some(num_nodes: int) -> None:
    summit = read_machine("summit")
    if num_nodes % 18 == 0:
        assert count_nodes(summit, Demand(num_nodes=num_nodes)) == (num_nodes, num_nodes // 18)
        return
    with pytest.raises(ConfigError) as caught:
        count_nodes(summit, Demand(num_nodes=num_nodes))
    offered = [int(word) for word in str(caught.value).partition("take ")[2].split() if word.isdigit()][1::2]
    assert offered and all(count_nodes(summit, Demand(num_nodes=size))[1] and abs(size - num_nodes) < 18 for size in offered)


def test_jobs_smaller_than_a_rack_need_no_whole_racks() -> None:
    small = dataclasses.replace(read_machine("summit"), max_nodes=10)
    assert count_nodes(small, Demand(num_nodes=7)) == (7, None)
    with pytest.raises(ConfigError, match=r"has no racks that a job could ask for: give --nodes N \(1 to 10\)"):
        count_nodes(small, Demand(num_racks=1))


def test_which_machines_have_whole_racks() -> None:
    assert {name: (has_whole_racks(read_machine(name)), largest_rack_count(read_machine(name))) for name in ("summit", "nvl72", "frontier", "laptop")} == {
        "summit": (True, 256),
        "nvl72": (True, 16),
        "frontier": (False, 74),
        "laptop": (False, 0),
    }
