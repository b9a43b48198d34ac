"""Sharded and tensor-parallel models take the steps of a whole one: real ranks over gloo, real proteins, every layout against one rank."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

WORK = Path(__file__).with_name("sharded_work.py")
MICRO = ("phases.0.max_residues=48", "phases.0.global_batch_size=8", "loading.bin_residues=96", "precision=fp32")
TWINS = ("tiny_prot_bert", "tiny_prot_albert", "tiny_prot_electra", "tiny_prot_t5", "tiny_protein_lm")
LANES = ("tiny_prot_txl", "tiny_prot_xlnet")


MOVED = ("memory.lms_limit_gib=0",)
MOVED_OVER_A_LIMIT = ("memory.lms_limit_gib=0.0001",)
NARROW_MOVED = ("memory.recompute_every=1", "memory.recompute_keeps=attention_and_narrow", *MOVED)
ROUNDED = ("memory.saved=bf16", *MOVED)


def _case(recipe: str, name: str, layout: list[int], *settings: str) -> dict[str, Any]:
    return {"name": f"{recipe} {name}", "recipe": recipe, "layout": layout, "settings": [*MICRO, *settings]}


CASES = {
    2: [
        *(_case(twin, "full", [1, 2, 1]) for twin in (*TWINS, *LANES)),
        *(_case(twin, "tensor", [1, 1, 2]) for twin in (*TWINS, *LANES)),
        *(_case(twin, "full, moved", [1, 2, 1], *MOVED) for twin in ("tiny_prot_bert", "tiny_prot_albert", "tiny_prot_t5", "tiny_prot_txl")),
        _case("tiny_prot_bert", "tensor, moved over a limit", [1, 1, 2], *MOVED_OVER_A_LIMIT),
        _case("tiny_prot_t5", "tensor, narrow products moved", [1, 1, 2], *NARROW_MOVED),
        _case("tiny_prot_t5", "full, rounded", [1, 2, 1], *ROUNDED),
        _case("tiny_prot_bert", "tensor, rounded", [1, 1, 2], *ROUNDED),
    ],
    4: [
        _case("tiny_prot_bert", "full", [1, 4, 1]),
        _case("tiny_prot_bert", "hybrid", [2, 2, 1]),
        _case("tiny_prot_bert", "hybrid, recomputed", [2, 2, 1], "memory.recompute_every=1"),
        _case("tiny_prot_bert", "tensor and full", [1, 2, 2]),
        _case("tiny_prot_bert", "tensor and full, bf16", [1, 2, 2], "precision=bf16"),
        _case("tiny_prot_albert", "tensor and copies", [2, 1, 2]),
        _case("tiny_prot_t5", "tensor", [1, 1, 4]),
        _case("tiny_prot_t5", "hybrid, bf16", [2, 2, 1], "precision=bf16"),
        _case("tiny_prot_txl", "full", [1, 4, 1]),
        _case("tiny_prot_bert", "tensor and full, narrow products moved", [1, 2, 2], *NARROW_MOVED),
        _case("tiny_prot_bert", "hybrid, moved over a limit", [2, 2, 1], *MOVED_OVER_A_LIMIT),
        _case("tiny_prot_t5", "tensor and full", [1, 2, 2]),
        _case("tiny_prot_t5", "tensor and full, moved", [1, 2, 2], *MOVED),
        _case("tiny_prot_t5", "hybrid, bf16, rounded", [2, 2, 1], "precision=bf16", *ROUNDED),
        _case("tiny_prot_txl", "tensor and full, recomputed", [1, 2, 2], "memory.recompute_every=1"),
        _case("tiny_prot_xlnet", "tensor and copies, recomputed", [2, 1, 2], "memory.recompute_every=1"),
        _case("tiny_prot_xlnet", "tensor and full, bf16", [1, 2, 2], "precision=bf16"),
        *(_case(twin, "tensor", [1, 1, 4]) | {"shape": {"num_heads": 4}} for twin in LANES),
    ],
}


def _start(folder: Path, corpus: Path, cases: list[dict[str, Any]], num_ranks: int, device: str = "cpu") -> list[subprocess.Popen[str]]:
    shared = os.environ | {"PYTHONPATH": str(WORK.parents[2]), "OMP_NUM_THREADS": "1", "PROTTRANS_NONCE": secrets.token_hex(8)}
    processes = []
    for rank in range(num_ranks):
        place = {"RANK": rank, "WORLD_SIZE": num_ranks, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": num_ranks, "NODE_RANK": 0}
        argv = ["timeout", "-k", "5", "600", sys.executable, str(WORK), str(corpus), json.dumps(cases), str(folder), device]
        own = shared | {f"PROTTRANS_{name}": str(value) for name, value in place.items()}
        processes.append(subprocess.Popen(argv, env=own, stderr=subprocess.PIPE, text=True))
    return processes


Trained = Callable[[int], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, small_corpus: Path) -> Trained:
    """`trained(n)`: what every rank of n reports of all cases, run once."""
    done: dict[int, list[dict[str, Any]]] = {}

    def run(num_ranks: int) -> list[dict[str, Any]]:
        if num_ranks not in done:
            folder = tmp_path_factory.mktemp(f"on-{num_ranks}")
            processes = _start(folder, small_corpus, CASES[num_ranks], num_ranks)
            said = [process.communicate()[1] for process in processes]
            assert [process.returncode for process in processes] == [0] * num_ranks, "\n".join(said)
            done[num_ranks] = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(num_ranks)]
        return done[num_ranks]

    return run


@pytest.mark.parametrize(("num_ranks", "name"), [(num_ranks, case["name"]) for num_ranks, cases in CASES.items() for case in cases])
def test_a_cut_model_takes_the_steps_of_a_whole_one(num_ranks: int, name: str, trained: Trained) -> None:
    first, *others = [report[name] for report in trained(num_ranks)]
    # In fp32 sums are taken in another order; in bf16 each rank rounds its own partial products to 8 bits, and a ReLU of T5 may fall on its other side.
    loss, weights = (2e-3, 2e-2) if "bf16" in name or "rounded" in name else (2e-6, 1e-5)
    assert first["losses"] == pytest.approx(first["expected"], rel=loss)
    assert first["furthest"] < weights
    assert {report["digest"] for report in others} == {first["digest"]}, "ranks that hold the same weights must hold the same bits"
    assert first["losses"][1] != first["losses"][0]


@pytest.mark.parametrize(("num_ranks", "name"), [(num_ranks, case["name"]) for num_ranks, cases in CASES.items() for case in cases if "moved" in case["name"]])
def test_large_model_support_of_a_cut_model_changes_no_bit_and_leaves_its_weights_alone(num_ranks: int, name: str, trained: Trained) -> None:
    reports = [(report[name], report[name.rpartition(", ")[0]]) for report in trained(num_ranks)]
    for moved, plain in reports:
        assert (moved["losses"], moved["digest"]) == (plain["losses"], plain["digest"])
        assert moved["weights_taken"] == plain["taken"] == 0
        assert moved["taken"] > 20


@pytest.mark.parametrize(
    ("num_ranks", "name"), [(num_ranks, case["name"]) for num_ranks, cases in CASES.items() for case in cases if "rounded" in case["name"]]
)
def test_weights_that_were_brought_together_are_not_rounded(num_ranks: int, name: str, trained: Trained) -> None:
    for report in trained(num_ranks):
        rounded, plain = report[name], report[name.rpartition(", ")[0]]
        assert rounded["weights_taken"] == 0 and rounded["taken"] > 20
        assert rounded["digest"] != plain["digest"]


@pytest.mark.parametrize(("num_ranks", "name"), [(num_ranks, case["name"]) for num_ranks, cases in CASES.items() for case in cases])
def test_a_cut_model_starts_with_the_bits_of_a_whole_one(num_ranks: int, name: str, trained: Trained) -> None:
    report = trained(num_ranks)[0][name]
    assert report["start"] == report["expected_start"] and len(set(report["start"].values())) > 3
    assert report["drawn"] == report["expected_drawn"], "what ranks compare is what whole models compare"


def test_a_rank_holds_its_part_only(trained: Trained) -> None:
    for report in trained(4):
        assert report["tiny_prot_bert full"]["held"] == pytest.approx(report["tiny_prot_bert full"]["whole"] / 4, rel=0.01)
        assert report["tiny_prot_bert hybrid"]["held"] == pytest.approx(report["tiny_prot_bert hybrid"]["whole"] / 2, rel=0.01)


def test_the_death_of_a_rank_in_the_forward_pass_is_told(tmp_path: Path, small_corpus: Path) -> None:
    processes = _start(tmp_path, small_corpus, [_case("tiny_prot_bert", "dies", [1, 1, 2])], 2)
    codes = [process.wait() for process in processes]
    assert codes[0] == 0, processes[0].communicate()[1]
    kind, text = json.loads((tmp_path / "0.json").read_text())["error"]
    assert kind == "RankLostError" and "forward pass of a sharded model" in text


@pytest.mark.gpu
def test_a_gpu_gets_a_model_layer_by_layer(tmp_path: Path, small_corpus: Path) -> None:
    """One rank over NCCL: nothing is cut, but everything goes the way of what is."""
    cases = [_case("tiny_prot_bert", "alone", [1, 1, 1]), _case("tiny_prot_t5", "alone, bf16", [1, 1, 1], "precision=bf16")]
    (process,) = _start(tmp_path, small_corpus, cases, 1, "cuda")
    said = process.communicate()[1]
    assert process.returncode == 0, said
    for name, report in json.loads((tmp_path / "0.json").read_text()).items():
        if name != "rank":
            assert report["losses"] == pytest.approx(report["expected"], rel=1e-4), name
