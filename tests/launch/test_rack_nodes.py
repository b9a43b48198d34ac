"""Racks from Slurm's topology, and the choice of whole ones."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from prottrans_hpc.errors import SubmitError
from prottrans_hpc.launch import placement, rack_nodes
from prottrans_hpc.machine import Allocation, Machine, read_machine

RECORDED = Path(__file__).resolve().parents[1] / "recorded" / "slurm"
RACKS = {"a": ["n1", "n2", "n3"], "b": ["n4", "n5", "n6"], "c": ["n7", "n8", "n9", "n10"]}


def states(**changes: str) -> dict[str, str]:
    return {f"n{number}": "idle" for number in range(1, 11)} | changes


def choose(num_racks: int, **changes: str) -> list[str]:
    return rack_nodes.choose(RACKS, states(**changes), num_racks=num_racks, nodes_per_rack=3)


def test_racks_are_the_leaf_switches() -> None:
    assert rack_nodes.parse_topology((RECORDED / "topology.txt").read_text()) == {"rack0": ["n1", "n2", "n3", "n4"], "rack1": ["n5", "n6", "n7", "n8"]}


def test_or_the_blocks() -> None:
    assert rack_nodes.parse_topology("BlockName=b1 BlockIndex=0 Nodes=nvl[01-02] BlockSize=2\n") == {"b1": ["nvl01", "nvl02"]}
    assert rack_nodes.parse_topology("") == {}


def test_node_states_lose_their_marks() -> None:
    assert rack_nodes.parse_node_states("n1|idle\nn2|idle~\nn3|down*\nn4|drained\n") == {"n1": "idle", "n2": "idle", "n3": "down", "n4": "drained"}


def test_free_racks_come_first() -> None:
    assert choose(1, n2="allocated") == ["n4", "n5", "n6"]
    assert choose(2, n2="allocated", n5="mixed") == ["n7", "n8", "n9", "n1", "n2", "n3"]


@pytest.mark.parametrize("state", ["down", "drained", "draining", "maint", "fail", "unknown"])
def test_a_rack_that_is_not_whole_is_not_taken(state: str) -> None:
    assert choose(2, n2=state) == ["n4", "n5", "n6", "n7", "n8", "n9"]
    with pytest.raises(SubmitError, match="only 2 of 3 racks"):
        choose(3, n2=state)


def test_a_larger_rack_gives_the_nodes_that_are_free() -> None:
    assert choose(3, n8="down") == ["n1", "n2", "n3", "n4", "n5", "n6", "n7", "n9", "n10"]
    assert choose(3, n8="allocated")[-3:] == ["n7", "n9", "n10"]


@pytest.fixture
def by_list() -> Machine:
    return replace(read_machine("slurm_cluster"), nodes_per_rack=3, rack_placement="node_list")


def test_nodes_are_named_by_what_the_commands_say(by_list: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    topology = "".join(f"SwitchName={rack} Level=0 LinkSpeed=1 Nodes={','.join(names)}\n" for rack, names in RACKS.items())
    (tmp_path / "scontrol").write_text(f"#!/bin/sh\nprintf '{topology}'\n")
    (tmp_path / "sinfo").write_text('#!/bin/sh\nfor n in 1 2 3 4 5 6; do echo "n$n|idle"; done\n')
    for name in ("scontrol", "sinfo"):
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", os.pathsep.join((str(tmp_path), os.environ["PATH"])))
    allocation = Allocation(6, 8, 8, 1, 60, "gpu", num_racks=2)
    assert placement.name_nodes(by_list, allocation, required=True).node_names == ("n1", "n2", "n3", "n4", "n5", "n6")
    any_nodes = replace(allocation, num_racks=None)
    assert placement.name_nodes(by_list, any_nodes, required=True) == any_nodes


def test_on_another_computer_only_a_dry_run_goes_on(
    by_list: Machine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    allocation = Allocation(6, 8, 8, 1, 60, "gpu", num_racks=2)
    assert placement.name_nodes(by_list, allocation, required=False) == allocation
    assert "chosen on slurm_cluster when the job is submitted" in capsys.readouterr().err
    with pytest.raises(SubmitError, match="there is no command 'scontrol' here"):
        placement.name_nodes(by_list, allocation, required=True)
