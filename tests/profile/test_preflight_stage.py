"""A preflight by real ranks on this computer, through the command line: what it keeps, and over which back end it measures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from prottrans_hpc.errors import CheckpointError
from prottrans_hpc.profile import preflight_stage
from prottrans_hpc.rank import RankContext
from prottrans_hpc.recipe_parallel import Parallel

QUICK = ("--set", "phases.0.global_batch_size=8", "--set", "validation.every_steps=0", "--steps", "1")


def machine(folder: Path, starter: str) -> str:
    path = folder / "here.toml"
    path.write_text(
        f'name = "here"\ndescription = "here"\nscheduler = "local"\nstarter = "{starter}"\nranks_per_node = 1\nmax_nodes = 4\n[node]\nnum_cpu_cores = 0\n'
    )
    return str(path)


def test_a_preflight_that_passes_is_kept_and_the_training_follows(tmp_path: Path, prottrans, small_corpus: Path) -> None:
    run_dir = tmp_path / "run"
    where = ("--corpus", str(small_corpus), "--run-dir", str(run_dir), "--machine", machine(tmp_path, "processes"), "--nodes", "2")
    done = prottrans("pretrain", "tiny_prot_bert", *QUICK, *where, "--preflight", "comm:1000")
    found = json.loads((run_dir / "preflight.json").read_text())
    assert (found["verdict"], found["exit_code"], found["backend"], found["ranks"], len(found["hosts"])) == ("passed", 0, "gloo", 2, 2)
    assert {fit["collective"] for fit in found["fits"]} == {"all_reduce", "reduce_scatter", "all_gather"}
    assert all(fit["latency_s"] >= 0 for fit in found["fits"])
    assert all(seconds > 0 for seconds in (*found["node_seconds"]["link"], *found["node_seconds"]["compute"]))
    assert "preflight passed in " in done.stderr
    assert done.stderr.index("preflight passed") < done.stderr.index("step 1 of 1")
    events = [json.loads(line)["event"] for line in (run_dir / "history.jsonl").read_text().splitlines()]
    assert events == ["preflight", "start", "stop"]


@pytest.mark.horovod
@pytest.mark.mpi
def test_it_measures_over_what_the_recipe_trains_with(tmp_path: Path, prottrans, small_corpus: Path) -> None:
    run_dir = tmp_path / "run"
    where = ("--corpus", str(small_corpus), "--run-dir", str(run_dir), "--machine", machine(tmp_path, "mpirun"), "--nodes", "2")
    prottrans("pretrain", "tiny_prot_bert", *QUICK, *where, "--set", "parallel.comm=horovod", "--preflight", "comm:1000")
    found = json.loads((run_dir / "preflight.json").read_text())
    assert (found["verdict"], found["backend"], {fit["backend"] for fit in found["fits"]}) == ("passed", "horovod", {"horovod"})


def test_the_first_rank_that_fails_leaves_its_reason(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(CheckpointError):
            preflight_stage.check({"run_dir": str(tmp_path)})
    assert (tmp_path / ".preflight-error").read_text() == f"{tmp_path} is not a run directory: it has no run.json"


@pytest.mark.gpu
def test_with_gpus_it_measures_nccl() -> None:
    assert preflight_stage.back_end_of(Parallel(), RankContext(0, 2, 0, 2, 0, 1, "here", "none")) == "nccl"
