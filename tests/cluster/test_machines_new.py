"""`prottrans machines new` on a real cluster: what it writes is a profile, and jobs run with it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from prottrans_hpc.launch.job_state import State
from prottrans_hpc.machine import read_machine

if TYPE_CHECKING:
    from .conftest import Cluster


def test_a_profile_of_the_cluster_at_hand(cluster: Cluster, tmp_path: Path) -> None:
    path = tmp_path / "found.toml"
    done = cluster.prottrans("machines", "new", "--out", str(path))
    assert str(path) in done.stderr
    machine = read_machine(str(path))
    assert (machine.name, machine.scheduler, machine.starter) == ("lab", "slurm", "srun")
    assert (machine.nodes_per_rack, machine.num_racks, machine.rack_placement, machine.max_nodes) == (4, 2, "switches", 8)
    assert (machine.node.num_cpu_cores, machine.node.num_gpus, machine.ranks_per_node) == (42, 6, 6)
    assert machine.node.gpu is not None and machine.node.gpu.name == "NVIDIA V100" and "bf16" not in machine.node.gpu.peak_tflops
    assert [(queue.name, queue.preemptable) for queue in machine.queues] == [("batch", False), ("killable", True), ("killable_at_once", True)]
    assert all(row.max_walltime_min == 24 * 60 and row.max_nodes == 8 for queue in machine.queues for row in queue.bins)
    text = path.read_text()
    assert text.count("CHECK") >= 3 and "neither memory nor speed" in text
    refused = cluster.prottrans("machines", "new", "--out", str(path), code=64)
    assert "exists" in refused.stderr and path.read_text() == text


def test_a_job_runs_with_the_profile_that_was_found(cluster: Cluster, small_corpus: Path, tmp_path: Path) -> None:
    path = tmp_path / "found.toml"
    cluster.prottrans("machines", "new", "--out", str(path))
    # What a person would put right: here a program in place of the ranks, which need GPUs.
    path.write_text(path.read_text().replace("\n[node]", 'launcher_prefix = ["true"]\n[node]', 1))
    run_dir = tmp_path / "run"
    cluster.prottrans("pretrain", "tiny_prot_bert", "--corpus", str(small_corpus), "--machine", str(path), "--racks", "1", "--run-dir", str(run_dir))
    assert cluster.wait_ended(cluster.job_ids(run_dir)[0]) == State.DONE, (run_dir / "logs" / "job.log").read_text()


def test_the_other_cluster(summit: Cluster, tmp_path: Path) -> None:
    path = tmp_path / "found.toml"
    summit.prottrans("machines", "new", "--out", str(path), "--partition", "killable")
    machine = read_machine(str(path))
    assert (machine.nodes_per_rack, machine.num_racks, machine.max_nodes, machine.queues[0].name) == (18, 256, 4608, "killable")
    refused = summit.prottrans("machines", "new", "--out", str(tmp_path / "none.toml"), "--partition", "nosuch", code=64)
    assert "killable_at_once" in refused.stderr
