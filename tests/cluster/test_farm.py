"""Farms on the real Slurm: preprocess and embed as arrays of one-node jobs through submitit, byte for byte as in one process.

The cluster keeps no accounts (no sacct), as many small ones do not: what becomes of jobs is told by squeue alone.
"""

from __future__ import annotations

import json
import sys
import time

import pytest
import zstandard

RULES = ("--shards", "4", "--dedup", "--validation", "0.05", "--json")

KILL = """
import os, signal
from pathlib import Path
for path in Path("/proc").glob("[0-9]*/cmdline"):
    if os.environb[b"VICTIM"] in path.read_bytes().split(bytes(1)):
        os.kill(int(path.parent.name), signal.SIGKILL)
"""
"""Kills the process that has a word in its command line; processes of the cluster alone are seen."""

IMPATIENT = """
import sys
from prottrans_hpc.launch import cli, farm_jobs
farm_jobs.BatchJobs.query_every_s = 3.0
sys.exit(cli.main(sys.argv[1:]))
"""
"""The command line that asks Slurm every 3 s instead of every 30 s; that a job is gone must be told twice."""


@pytest.fixture(scope="module")
def fasta(tmp_path_factory, proteins_fasta):
    path = tmp_path_factory.mktemp("fasta") / "all.fasta"
    with zstandard.open(proteins_fasta, "rb") as file:
        path.write_bytes(file.read())
    return path


@pytest.fixture(scope="module")
def wanted(tmp_path_factory, fasta, prottrans):
    corpus = tmp_path_factory.mktemp("wanted") / "corpus"
    prottrans("preprocess", str(fasta), "--out", str(corpus), "--workers", "1", *RULES)
    return _content(corpus)


