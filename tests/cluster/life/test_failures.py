"""A rank, a node, a link or a disk is lost: the whole gang ends soon, says what was lost, and the next start goes on."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prottrans_hpc.launch.job_state import State

if TYPE_CHECKING:
    from ..conftest import Cluster
    from .conftest import MakeTraining, Training

Outcome = dict[str, Any]
Same = Callable[[Outcome, Outcome], None]

RANKS = """for p in /proc/[0-9]*; do
  if tr '\\0' ' ' <$p/cmdline 2>/dev/null | grep -q '^[^ ]*python[^ ]* -P -m prottrans_hpc pretrain'; then echo ${p#/proc/}; fi
done"""


def ranks_on(cluster: Cluster, node: str) -> list[str]:
    """Process ids, as numbered on the node, of the ranks there."""
    return cluster.run("bash", "-c", RANKS, node=node).stdout.split()


def nodes_of(run: Training) -> list[str]:
    return [str(node) for node in run.events("begun")[-1]["nodes"]]


def test_a_killed_rank_ends_the_gang_and_the_chain_goes_on(cluster: Cluster, training: MakeTraining, undisturbed: Outcome, same: Same) -> None:
    run = training(settings=("parallel.timeout_s=150",))
    run.submit(num_jobs=2)
    run.wait_for_step(60)
    victim = nodes_of(run)[1]
    began = time.monotonic()
    cluster.run("kill", "-KILL", *ranks_on(cluster, victim), node=victim)
    ended = run.wait_event("ended")
    assert time.monotonic() - began < 120, "by the closed connection, not by the time limit of a collective, which is 150 s"
    assert ended["code"] == 137 and f"lost rank 1 on {victim}" in ended["cause"] and f"{victim}: task 1: Killed" in ended["cause"]
    run.wait_done()
    assert [event["job_id"] for event in run.events("begun")] == run.job_ids
    same(run.outcome(), undisturbed)


def test_a_node_without_power_is_named_and_the_job_goes_on_elsewhere(cluster: Cluster, training: MakeTraining, undisturbed: Outcome, same: Same) -> None:
    run = training()
    run.submit()
    run.wait_for_step(60)
    victim = nodes_of(run)[1]
    cluster.off(victim)
    cluster.run("scontrol", "update", f"nodename={victim}", "state=down", "reason=test")  # Slurm would see it after half a minute
    again = run.wait_event("begun", 2)
    assert (again["job_id"], again["restart"]) == (run.job_ids[0], 1) and victim not in again["nodes"]
    notes = [str(event["cause"]) for event in run.events("ended", "taken_over")]
    assert any(f"node {victim}" in note for note in notes), run.story()
    run.wait_done()
    same(run.outcome(), undisturbed)


def test_a_cut_link_ends_the_ranks_on_both_sides(cluster: Cluster, training: MakeTraining) -> None:
    run = training(settings=("parallel.timeout_s=15",))
    run.submit()
    run.wait_for_step(20)
    first, victim = nodes_of(run)
    began = time.monotonic()
    cluster.cut(victim)
    # Nobody tells either side anything: each finds out by the time limit of a collective.
    cluster.wait(lambda: not ranks_on(cluster, victim) and not ranks_on(cluster, first), "the ranks to end")
    assert time.monotonic() - began < 15 + 120, "\n".join(path.read_text() for path in (run.folder / "logs").iterdir())
    cluster.wait(lambda: f"lost rank 1 on {victim}" in run.log, "what the ranks said to come through srun")
    # Slurm has yet to notice; when it does it ends the script, perhaps before that can say a word, and starts the job elsewhere.
    run.wait_event("begun", 2)
    notes = [str(event["cause"]) for event in run.events("ended", "taken_over")]
    assert any(victim in note for note in notes), run.story()


def test_a_full_disk_is_named_and_the_last_checkpoint_stays(cluster: Cluster, training: MakeTraining) -> None:
    inside = Path("/run/shared/small disk")
    cluster.run("mkdir", "-p", str(inside))
    cluster.run("mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", str(inside))
    outside = Path(f"/proc/{cluster.unshare.pid}/root{inside}")
    try:
        settings = ("checkpoint.keep_last=100000", "checkpoint.every_steps=5")
        run = training(settings=settings, inside=inside / "run", folder=outside / "run")
        run.submit(num_jobs=3)
        assert cluster.wait_ended(run.job_ids[0]) is State.FAILED
        assert f"(file system {inside})" in run.log, run.story()
        last = run.run_dir.checkpoint_steps()[-1]
        assert not [name for name in os.listdir(run.run_dir.checkpoints) if name.startswith(".")]
        # The second start fails at the same step, and the third would be in vain.
        assert [cluster.wait_ended(job_id) for job_id in run.job_ids[1:]] == [State.FAILED, State.CANCELLED]
        assert run.run_dir.checkpoint_steps()[-1] == last
        assert [event["code"] for event in run.events("ended")] == [73, 73]
        # With space again the same command goes on from there.
        cluster.run("bash", "-c", f"cd '{inside}/run/checkpoints' && ls -d step-* | head -n 2 | xargs rm -r")
        run.steps = last + 2
        run.submit()
        run.wait_done()
        assert run.events("begun")[-1]["step"] == last
    finally:
        cluster.run("umount", "--lazy", str(inside))
