"""What a plan comes to, and how it is said."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from prottrans_hpc.errors import ConfigError
from prottrans_hpc.launch import plan_text
from prottrans_hpc.launch.checks import CorpusFacts
from prottrans_hpc.launch.demand import Demand
from prottrans_hpc.launch.memory_room import GIB
from prottrans_hpc.launch.prospect import Assumptions, Prospect, check_storage, look_ahead
from prottrans_hpc.machine import read_machine
from prottrans_hpc.recipe import read_recipe

BFD = CorpusFacts(Path("/data/bfd"), "a" * 64, 2_122_000_000, 393_000_000_000, 1000, num_bytes=420 * GIB)


def seen(recipe: str = "prot_bert_bfd", machine: str = "summit", demand: Demand | None = None, *, settings: tuple[str, ...] = (), **known: Any) -> Prospect:
    return look_ahead(read_recipe(recipe, settings), read_machine(machine), demand or Demand(num_racks=52), **known)


def words(prospect: Prospect, what: str) -> str:
    return " | ".join(text for name, text in plan_text.describe(prospect) if name == what)


def test_the_published_run_is_explained() -> None:
    prospect = seen(assumptions=Assumptions(total_min=36 * 60))
    assert words(prospect, "size").startswith("52 racks = 936 nodes x 6 = 5,616 ranks, one NVIDIA Tesla V100")
    assert words(prospect, "queue") == "batch, bin 2 (922-2,764 nodes), walltime 24:00 (the longest there)"
    assert words(prospect, "why") == ("bin 2 holds 52 racks = 936 nodes to 153 racks = 2754 nodes; this is the smallest whole-rack size that may run 24:00")
    assert words(prospect, "licence") == "IBM DDL (parallel.comm = 'horovod') ends at 954 nodes = 53 racks"
    assert words(prospect, "time") == "36:00 of work, as given"
    assert words(prospect, "jobs").startswith("2 chained jobs (--chain) of 24:00; each gives 5 minutes to starting and 10 to saving")
    assert words(prospect, "cost") == "22,464 node-hours, 134,784 GPU-hours a job; 2 jobs: at most 44,928 node-hours"
    assert prospect.num_jobs == 2


def test_another_size_of_the_same_bin_is_told_which_the_smallest_was() -> None:
    assert "the first is the smallest whole-rack size" in words(seen(demand=Demand(num_racks=53)), "why")
    partial = seen(demand=Demand(num_nodes=922, partial_rack=True))
    assert words(partial, "why") == "bin 2 holds 922 nodes to 2764 nodes; this is the smallest size that may run 24:00"
    # Bin 1 may run no longer than bin 2: its smallest size is nothing to aim for.
    assert "smallest" not in words(seen(demand=Demand(num_racks=160)), "why")
    assert words(seen(machine="perlmutter", demand=Demand(num_nodes=64), settings=("precision=bf16",)), "why") == ""


def test_a_shorter_walltime_is_shown_beside_the_longest() -> None:
    assert words(seen(demand=Demand(num_racks=52, walltime_min=600)), "queue").endswith("walltime 10:00 (at most 24:00 there)")


def test_batches_are_said_for_every_phase() -> None:
    text = words(seen(), "batch")
    assert "phase 0, 800,000 steps of 32,768 sequences up to 512 residues: 5.83 a rank, 1 bin a rank and step" in text
    assert "phase 1, 200,000 steps of 6,144 sequences up to 2,048 residues: 1.09 a rank" in text
    several = words(seen("prot_bert", "nvl72", Demand(num_racks=1), settings=("precision=bf16",)), "batch")
    assert "4 bins (accumulation steps) a rank and step" in several
    idle = words(seen("tiny_prot_bert"), "batch")
    assert "5,552 ranks have no sequence" in idle
    assert "some ranks have nothing to do" in words(seen("tiny_prot_bert"), "note")


def test_a_corpus_tells_lengths_and_size() -> None:
    assert "are assumed (--corpus CORPUS tells)" in words(seen(), "lengths")
    known = seen(corpus=BFD)
    assert words(known, "lengths").startswith("185 residues a sequence on the mean, from the corpus")
    assert words(known, "storage") == "each node copies 420.0 GiB to /mnt/bb/$USER of 1,490 GiB and reads it there"
    assert words(seen("prot_bert", "perlmutter", Demand(num_nodes=64), settings=("precision=bf16",), corpus=BFD), "storage") == (
        "420.0 GiB are read from the shared file system"
    )
    elsewhere = CorpusFacts(Path("/data/x"), "", 0, 0, 0)
    assert words(seen(corpus=elsewhere), "storage").startswith("each node copies the corpus")


def test_a_corpus_that_no_disk_holds_is_refused() -> None:
    too_large = CorpusFacts(Path("/data/x"), "a", 10, 1000, 0, num_bytes=1491 * GIB)
    with pytest.raises(ConfigError, match=r"1,491\.0 GiB, the node-local disk of summit 1,490 GiB: set staging = 'none'"):
        seen(corpus=too_large)
    check_storage(read_machine("perlmutter"), too_large)  # reads it where it is
    check_storage(read_machine("summit"), None)


def test_the_estimate_says_what_it_assumes() -> None:
    assert "of work, at 4.71 TFLOP/s a GPU in fp32, 30 % of the peak (a guess: --utilisation)" in words(seen(), "time")
    faster = seen(assumptions=Assumptions(utilisation=0.6))
    slower = seen(assumptions=Assumptions(utilisation=0.3))
    assert slower.work_min and faster.work_min and slower.work_min == pytest.approx(2 * faster.work_min)
    assert "(as given)" in words(slower, "time")
    again = seen(settings=("memory.recompute_every=1",))
    assert words(again, "time").endswith("layers that are computed again are counted")


def test_the_bare_plan_of_the_published_run_is_a_chain_of_two() -> None:
    prospect = seen("prot_txl_bfd")
    assert prospect.num_jobs == 2 and words(prospect, "time").startswith("about 36:0")
    assert "5.8 TFLOP/s a GPU in fp16, which a training was seen to reach" in words(prospect, "time")
    values = plan_text.to_json(prospect, recipe_name="prot_txl_bfd")
    assert values["utilisation"] == pytest.approx(5.8 / 125) and "seen" in values["rate"]


def test_nobody_guesses_the_speed_of_a_cpu() -> None:
    prospect = seen("tiny_prot_bert", "rhea", Demand(num_nodes=4))
    assert prospect.work_min is prospect.rate is None and words(prospect, "time").startswith("unknown")


def test_what_lies_in_host_memory_is_said_with_how_much_there_is() -> None:
    assert "host memory" not in words(seen(), "memory")
    moved = seen(settings=("memory.lms_limit_gib=0",))
    assert moved.memory and f"{moved.memory.in_host / GIB:,.1f} GiB in host memory; 85.3 GiB are a rank's share of its node" in words(moved, "memory")
    assert plan_text.to_json(moved, recipe_name="x")["host_memory_gib"] == pytest.approx(512 / 6)


def test_a_given_time_shrinks_with_what_is_done() -> None:
    half = seen(assumptions=Assumptions(total_min=3600, first_step=500_000))
    assert half.work_min == 1800 and "60:00 of work, as given, 30:00 of it left" in words(half, "time")
    # The given time is that of the run's own end.
    assert seen(assumptions=Assumptions(total_min=3600, first_step=500_000, last_step=1_000_000)).work_min == 1800


def test_what_is_not_known_is_said() -> None:
    prospect = seen("tiny_prot_bert", "laptop", Demand())
    assert words(prospect, "time").startswith("unknown") and words(prospect, "memory").startswith("not checked")
    assert [words(prospect, what) for what in ("queue", "jobs", "cost", "licence", "storage")] == [""] * 5
    assert prospect.num_jobs is None and prospect.node_hours_per_job is None


def test_a_chain_that_is_too_long_is_said_and_does_not_hide_the_plan() -> None:
    prospect = seen(assumptions=Assumptions(total_min=99_999 * 60))
    assert "more than the 100 that sites let a user queue" in words(prospect, "jobs")
    assert words(prospect, "cost")
    with pytest.raises(ConfigError):
        _ = prospect.num_jobs


def test_json_is_plain_and_complete() -> None:
    values = json.loads(json.dumps(plan_text.to_json(seen(corpus=BFD, assumptions=Assumptions(total_min=2160)), recipe_name="prot_bert_bfd")))
    assert values["allocation"] | {"num_nodes": 936, "num_racks": 52, "num_ranks": 5616, "walltime_min": 1440} == values["allocation"]
    assert (values["bin"]["name"], values["num_jobs"], values["node_hours_per_job"], values["gpu_hours_per_job"]) == ("2", 2, 22_464, 134_784)
    assert [round(phase["sequences_per_rank"], 2) for phase in values["phases"]] == [5.83, 1.09]
    assert not values["phases"][0]["mean_is_assumed"] and values["memory"]["peak"] < 0.9 * 16 * GIB
    assert values["corpus_bytes"] == 420 * GIB and re.search("smallest whole-rack", values["why"][0])


def test_json_of_a_laptop_has_nulls() -> None:
    values = plan_text.to_json(seen("tiny_prot_bert", "laptop", Demand()), recipe_name="tiny_prot_bert")
    assert [values[key] for key in ("bin", "memory", "memory_gib", "work_min", "num_jobs", "node_hours_per_job", "corpus_bytes")] == [None] * 7


def test_json_of_a_chain_that_is_too_long() -> None:
    values = plan_text.to_json(seen(assumptions=Assumptions(total_min=99_999 * 60)), recipe_name="x")
    assert values["num_jobs"] is None and "4,211 jobs" in values["chain_problem"] and values["work_min"]
