"""The ledger in real runs: a line a node and step, means over ranks in metrics.jsonl, cut at a resume, and next to free."""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path

import pytest

from prottrans_hpc.train.node_timings import NodeTimings, Slots
from prottrans_hpc.train.records import JsonLines
from prottrans_hpc.train.timing import COMPUTE, PARTS, StepTiming, by_name


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_node_tells_where_the_time_of_every_step_went(start_ranks, make_run, tmp_path):
    run_dir = make_run(tmp_path / "run", "checkpoint.every_steps=5", stop_after_step=6)
    start_ranks(run_dir, 2, num_nodes=2).end()
    # What a start that was killed after step 8 would have left.
    for node in (0, 1, 2):
        file = JsonLines(run_dir / "timings" / f"node-{node:04d}.jsonl")
        for step in range(7 if node < 2 else 5, 9):
            file.append({"step": step, "ranks": 0})
        file.close()
    make_run(run_dir, "checkpoint.every_steps=5", num_ranks=4)
    start_ranks(run_dir, 4, num_nodes=2).end()
    metrics = lines_of(run_dir / "metrics.jsonl")
    *nodes, gone = [lines_of(path) for path in sorted((run_dir / "timings").iterdir())]
    assert [line["step"] for line in gone] == [5, 6]  # of a third node that an earlier start had
    assert [[line["step"] for line in lines] for lines in nodes] == [list(range(1, 17))] * 2
    for record, *lines in zip(metrics, *nodes, strict=True):
        assert [line["ranks"] for line in lines] == ([1, 1] if record["step"] <= 6 else [2, 2])
        for name in by_name([0.0] * len(PARTS)):
            assert record["ledger"][name] == pytest.approx(statistics.mean(line[name] for line in lines), abs=2e-6)
        for line in lines:
            assert line["compute_s"] == pytest.approx(sum(line[f"{name}_s"] for name in COMPUTE), abs=5e-6)
            assert line["slowest_compute_s"] >= line["compute_s"] > 0.0
            assert 0.0 <= line["least_exposed_comm_s"] <= line["exposed_comm_s"]
    # The laps between two status all-reduces are, but for their ends, the steps; step 16's ends before its save.
    assert sum(sum(record["ledger"].values()) for record in metrics[7:15]) == pytest.approx(sum(record["step_s"] for record in metrics[7:15]), rel=0.25)
    assert sum(record["ledger"]["checkpoint_s"] > 0.0 for record in metrics) >= 2


def test_slots_of_another_step_do_not_count():
    slots = Slots(2, None)
    slots.put(0, 7, [1.0] * len(PARTS))
    slots.put(1, 6, [2.0] * len(PARTS))
    assert slots.of_step(7) == [(1.0,) * len(PARTS)]
    assert slots.of_step(6) == [(2.0,) * len(PARTS)]
    slots.put(1, 7, [3.0] * len(PARTS))
    assert slots.of_step(7) == [(1.0,) * len(PARTS), (3.0,) * len(PARTS)]
    slots.close()


def test_a_disk_that_is_full_ends_the_file_only(caplog):
    timings = NodeTimings(Path("/dev/full"))
    timings.put(1, [1.0] * len(PARTS))
    timings._file = JsonLines(Path("/dev/full"))
    timings.write(1)
    timings.write(1)
    assert caplog.text.count("is written no further") == 1
    timings.close()


def test_the_ledger_costs_less_than_a_hundredth_of_the_smallest_step(tmp_path, start_ranks, make_run):
    """Its own cost is counted, rather than two noisy runs compared: a step of the smallest recipe takes about 0.1 s."""
    whole = ("phases.0.max_residues=512", "phases.0.global_batch_size=64", "loading.bin_residues=8192", "phases.0.steps=6", "validation.every_steps=0")
    run_dir = make_run(tmp_path / "run", *whole, num_ranks=1)
    start_ranks(run_dir, 1).end()
    metrics = lines_of(run_dir / "metrics.jsonl")
    step_s = statistics.median(record["step_s"] for record in metrics[1:])
    assert cost_of_a_step_s(tmp_path, num_micro_batches=4) < 0.01 * step_s


def cost_of_a_step_s(folder: Path, *, num_micro_batches: int) -> float:
    """Processor time of what the ledger does in a step: all its marks, the slots, the line of the file."""
    ledger, timings = StepTiming(), NodeTimings(folder / "node-0000.jsonl")
    timings.begin_at(0)
    rounds = []
    for number in range(5):
        began = time.thread_time()
        for step in range(50 * number, 50 * number + 50):
            next(ledger.waits_for(iter([step])))
            for _ in range(num_micro_batches):
                with ledger.part("forward"):
                    pass
                with ledger.part("backward"):
                    pass
            for name in ("exposed_comm", "exposed_comm", "optimizer", "optimizer", "checkpoint"):
                with ledger.part(name):
                    pass
            ledger.end_lap()
            seconds = ledger.read()
            timings.put(step, seconds)
            timings.write(step)
            by_name(seconds)
        rounds.append((time.thread_time() - began) / 50)
    timings.close()
    return min(rounds)
