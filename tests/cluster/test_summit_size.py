"""Racks at Summit's size, on a real slurmctld with 4,608 nodes in 256 racks of 18 behind which nothing runs."""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING

from prottrans_hpc.launch import hostlist
from prottrans_hpc.launch.job_state import State

if TYPE_CHECKING:
    from .conftest import Cluster

SEED = 20200712
PROFILE = """
name = "summit_with_slurm"
description = "Summit's racks and nodes, as if Slurm ran them"
scheduler = "slurm"
starter = "srun"
ranks_per_node = 6
max_nodes = 4608
nodes_per_rack = 18
num_racks = 256
rack_placement = "{placement}"

[node]
num_cpu_cores = 42
num_gpus = 6
host_memory_gib = 488

[node.gpu]
name = "V100"
memory_gib = 16
peak_tflops = {{ fp32 = 15.7, fp16 = 125 }}

[[queues]]
name = "batch"
bins = [{{ min_nodes = 1, max_nodes = 4608, max_walltime_min = 1440 }}]
"""


def submit(summit: Cluster, corpus: Path, folder: Path, placement: str = "switches") -> tuple[str, str]:
    """The published run's size by the real command line: job id and script."""
    folder.mkdir(exist_ok=True)
    profile = folder / "summit_with_slurm.toml"
    profile.write_text(PROFILE.format(placement=placement))
    run_dir = folder / "run"
    where = ("--corpus", str(corpus), "--machine", str(profile), "--run-dir", str(run_dir), "--racks", "52", "--walltime", "24:00")
    summit.prottrans("pretrain", "tiny_prot_bert", *where, timeout_s=120)
    return summit.job_ids(run_dir)[0], (run_dir / "job.sh").read_text()


def nodes_of(summit: Cluster, job_id: str) -> set[str]:
    """The nodes that Slurm has given a job; empty while it waits."""
    return set(hostlist.expand(summit.run("squeue", "--noheader", f"--jobs={job_id}", "--format=%N").stdout.strip()))


def assert_52_whole_racks(summit: Cluster, nodes: set[str]) -> None:
    touched = [set(names) for names in summit.racks.values() if nodes & set(names)]
    assert len(nodes) == 936 and len(touched) == 52 and all(names <= nodes for names in touched)


def test_936_nodes_are_52_whole_racks(summit: Cluster, small_corpus: Path, tmp_path: Path) -> None:
    job_id, script = submit(summit, small_corpus, tmp_path)
    assert "#SBATCH --nodes=936\n" in script and "#SBATCH --switches=52\n" in script and "--ntasks=5616" in script
    summit.wait(lambda: nodes_of(summit, job_id), "nodes", 30)
    assert_52_whole_racks(summit, nodes_of(summit, job_id))


def test_a_fragmented_machine_gives_whole_racks_or_lets_the_job_wait(summit: Cluster, small_corpus: Path, tmp_path: Path) -> None:
    """One random node of every rack but 51 is drained: 51 whole racks and 3,485 other nodes are no place for the job."""
    chance = random.Random(SEED)
    idle = {line.split()[0] for line in summit.run("sinfo", "-hNp", "batch", "-o", "%N %t").stdout.splitlines() if line.split()[1].startswith("idle")}
    whole = [names for names in summit.racks.values() if set(names) <= idle]
    chance.shuffle(whole)
    drained = [chance.choice(names) for names in summit.racks.values() if names not in whole[:51] and set(names) <= idle]
    summit.run("scontrol", "update", f"nodename={hostlist.compress(drained)}", "state=drain", "reason=test", timeout_s=60)
    job_id, _ = submit(summit, small_corpus, tmp_path)
    reason = ("squeue", "--noheader", f"--jobs={job_id}", "--format=%r")
    summit.wait(lambda: summit.run(*reason).stdout.strip() not in ("", "None"), "the scheduler's verdict", 30)
    assert summit.states([job_id]) == {job_id: State.PENDING} and not nodes_of(summit, job_id)
    # Not "resume": that would count the node, behind which nothing runs, as powered on, and soon as down.
    summit.run("scontrol", "update", f"nodename={drained[0]}", "state=undrain")
    summit.wait(lambda: nodes_of(summit, job_id), "nodes", 60)
    assert_52_whole_racks(summit, nodes_of(summit, job_id))
    assert drained[0] in nodes_of(summit, job_id)


def test_named_nodes_are_52_whole_racks(summit: Cluster, small_corpus: Path, tmp_path: Path) -> None:
    drained = [names[3] for names in list(summit.racks.values())[::2]]
    summit.run("scontrol", "update", f"nodename={hostlist.compress(drained)}", "state=drain", "reason=test", timeout_s=60)
    job_id, script = submit(summit, small_corpus, tmp_path, placement="node_list")
    named = next(line for line in script.splitlines() if "--nodelist=" in line)
    asked = set(hostlist.expand(named.partition("=")[2]))
    assert_52_whole_racks(summit, asked)
    assert not asked & set(drained)
    summit.wait(lambda: nodes_of(summit, job_id), "nodes", 30)
    assert nodes_of(summit, job_id) == asked
