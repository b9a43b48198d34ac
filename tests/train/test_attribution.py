"""Where non-finite numbers come from: the judgement on made-up replays, and real ranks that are poisoned once or again and again."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from prottrans_hpc.train.attribution import Finding, Replay, findings, origins, verdict

POISONED = Path(__file__).with_name("poisoned_rank.py")
NAN = math.nan


def found(losses: Sequence[float], first: Sequence[Replay], second: Sequence[Replay] | None = None, **how: bool) -> list[Finding]:
    batches: Any = [SimpleNamespace(sample_ids=np.arange(10 * index, 10 * index + 3)) for index in range(len(losses))]
    return findings(5, batches, losses, [first, second or first], **({"exact": True, "bitwise": True} | how))


def test_what_is_bad_again_is_a_matter_of_the_numbers() -> None:
    fine, bad = Replay(2.0, square=1.0), Replay(2.0, ["decoder.bias", "layers.0.query.weight"], NAN, NAN)
    assert found([2.0, 2.0], [fine, bad]) == [Finding(5, 1, "gradient", (10, 11, 12), 3, "decoder.bias", 2)]
    assert [(one.what, one.micro_batch) for one in found([NAN, 2.0], [Replay(NAN, ["decoder.bias"], NAN, NAN), fine])] == [("loss", 0)]


def test_what_comes_out_otherwise_is_a_matter_of_the_hardware() -> None:
    fine = Replay(2.0, square=1.0)
    assert [one.what for one in found([NAN], [fine])] == ["differs"]
    assert [one.what for one in found([2.0000001], [fine])] == ["differs"]
    assert found([2.0000001], [fine], bitwise=False) == []
    assert [one.what for one in found([2.0], [fine], [Replay(2.0, ["decoder.bias"], NAN)])] == ["differs"]
    assert found([NAN], [fine], exact=False) == []


def test_the_verdict_of_all_ranks() -> None:
    numbers, differs = Finding(1, 0, "gradient"), Finding(2, 0, "differs")
    assert verdict([numbers, differs], NAN, exact=True) == "hardware"
    assert verdict([numbers], NAN, exact=True) == "numbers"
    assert verdict([], 1.5, exact=True) == "overflow"
    assert verdict([], 0.5, exact=True) == "lost"
    assert verdict([], 0.5, exact=False) == "unknown"


def test_what_a_tensor_group_has_from_one_another_is_told_once() -> None:
    one, other, third = Finding(3, 0, "loss"), Finding(2, 0, "gradient"), Finding(2, 1, "gradient")
    assert origins([other, third, one], 2) == [third, one]
    assert origins([other, third, one], 1) == [other, third, one]


CASES = {
    "parameter": ({"how": "parameter", "parameter": "layers.1.value.weight"}, "numbers"),
    "loss_once": ({"how": "loss", "forwards": 1}, "hardware"),
    "gradient_once": ({"how": "gradient", "forwards": 1}, "lost"),
}


FULL, HYBRID = ("parallel.sharding=full",), ("parallel.sharding=hybrid", "parallel.shard_ranks=2")
LAYOUTS = {
    "whole": (2, ()),
    "full": (2, FULL),
    "hybrid": (4, HYBRID),
    "tensor": (2, ("parallel.tensor_ranks=2",)),
    "both": (4, (*FULL, "parallel.tensor_ranks=2")),
}


@pytest.mark.parametrize(
    ("case", "layout"),
    [*((case, "whole") for case in CASES), ("parameter", "full"), pytest.param("parameter", "both", marks=pytest.mark.slow)],
)
def test_a_poisoned_step_is_traced(tmp_path, make_run, start_ranks, history, prottrans, case, layout) -> None:
    (poison, expected), (num_ranks, settings) = CASES[case], LAYOUTS[layout]
    folder = make_run(tmp_path / "run", "validation.every_steps=0", *settings, num_ranks=num_ranks, stop_after_step=4)
    start_ranks(folder, num_ranks, main=POISONED, env={"POISON": json.dumps({"steps": [3], "ranks": [1], "passes": 1} | poison)}).end(0)
    (event,) = [event for event in history(folder) if event["event"] == "non-finite numbers"]
    assert (event["step"], event["verdict"]) == (3, expected)
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped"] for line in metrics] == [False, False, True, False]
    host = os.uname().nodename
    if expected != "lost":
        assert {(one["rank"], one["host"]) for one in event["where"]} == {(1, host)}
        assert all(one["samples"] for one in event["where"])
    if case == "parameter":
        assert {one["parameter"] for one in event["where"]} == {"layers.1.value.weight"}
        assert {one["num_parameters"] for one in event["where"]} == {1}
        shown = prottrans("runs", "show", str(folder)).stdout
        assert f"step 3 skipped, non-finite numbers: computed again it is not finite again; rank 1 on {host}, first layers.1.value.weight, samples" in shown


@pytest.mark.parametrize("layout", ["hybrid", pytest.param("tensor", marks=pytest.mark.slow)])
def test_a_loss_that_is_not_finite_again_is_traced_to_its_rank(tmp_path, make_run, start_ranks, history, layout) -> None:
    num_ranks, settings = LAYOUTS[layout]
    folder = make_run(tmp_path / "run", "validation.every_steps=0", *settings, num_ranks=num_ranks, stop_after_step=4)
    start_ranks(folder, num_ranks, main=POISONED, env={"POISON": json.dumps({"steps": [3], "ranks": [1], "passes": 1, "how": "loss"})}).end(0)
    (event,) = [event for event in history(folder) if event["event"] == "non-finite numbers"]
    assert (event["step"], event["verdict"]) == (3, "numbers")
    assert {(one["rank"], one["what"]) for one in event["where"]} == {(1, "loss")}
    assert all(one["samples"] and one["parameter"] for one in event["where"])
