"""Where Slurm puts our jobs: whole racks, one way or another, and every rank in its place. The ranks only say where they are."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from prottrans_hpc.launch.job_state import State

if TYPE_CHECKING:
    from .conftest import Cluster

REPORT = """printf '%s %s %s %s %s %s\\n' "$SLURM_PROCID" "$SLURM_TOPOLOGY_ADDR" "$SLURM_LOCALID" "$OMP_NUM_THREADS" "${CUDA_VISIBLE_DEVICES:-none}" \\
  "${SECRET_OF_THE_SHELL:-clean}" >>"$1/places"; """


class Ranks:
    """Jobs of the real command line whose ranks, 6 a node as on Summit, are a line of shell instead of training."""

    def __init__(self, cluster: Cluster, corpus: Path, folder: Path) -> None:
        self.cluster, self.corpus, self.folder = cluster, corpus, folder

    def submit(self, *options: str, run_dir: str = "run", code: int = 0, does: str = "", racks: str = "switches", **profile: Any) -> str:
        """Submit; what it printed on standard error is in `stderr`. The job id, or "" when it was refused."""
        self.run_dir = self.folder / run_dir
        launcher = json.dumps(["bash", "-c", REPORT.replace("$1", str(self.folder)) + does, "rank"])
        machine = self.cluster.profile(self.folder, racks=racks, ranks_per_node=6, gpus=True, launcher_prefix=launcher, **profile)
        where = ("--corpus", str(self.corpus), "--machine", str(machine), "--run-dir", str(self.run_dir))
        done = self.cluster.prottrans("pretrain", "tiny_prot_bert", *where, *options, code=code, env={"SECRET_OF_THE_SHELL": "leaked"})
        self.stderr = done.stderr
        return self.cluster.job_ids(self.run_dir)[-1] if code == 0 else ""

    @property
    def places(self) -> list[list[str]]:
        """Of each rank, in order: rank, place in the topology, local rank, threads, GPUs, what it has of our environment."""
        lines = [line.split() for line in (self.folder / "places").read_text().splitlines()]
        return sorted(lines, key=lambda line: int(line[0]))

    def racks(self) -> list[str]:
        return sorted({place[1].split(".")[1] for place in self.places})

    def story(self) -> str:
        path = self.run_dir / "logs" / "job.log"
        return path.read_text() if path.exists() else "no log"


@pytest.fixture
def ranks(cluster: Cluster, small_corpus: Path, tmp_path: Path) -> Ranks:
    return Ranks(cluster, small_corpus, tmp_path)


def test_one_rack_is_a_whole_one_and_every_rank_is_in_its_place(ranks: Ranks, cluster: Cluster) -> None:
    blocker = cluster.submit("#!/bin/bash\nsleep 300\n", "--nodelist=n2")
    cluster.wait_running(blocker)
    job_id = ranks.submit("--racks", "1")
    assert cluster.wait_ended(job_id) == State.DONE, ranks.story()
    assert ranks.racks() == ["rack1"], "the only whole one"
    assert [place[0] for place in ranks.places] == [str(rank) for rank in range(24)]
    assert [place[1] for place in ranks.places] == [f"core.rack1.n{node}" for node in (5, 6, 7, 8) for _ in range(6)]
    assert [place[2:] for place in ranks.places] == [[str(local), "7", "0,1,2,3,4,5", "clean"] for _ in range(4) for local in range(6)]


def test_a_fragmented_machine_makes_a_rack_job_wait(ranks: Ranks, cluster: Cluster) -> None:
    blockers = [cluster.submit("#!/bin/bash\nsleep 300\n", f"--nodelist={node}") for node in ("n2", "n7")]
    for blocker in blockers:
        cluster.wait_running(blocker)
    job_id = ranks.submit("--racks", "1")
    cluster.wait(lambda: cluster.run("squeue", "--noheader", f"--jobs={job_id}", "--format=%r").stdout.strip() in ("Resources", "Priority"), "a verdict")
    assert cluster.states([job_id, *blockers]) == {job_id: State.PENDING, blockers[0]: State.RUNNING, blockers[1]: State.RUNNING}
    cluster.run("scancel", blockers[0])
    assert cluster.wait_ended(job_id) == State.DONE, ranks.story()
    assert ranks.racks() == ["rack0"]


@pytest.mark.parametrize("racks", ["switches", "node_list"])
def test_two_racks_are_the_whole_machine(ranks: Ranks, cluster: Cluster, racks: str) -> None:
    job_id = ranks.submit("--racks", "2", racks=racks)
    assert cluster.wait_ended(job_id) == State.DONE, ranks.story()
    assert ranks.racks() == ["rack0", "rack1"] and len(ranks.places) == 48


def test_named_nodes_are_those_of_a_whole_rack(ranks: Ranks, cluster: Cluster) -> None:
    cluster.run("scontrol", "update", "nodename=n3", "state=drain", "reason=test")
    job_id = ranks.submit("--racks", "1", racks="node_list")
    assert "#SBATCH --nodelist=n[5-8]\n" in (ranks.run_dir / "job.sh").read_text()
    assert cluster.wait_ended(job_id) == State.DONE, ranks.story()
    assert ranks.racks() == ["rack1"]
    ranks.submit("--racks", "2", racks="node_list", run_dir="refused", code=71)
    assert "only 1 of 2 racks" in ranks.stderr
    # Named anew for another start: a node of that rack is lost, and the other rack is whole again.
    cluster.run("scontrol", "update", "nodename=n6", "state=drain", "reason=test")
    cluster.run("scontrol", "update", "nodename=n3", "state=resume")
    ranks.run_dir = ranks.folder / "run"
    cluster.prottrans("runs", "resume", str(ranks.run_dir))
    assert "#SBATCH --nodelist=n[1-4]\n" in (ranks.run_dir / "job.sh").read_text()
    assert cluster.wait_ended(cluster.job_ids(ranks.run_dir)[0]) == State.DONE, ranks.story()


def test_an_option_that_this_slurm_lacks_is_told_in_its_own_words(ranks: Ranks) -> None:
    """--segment came with 23.11: here it is only rendered, and refused."""
    ranks.submit("--racks", "1", racks="segment", code=71)
    assert "sbatch says" in ranks.stderr and "--segment=4" in ranks.stderr


def test_states_and_exit_codes_of_ranks_that_fail(ranks: Ranks, cluster: Cluster) -> None:
    failing = ranks.submit("--nodes", "4", does="exit 65 #")
    assert cluster.wait_ended(failing) == State.FAILED, ranks.story()
    assert (ranks.run_dir / "job.exit-code").read_text() == "65\n"
    assert cluster.run("scontrol", "show", "job", failing).stdout.count("ExitCode=65:0") == 1
    # A rank that fails ends those that would wait for ever, and its code counts, though srun ends with theirs, 143.
    rank = f'[ "$SLURM_PROCID" != 5 ] || exec {sys.executable} -P -m prottrans_hpc pretrain /nonexistent; sleep 300 #'
    hanging = ranks.submit("--racks", "1", does=rank, run_dir="hanging")
    assert cluster.wait_ended(hanging) == State.FAILED, ranks.story()
    assert (ranks.run_dir / "job.exit-code").read_text() == "66\n"
    assert cluster.states([failing, hanging, "999999"]) == {failing: State.FAILED, hanging: State.FAILED}
    assert cluster.states(["999999"]) == {}, "forgotten, by what squeue says"


def test_a_controller_that_does_not_answer_is_no_verdict(cluster: Cluster) -> None:
    job_id = cluster.submit("#!/bin/bash\nsleep 300\n")
    program = "import sys; from prottrans_hpc.launch import submission; submission.states('slurm', sys.argv[1:])"
    controller = cluster.run("cat", "/run/slurm-lab/slurmctld.pid").stdout.strip()
    cluster.run("bash", "-c", f"kill -STOP {controller}")
    try:
        done = cluster.python("-c", program, job_id, code=1, timeout_s=100)
    finally:
        cluster.run("bash", "-c", f"kill -CONT {controller}")
    assert "SubmitError: cannot tell the state of jobs: squeue says" in done.stderr


@pytest.mark.parametrize("name", ["per %j%% cent", 'a "quoted" one', "$(touch MARKER) `touch MARKER`", "it's; touch MARKER"])
def test_hostile_folders_are_only_folders(ranks: Ranks, cluster: Cluster, name: str) -> None:
    (ranks.folder / name).mkdir()
    job_id = ranks.submit("--racks", "1", run_dir=f"{name}/run", does='printf "%s" "${*: -1}" >"$SLURM_SUBMIT_DIR/told" #')
    assert cluster.wait_ended(job_id) == State.DONE, ranks.story()
    assert (ranks.run_dir / "logs" / "job.log").is_file(), list(ranks.folder.rglob("*.log"))
    assert not list(ranks.folder.rglob("MARKER")) and not list(cluster.folder.rglob("MARKER"))


def test_hostile_names_are_refused(ranks: Ranks, cluster: Cluster) -> None:
    for options in (("--account", "x; touch MARKER"), ("--account", "--wrap=x"), ("--queue", "batch\ntouch MARKER")):
        ranks.submit("--racks", "1", *options, code=64)
    ranks.submit("--racks", "1", run_dir="$(touch MARKER)", code=64)
    assert not cluster.run("squeue", "--noheader").stdout