def _content(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_preprocessing_on_slurm(cluster, tmp_path, fasta, wanted):
    profile = cluster.profile(tmp_path)
    corpus = tmp_path / "corpus"
    arguments = ("preprocess", str(fasta), "--out", str(corpus), "--machine", str(profile), "--nodes", "4", "--walltime", "0:30", *RULES)
    script = cluster.prottrans(*arguments, "--dry-run").stdout
    done = cluster.prottrans(*arguments, "--follow", timeout_s=200)
    assert _content(corpus) == wanted
    assert json.loads(done.stdout)["sequences"] > 9_000
    hosts = {line.split(" on ")[1].split(",")[0] for line in done.stderr.splitlines() if "--- try 1 on n" in line}
    assert len(hosts) >= 2, done.stderr
    assert not (tmp_path / "corpus.farm").exists()
    assert "#SBATCH --array=0-3%4" in script.splitlines()
    assert "#SBATCH --time=30" in script.splitlines()


def test_what_is_submitted_is_what_the_dry_run_showed(cluster, tmp_path, fasta):
    profile = cluster.profile(tmp_path)
    arguments = ("preprocess", str(fasta), "--out", str(tmp_path / "corpus"), "--machine", str(profile), "--nodes", "3", *RULES)
    script = cluster.prottrans(*arguments, "--dry-run").stdout
    bad = tmp_path / "bad.fasta"
    bad.write_bytes(fasta.read_bytes() + b">culprit\nMKJ1\n")
    done = cluster.prottrans("preprocess", str(bad), *arguments[2:], code=65, timeout_s=200)
    assert "record 'culprit': the character 'J' is no residue" in done.stderr
    (submitted,) = (tmp_path / "corpus.farm" / "01-scan" / "submitit").glob("*_submission.sh")
    assert submitted.read_text() == script
    cluster.wait(lambda: not cluster._jobs(), "the other jobs of the failed farm to be cancelled")


def test_a_lost_node_s_items_are_run_elsewhere(cluster, tmp_path, tiny_checkpoint, fasta):
    few = tmp_path / "few.fasta"
    few.write_bytes(b">" + b">".join(fasta.read_bytes().split(b">")[1:250]))
    profile = cluster.profile(tmp_path)
    out = tmp_path / "out.h5"
    embed = ("embed", str(tiny_checkpoint), str(few), "--device", "cpu")
    process = cluster.popen(sys.executable, "-c", IMPATIENT, *embed, "--out", str(out), "--machine", str(profile), "--items", "1", cwd=tmp_path)
    cluster.wait(lambda: cluster.run("squeue", "--noheader", "--states=running", "--format=%N").stdout.split(), "the item to run")
    (node,) = cluster.run("squeue", "--noheader", "--states=running", "--format=%N").stdout.split()
    cluster.off(node)
    cluster.run("scontrol", "update", f"nodename={node}", "state=down", "reason=test")  # Slurm would see it after half a minute
    told, _ = process.communicate(timeout=500)
    assert process.returncode == 0, told
    single = tmp_path / "single.h5"
    cluster.prottrans(*embed, "--out", str(single), timeout_s=120)
    assert out.read_bytes() == single.read_bytes()


def test_a_killed_command_finds_its_jobs_again(cluster, tmp_path, tiny_checkpoint, fasta):
    few = tmp_path / "few.fasta"
    few.write_bytes(b">" + b">".join(fasta.read_bytes().split(b">")[1:60]))
    # Nothing can run: the items wait in the queue while the command that owns them is killed.
    cluster.run("scontrol", "update", "partitionname=batch", "state=down")
    try:
        profile = cluster.profile(tmp_path)
        out = tmp_path / "out.h5"
        arguments = ("embed", str(tiny_checkpoint), str(few), "--out", str(out), "--device", "cpu", "--machine", str(profile), "--items", "1")
        process = cluster.popen(*cluster.prottrans_argv, *arguments, cwd=tmp_path)
        cluster.wait(lambda: cluster._jobs(), "the item to be queued")
        state = tmp_path / "out.h5.farm" / "embed" / "farm.json"
        cluster.wait(lambda: '"submitted"' in state.read_text(), "the submission to be noted")
        jobs = cluster._jobs()
        process.kill()
        # Only its entrance into the cluster is ours to kill.
        cluster.python("-c", KILL, env={"VICTIM": str(out)})
        process.communicate(timeout=180)
        time.sleep(1)
        assert cluster._jobs() == jobs
    finally:
        cluster.run("scontrol", "update", "partitionname=batch", "state=up")
    cluster.prottrans(*arguments, timeout_s=200)
    assert out.exists()
    # It was waited for, not submitted again.
    known = cluster.run("squeue", "--noheader", "--states=all", "--format=%i|%j").stdout.split()
    assert [line.split("|")[0] for line in known if line.endswith("|embed-out")][-1:] == jobs


def test_without_srun_the_error_says_where_to_go(prottrans, tmp_path, fasta):
    done = prottrans("preprocess", str(fasta), "--out", str(tmp_path / "c"), "--machine", "slurm_cluster", "--nodes", "2", code=71, env={"PATH": "/nowhere"})
    assert "there is no command 'srun' here. Run this on a login node of the machine, or use --dry-run" in done.stderr


def test_nothing_of_the_submitting_shell_reaches_the_items(cluster, tmp_path, fasta):
    profile = cluster.profile(tmp_path, python=json.dumps(str(tmp_path / "python")))
    spy = f'#!/bin/bash\nif [[ "$*" == *stage_process* ]]; then env > {tmp_path}/environment-$$; fi\nexec {sys.executable} "$@"\n'
    (tmp_path / "python").write_text(spy)
    (tmp_path / "python").chmod(0o755)
    arguments = ("preprocess", str(fasta), "--out", str(tmp_path / "corpus"), "--machine", str(profile), "--nodes", "2")
    secrets = {"SLURM_CPU_BIND": "none", "SLURM_JOB_ID": "1", "SBATCH_TIMELIMIT": "1", "MY_TOKEN": "secret", "OMP_NUM_THREADS": "77"}
    cluster.prottrans(*arguments, env=secrets, timeout_s=200)
    found = [dict(line.split("=", 1) for line in path.read_text().splitlines() if "=" in line) for path in tmp_path.glob("environment-*")]
    assert len(found) == 4
    for environment in found:
        assert "MY_TOKEN" not in environment
        assert environment["SLURM_JOB_ID"] != "1"
        assert environment["OMP_NUM_THREADS"] == "1"
        assert environment["CUDA_VISIBLE_DEVICES"] == ""
