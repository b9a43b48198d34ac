"""One small training that faults are thrown at, drawn by a seed; it must come to what the undisturbed one comes to, bit for bit.

`make chaos FAULTS=100 SEED=7` throws so many and keeps the table of what was survived up to date; as a test it throws three cheap ones.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import random
import statistics
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from ..conftest import Cluster
    from .conftest import MakeTraining, Training

NUM_FAULTS = int(os.environ.get("CHAOS_FAULTS", "3"))
SEED = int(os.environ.get("CHAOS_SEED", "58"))
TABLE = os.environ.get("CHAOS_TABLE")
MINUTES = os.environ.get("CHAOS_MINUTES")
"""No fault is thrown after so long; None: all are."""
SETTINGS = ("phases.0.steps=1000000", "checkpoint.every_steps=20", "checkpoint.keep_last=2", "parallel.timeout_s=15")
RANKS = r"""for p in /proc/[0-9]*; do
  if tr '\0' ' ' <$p/cmdline 2>/dev/null | grep -q '^[^ ]*python[^ ]* -P -m prottrans_hpc pretrain'; then echo ${p#/proc/}; fi
done"""
QUEUES = {"killable": "20 s of grace", "killable_at_once": "no grace"}

Draw = random.Random


@dataclass(frozen=True)
class Survived:
    """One line of the table."""

    fault: str
    step: int
    """The last one when it was thrown; of a start that had taken none yet, that of its checkpoint."""
    resumed_at: int
    steps_lost: int
    """As history.jsonl says of all starts since: one that is lost before its first step leaves it to the next to tell."""
    seconds: float
    """Until it trained again."""
    told: str
    """What jobs.jsonl says of the end."""


def kill_a_rank(run: Training, draw: Draw) -> str:
    node, pids = draw.choice(nodes_of(run)), list[str]()

    def found() -> list[str]:
        pids[:] = run.cluster.run("bash", "-c", RANKS, node=node).stdout.split()
        return pids

    run.cluster.wait(found, f"a rank on {node}", 120)
    run.cluster.run("kill", "-KILL", *pids, node=node, code=None)
    return "SIGKILL of a rank"


def requeue(run: Training, draw: Draw) -> str:
    run.cluster.run("scontrol", "requeue", job_of(run), code=None)
    return "scontrol requeue"


def preempt(run: Training, draw: Draw) -> str:
    queue = run.cluster.run("squeue", "--noheader", f"--jobs={job_of(run)}", "--format=%P", code=None).stdout.strip()
    run.cluster.submit("#!/bin/bash\nsleep 1\n", "--partition=batch", "--nodes=8", "--exclusive", "--time=1")
    return f"preemption, {QUEUES.get(queue, queue)}"


def warn(run: Training, draw: Draw) -> str:
    """The very signal that Slurm sends to the very shell."""
    run.cluster.run("scancel", "--batch", "--signal=USR1", job_of(run), code=None)
    return "walltime warning"


def lose_a_node(run: Training, draw: Draw) -> str:
    node = draw.choice(nodes_of(run))
    run.cluster.off(node)
    run.cluster.run("scontrol", "update", f"nodename={node}", "state=down", "reason=chaos")  # Slurm would see it after half a minute
    return "power of a node off"


def cut_a_link(run: Training, draw: Draw) -> str:
    node = draw.choice(nodes_of(run))
    run.cluster.cut(node)
    run.cluster.run("scontrol", "update", f"nodename={node}", "state=down", "reason=chaos")
    return "link of a node cut"


FAULTS: tuple[Callable[[Training, Draw], str], ...] = (kill_a_rank, preempt, cut_a_link, requeue, lose_a_node, warn)


def draw_faults(draw: Draw) -> Iterator[Callable[[Training, Draw], str]]:
    """Endlessly; each as often as the others."""
    while True:
        yield from draw.sample(FAULTS, len(FAULTS))


def nodes_of(run: Training) -> list[str]:
    return [str(node) for node in run.events("begun")[-1]["nodes"]]


def job_of(run: Training) -> str:
    return str(run.events("begun")[-1]["job_id"])


def submit_if_over(run: Training, draw: Draw) -> None:
    """What a person does, or `prottrans runs resume`: where no job of the run is left, the same command again."""
    said = run.cluster.run("squeue", "--noheader", "--format=%i|", code=None).stdout
    if not any(f"{job_id}|" in said for job_id in run.job_ids):
        run.submit(queue=draw.choice(sorted(QUEUES)), num_jobs=3, walltime_min=60)


def starts(run: Training) -> list[dict[str, Any]]:
    """The trainer's own notes of all starts; half a line, which a kill may leave, is none."""
    found = []
    for line in run.run_dir.history.read_bytes().splitlines():
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return [event for event in found if event["event"] == "start"]


def lost(starts: Sequence[Mapping[str, Any]]) -> int:
    """The steps that these starts took again."""
    return sum(int(start.get("steps_lost", 0)) for start in starts)


def started(run: Training) -> dict[str, Any] | None:
    """The trainer's own note of the start that trains now, if one does."""
    begun = run.events("begun")
    try:
        noted = json.loads(run.run_dir.history.read_bytes().splitlines()[-1])
    except (FileNotFoundError, IndexError, ValueError):
        return None
    is_it = bool(begun) and noted["event"] == "start" and str(noted["time"]) >= str(begun[-1]["time"]) and run.step > noted["step"]
    return dict(noted) if is_it else None


def repair(cluster: Cluster) -> None:
    """All links and nodes are there again."""
    for node in sorted(cluster.cut_off):
        cluster.join(node)
    for node in sorted(cluster.down):
        cluster.on(node)
    down = cluster.run("sinfo", "--noheader", "--Node", "--states=down,drain", "--format=%N").stdout.split()
    if down:
        cluster.run("scontrol", "update", f"nodename={','.join(sorted(set(down)))}", "state=resume")


def throw(run: Training, draw: Draw, fault: Callable[[Training, Draw], str]) -> Survived:
    """Throw a fault some steps later, one time in four already at a start that has not got so far, and wait until it trains again."""
    if draw.random() < 0.75:
        target = draw.randint(3, 33)
        run.cluster.wait(lambda: goes_on(run, draw) and run.step >= int(run.events("begun")[-1]["step"]) + target, f"{target} steps", 240)
    num_begun, step, began, num_events, num_starts = len(run.events("begun")), run.step, time.monotonic(), len(run.events()), len(starts(run))
    name = fault(run, draw)
    run.cluster.wait(lambda: submit_if_over(run, draw) or len(run.events("begun")) > num_begun, f"a start after {name}", 240)
    repair(run.cluster)
    run.cluster.wait(lambda: goes_on(run, draw), f"training after {name}", 240)
    since = starts(run)[num_starts:]
    told = "; ".join(str(event["cause"])[:120] for event in run.events()[num_events:] if event["event"] in ("ended", "taken_over"))
    return Survived(name, step, int(since[-1]["step"]), lost(since), round(time.monotonic() - began, 1), told)


def goes_on(run: Training, draw: Draw) -> bool:
    """Whether it trains; submits it where nobody else would."""
    submit_if_over(run, draw)
    return started(run) is not None


def summary(fault: str, rows: Sequence[Survived]) -> str:
    """The line of the table about all faults of a kind."""
    steps_lost, seconds = statistics.mean(row.steps_lost for row in rows), statistics.median(row.seconds for row in rows)
    return f"| {fault} | {len(rows)} | {steps_lost:.1f} | {seconds:.0f} |"


def test_the_table_counts_every_start_and_takes_the_median() -> None:
    assert lost([{"step": 20, "steps_lost": 7}, {"step": 20}, {"step": 0, "steps_lost": 20}]) == 27
    rows = [Survived("requeue", 30, 20, steps_lost, seconds, "") for steps_lost, seconds in ((0, 10.0), (3, 90.0))]
    assert summary("requeue", rows) == "| requeue | 2 | 1.5 | 50 |"


def write_table(rows: list[Survived], began: float, verdict: str) -> None:
    """To CHAOS_TABLE, anew after each fault: a run that is cut short leaves what was found until then."""
    if not TABLE:
        return
    slurm = subprocess.run(["slurmctld", "-V"], capture_output=True, text=True, check=False).stdout.strip()
    counts = Counter(row.fault for row in rows)
    lines = [
        f"# {len(rows)} faults thrown at one training",
        "",
        f"`make chaos FAULTS={NUM_FAULTS} SEED={SEED}`: tiny ProtBert on 2 of 8 nodes of the test cluster (tests/cluster), a checkpoint every 20 steps.",
        f"{os.cpu_count()} CPU cores, {platform.system()} {platform.release()}, {slurm}, torch {torch.__version__}, Python {platform.python_version()}.",
        f"{(time.monotonic() - began) / 60:.0f} minutes. **{verdict}**",
        "",
        "| fault | times | steps lost, mean | seconds until it trained again, median |",
        "|---|---|---|---|",
    ]
    for name in sorted(counts):
        lines.append(summary(name, [row for row in rows if row.fault == name]))
    lines += ["", "| no. | fault | at step | resumed at | steps lost | s | what jobs.jsonl says |", "|---|---|---|---|---|---|---|"]
    for number, row in enumerate(rows, 1):
        told = row.told.replace("|", "/")
        lines.append(f"| {number} | {row.fault} | {row.step} | {row.resumed_at} | {row.steps_lost} | {row.seconds:.0f} | {told} |")
    path = Path(TABLE)
    path.with_suffix(".new").write_text("\n".join(lines) + "\n", encoding="utf-8")
    path.with_suffix(".new").replace(path)


def test_a_training_survives_what_is_thrown_at_it(cluster: Cluster, training: MakeTraining, same: Callable[[dict[str, Any], dict[str, Any]], None]) -> None:
    draw, began, rows = Draw(SEED), time.monotonic(), list[Survived]()
    straight, run = (replace(training(name, settings=SETTINGS), steps=None) for name in ("straight", "chaos"))
    try:
        cluster.wait(lambda: goes_on(run, draw), "the first start", 240)
        for fault in draw_faults(draw):
            if len(rows) == NUM_FAULTS or (MINUTES and time.monotonic() - began > 60 * float(MINUTES)):
                break
            rows.append(throw(run, draw, fault))
            write_table(rows, began, "Under way: parameters and metrics are compared at the end.")
        cluster.wait(lambda: goes_on(run, draw), "training after the last fault", 240)
        cluster.prottrans("runs", "cancel", str(run.folder))
        cluster.wait(lambda: not cluster.run("squeue", "--noheader").stdout, "the jobs to end", 240)
        # Both end at the same step, with a short last job.
        straight.steps = run.steps = run.step + 5
        run.submit()
        run.wait_done(240)
        straight.submit()
        straight.wait_done(240 + run.steps)
        same(run.outcome(), straight.outcome())
    except BaseException:
        print(run.story())
        write_table(rows, began, "FAILED")
        raise
    assert len(rows) == NUM_FAULTS or MINUTES
    write_table(rows, began, f"Parameters, optimizer, losses and the order of samples after {run.steps} steps equal those of an undisturbed run, bit for bit.")
