"""A profile from what Slurm prints: recorded from a real cluster of eight nodes, and changed as other sites differ."""

from __future__ import annotations

from pathlib import Path

import pytest

from prottrans_hpc.errors import ConfigError
from prottrans_hpc.launch import discover, slurm_facts
from prottrans_hpc.machine import Machine

RECORDED = Path(__file__).resolve().parents[1] / "recorded" / "slurm"
NAMES = ("config", "partitions", "nodes", "topology")


def profile(partition: str | None = None, **changes: tuple[str, str]) -> tuple[str, Machine]:
    """The profile when in some answers one text stood in place of another."""
    answers = {name: (RECORDED / f"{name}.txt").read_text() for name in NAMES}
    for name, (old, new) in changes.items():
        assert old in answers[name]
        answers[name] = answers[name].replace(old, new)
    return discover.profile(slurm_facts.parse(*answers.values()), partition=partition, when="2026-07-01")


def test_the_recorded_cluster() -> None:
    text, machine = profile()
    assert (machine.name, machine.max_nodes, machine.ranks_per_node, machine.node.num_cpu_cores) == ("lab", 8, 6, 42)
    assert (machine.nodes_per_rack, machine.num_racks, machine.rack_placement) == (4, 2, "switches")
    assert machine.sources == ("sinfo and scontrol of lab, 2026-07-01",)
    assert "its Slurm 22.05.8" in text and "8 s of grace" in text


def test_hardware_threads_are_not_cores() -> None:
    _, machine = profile(nodes=("ThreadsPerCore=1", "ThreadsPerCore=2"))
    assert machine.node.num_cpu_cores == 21
    assert machine.header_lines == ("#SBATCH --threads-per-core=1",)


def test_nodes_without_gpus_get_a_rank_a_socket() -> None:
    text, machine = profile(nodes=("Gres=gpu:v100:6", "Gres=(null)"))
    assert (machine.node.num_gpus, machine.ranks_per_node) == (0, 2)
    assert "node.gpu" not in text


@pytest.mark.parametrize(
    ("gres", "name", "number"),
    [("gpu:a100:4(S:0-1)", "NVIDIA A100", 4), ("gpu:nvidia_h100_80gb_hbm3:8", "NVIDIA H100", 8), ("gpu:8", "GPU", 8), ("gpu:npu9:2,nvme:1", "npu9", 2)],
)
def test_kinds_of_gpus(gres: str, name: str, number: int) -> None:
    text, machine = profile(nodes=("Gres=gpu:v100:6", f"Gres={gres}"))
    assert machine.node.gpu is not None
    assert (machine.node.gpu.name, machine.node.num_gpus) == (name, number)
    assert ("put in what is true" in text) == (name in ("GPU", "npu9"))


def test_a_flat_network_has_no_racks() -> None:
    _, machine = profile(topology=((RECORDED / "topology.txt").read_text(), ""))
    assert (machine.nodes_per_rack, machine.rack_placement) == (None, "none")


def test_racks_that_slurm_knows_but_does_not_schedule_by_are_named() -> None:
    assert profile(config=("topology/tree", "topology/none"))[1].rack_placement == "node_list"
    assert profile(config=("topology/tree", "topology/block"))[1].rack_placement == "segment"


def test_partitions_that_differ() -> None:
    text, machine = profile("killable", partitions=("MaxTime=1-00:00:00 MinNodes=0", "MaxTime=UNLIMITED MinNodes=2"))
    assert machine.queues[0].name == "killable" and machine.queues[0].preemptable and "by batch" in text
    assert [(row.min_nodes, row.max_nodes, row.max_walltime_min) for row in machine.queues[0].bins] == [(2, 8, 365 * 24 * 60)]
    with pytest.raises(ConfigError, match="it has batch, killable, killable_at_once"):
        profile("nosuch")


def test_most_of_the_nodes_count() -> None:
    text, machine = profile(
        nodes=("NodeName=n8 Arch=x86_64 CoresPerSocket=21  CPUAlloc=0 CPUEfctv=42", "NodeName=n8 Arch=x86_64 CoresPerSocket=21  CPUEfctv=12")
    )
    assert machine.node.num_cpu_cores == 42 and "7 of the partition's 8 nodes are like this" in text
    assert [queue.name for queue in machine.queues] == ["batch"], "the others have nodes that differ"


def test_a_name_that_is_none_is_made_usable() -> None:
    _, machine = profile(config=("= lab", '= my "lab" 3/4'))
    assert machine.name == "my__lab__3_4"
