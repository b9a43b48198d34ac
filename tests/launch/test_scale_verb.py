"""`prottrans scale`: what it plans, prints and refuses; the smallest real study; points that fail; all points in one job."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest

from prottrans_hpc.errors import ConfigError, SubmitError
from prottrans_hpc.launch import scale, scale_job
from prottrans_hpc.launch.checks import read_corpus_facts
from prottrans_hpc.machine import read_machine
from prottrans_hpc.recipe import read_recipe
from prottrans_hpc.scaling_study import Study, StudyDir

SMALL = ("--steps", "2", "--warmup", "1", "--repetitions", "1", "--set", "phases.0.global_batch_size=4")

PROFILE = """
name = "fragile"
description = "a laptop on which runs of two ranks fail until it is mended"
scheduler = "local"
starter = "processes"
ranks_per_node = 1
max_nodes = 4
launcher_prefix = ["{prefix}"]
[node]
num_cpu_cores = 0
"""
PREFIX = """#!/bin/bash
if [ "$PROTTRANS_WORLD_SIZE" = 2 ] && [ ! -e "{mended}" ]; then exit 65; fi
exec "$@"
"""


@pytest.fixture
def fragile(tmp_path) -> Path:
    prefix = tmp_path / "prefix.sh"
    prefix.write_text(PREFIX.format(mended=tmp_path / "mended"))
    prefix.chmod(0o755)
    profile = tmp_path / "fragile.toml"
    profile.write_text(PROFILE.format(prefix=prefix))
    return profile


def test_a_real_study_names_what_fails_and_goes_on_where_it_was(prottrans, small_corpus, fragile, tmp_path):
    out = tmp_path / "study"
    command = ("scale", "tiny_prot_bert", "--corpus", str(small_corpus), "--machine", str(fragile), "--nodes", "1,2", *SMALL, "--out", str(out))
    first = prottrans(*command, code=71)
    assert "1 points failed and are not in the report: n0002-r1 has not taken its steps (exit code 65" in first.stderr
    assert sizes_in(out / "scaling.csv") == ["1"]
    times = {path: path.stat().st_mtime_ns for path in out.glob("points/n0001-r1/metrics.jsonl")}
    (tmp_path / "mended").touch()
    second = prottrans(*command)
    assert "1 points measured; to run, in this order: n0002-r1\n" in second.stderr
    assert sizes_in(out / "scaling.csv") == ["1", "2"]
    assert {path.name for path in (out / "points").iterdir()} == {"n0001-r1", "n0002-r1", "n0002-r1-again1"}
    assert {path: path.stat().st_mtime_ns for path in times} == times
    check_records(out)
    # Nothing is left to do; and what was measured otherwise does not mix with it.
    assert "to run, in this order: nothing" in prottrans(*command).stderr
    assert "loading.bin_residues: 8192 -> 512" in prottrans(*command, "--set", "loading.bin_residues=512", code=78).stderr
    assert "warmup: 1 -> 0" in prottrans(*command, "--warmup", "0", code=78).stderr


def sizes_in(table: Path) -> list[str]:
    with table.open(newline="") as file:
        return [row["nodes"] for row in csv.DictReader(file)]


def check_records(out: Path) -> None:
    """scaling.json is what the runs recorded, warm-up and last step left out; no checkpoint stays."""
    points = json.loads((out / "scaling.json").read_text())["points"]
    assert [(point["nodes"], point["order"], point["ranks"]) for point in points] == [(1, 1, 1), (2, 2, 2)]
    for point in points:
        records = [json.loads(line) for line in (out / point["run_dir"] / "metrics.jsonl").read_text().splitlines()]
        assert [record["step"] for record in records] == [1, 2, 3, 4]
        assert point["step_s"] == [record["step_s"] for record in records[1:3]]
        assert point["residues"] == [record["num_residues"] for record in records[1:3]]
        assert point["ledger"]["backward_s"] == [record["ledger"]["backward_s"] for record in records[1:3]]
        assert [share["node"] for share in point["per_node"]] == list(range(point["nodes"]))
        assert all(share["compute_s"] > 0 for share in point["per_node"])
        assert not (out / point["run_dir"] / "checkpoints").exists()
    assert records[1]["num_sequences"] == 8  # weak: twice the four of one node


def test_a_dry_run_prints_the_scripts_and_touches_nothing(prottrans, small_corpus, tmp_path):
    where = ("--corpus", str(small_corpus), "--machine", "slurm_cluster", "--nodes", "1,2", "--walltime", "0:20", "--out", str(tmp_path / "out"))
    each = prottrans("scale", "tiny_prot_bert", *SMALL, *where, "--dry-run")
    assert each.stdout.count("#!/bin/bash") == each.stdout.count("#SBATCH --time=") == 2
    one = prottrans("scale", "tiny_prot_bert", *SMALL, *where, "--dry-run", "--one-job")
    assert (one.stdout.count("#!/bin/bash"), one.stdout.count("#SBATCH --time=")) == (3, 1)
    assert "#SBATCH --nodes=2\n" in one.stdout
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("tiny_prot_bert",), 64, "--corpus and --nodes"),
        (("tiny_prot_bert", "--nodes", "1,x"), 64, "no list of numbers of nodes"),
        (("tiny_prot_bert", "--nodes", "1,65", "--corpus", "CORPUS"), 64, "64"),
        (("tiny_prot_bert", "--nodes", "1", "--corpus", "CORPUS", "--one-job"), 64, "--one-job is for batch systems"),
        (("--report-only",), 66, "no scaling study"),
    ],
)
def test_what_cannot_be_is_refused(prottrans, small_corpus, tmp_path, arguments, code, said):
    words = [str(small_corpus) if word == "CORPUS" else word for word in arguments]
    assert said in prottrans("scale", *words, "--out", str(tmp_path / "out"), code=code).stderr
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_left_alone(prottrans, small_corpus, tmp_path):
    (tmp_path / "thesis.tex").touch()
    refused = prottrans("scale", "tiny_prot_bert", "--corpus", str(small_corpus), "--nodes", "1", "--out", str(tmp_path), code=64)
    assert "is no scaling study: choose another --out" in refused.stderr


@pytest.fixture
def order(small_corpus, tmp_path) -> scale.Order:
    study = Study("tiny_prot_bert", "weak", (1, 2), repetitions=2, warmup=1, steps=2, seed=1)
    facts = read_corpus_facts(small_corpus)
    return scale.Order(
        study, StudyDir(tmp_path / "study"), read_recipe("tiny_prot_bert"), facts, read_machine("slurm_cluster"), keeps_bins=False, walltime_min=20
    )


def outer(order: scale.Order, scripts: dict[str, str]) -> tuple[Path, list[Path]]:
    """The job script of the allocation, with points that do as told: name -> shell; and their folders in the order in which they run."""
    plans = scale_job.plans_of(order, order.study.points())
    for plan in plans:
        (plan.run_dir.path / "checkpoints").mkdir(parents=True)
        plan.run_dir.job_script.write_text(f'echo "{plan.run_dir.path.name}" >> "{order.folder.path}/ran"\n{scripts.get(plan.run_dir.path.name, "")}\n')
    script = order.folder.job.job_script
    script.parent.mkdir()
    script.write_bytes(scale_job.render_outer(order, plans))
    return script, [plan.run_dir.path for plan in plans]


def test_one_job_runs_every_point_and_ends_with_the_code_of_one_that_failed(order):
    script, folders = outer(order, {"n0002-r1": "exit 76"})
    done = subprocess.run(["bash", str(script)], capture_output=True, text=True, timeout=120, check=False)
    assert (order.folder.path / "ran").read_text().split() == [folder.name for folder in folders]
    assert done.returncode == int(order.folder.job.exit_code.read_text()) == 76
    assert f"{order.folder.path}/points/n0002-r1 ended with exit code 76" in done.stderr
    assert [folder.name for folder in folders if (folder / "checkpoints").exists()] == ["n0002-r1"]


def test_a_signal_reaches_the_point_that_runs_and_leaves_the_others(order):
    script, folders = outer(order, {})
    first = folders[0]
    (first / "job.sh").write_text(f'trap \'echo told > "{first}/told"; exit 75\' USR1\ntouch "{first}/runs"\nwhile :; do sleep 0.05; done\n')
    job = subprocess.Popen(["bash", str(script)], stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while not (first / "runs").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        job.send_signal(signal.SIGUSR1)
        assert job.wait(timeout=120) == int(order.folder.job.exit_code.read_text()) == 75
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
            job.wait()
    assert (first / "told").exists()
    assert not (order.folder.path / "ran").exists()


def test_the_scripts_of_points_in_one_job_have_no_directives(order):
    for plan in scale_job.plans_of(order, order.study.points()):
        script = scale_job.inner_script(plan).decode()
        assert "#SBATCH" not in script
        assert f"--nodes={plan.allocation.num_nodes}" in script


def test_a_job_needs_a_batch_system(order):
    with pytest.raises(ConfigError, match="laptop has none"):
        scale.check_one_job(replace(order, machine=read_machine("laptop")))


def test_no_second_job_measures_while_one_does(order):
    point = order.study.points()[0]
    scale.refuse_while_running(scale.Standing((), {}, (point,), ()))
    with pytest.raises(SubmitError, match="in job 7 already"):
        scale.refuse_while_running(scale.Standing((), {point: "7"}, (), ()))
