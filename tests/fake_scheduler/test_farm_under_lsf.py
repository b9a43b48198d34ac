"""`prottrans preprocess` as a farm on LSF: arrays through the LSF executor and jsrun, and a warning that an item heeds."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

RULES = ("--shards", "2", "--validation", "0.05")


@pytest.fixture
def machine(tmp_path, lsf, repository):
    """A profile like Summit's, smaller, and an interpreter that can be told to wait for a signal first."""
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/bash\n"
        f'if [[ "$*" == *stage_process* && -e {tmp_path}/wait && "$*" == *"$(cat {tmp_path}/wait)".0.request.json* ]]; then\n'
        f"  rm {tmp_path}/wait; trap 'touch {tmp_path}/heard; exit 75' TERM; touch {tmp_path}/waiting; sleep 600 & wait\n"
        "fi\n"
        f'exec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    profile = tmp_path / "little_summit.toml"
    profile.write_text(
        'name = "little_summit"\ndescription = "LSF"\nscheduler = "lsf"\nstarter = "jsrun"\nranks_per_node = 1\nmax_nodes = 4\naccount_required = true\n'
        f'warning_min = 80\npython = "{python}"\nsetup_lines = ["export PYTHONPATH={repository}"]\n[node]\nnum_cpu_cores = 2\n'
        '[[queues]]\nname = "batch"\n[[queues.bins]]\nmin_nodes = 1\nmax_nodes = 45\nmax_walltime_min = 120\n'
    )
    # Minutes are real ones: only a test that puts the clock forward brings a warning.
    lsf.configure(minute_s=60.0, terminate_interval_s=0.5, cores=2, gpus=0)
    lsf.start()
    return profile


@pytest.fixture
def fasta(tmp_path, proteins_fasta):
    import zstandard

    path = tmp_path / "all.fasta"
    with zstandard.open(proteins_fasta, "rb") as file:
        path.write_bytes(file.read())
    return path


def run(lsf, prottrans, *arguments, code=0):
    done = subprocess.run([*prottrans.argv, *arguments], env=lsf.environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == code, done.stderr
    return done


def test_the_bytes_are_those_of_one_process_though_an_item_was_warned_and_queued_again(lsf, tmp_path, machine, fasta, prottrans):
    prottrans("preprocess", str(fasta), "--out", str(tmp_path / "wanted"), "--workers", "1", *RULES)
    (tmp_path / "wait").write_text("00001")
    command = ("preprocess", str(fasta), "--out", str(tmp_path / "corpus"), "--machine", str(machine), "--nodes", "2", "--account", "BIO123", *RULES)
    script = run(lsf, prottrans, *command, "--dry-run").stdout
    assert '#BSUB -J "preprocess-corpus[1-2]%2"' in script
    assert "exec jsrun -n 1 -r 1 -a 1 -c 2 -g 0 " in script
    process = subprocess.Popen([*prottrans.argv, *command], env=lsf.environment, stderr=subprocess.PIPE, text=True)
    lsf.wait_for((tmp_path / "waiting").exists, "the item to wait")
    lsf.wait_for(lambda: [job["stat"] for job in jobs(lsf)].count("DONE") == 1, "the other item")
    lsf.put_clock_forward(41)  # of 120 minutes, with a warning 80 minutes before the end
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    files = {folder: {path.name: path.read_bytes() for path in (tmp_path / folder).iterdir()} for folder in ("wanted", "corpus")}
    assert files["corpus"] == files["wanted"]
    assert (tmp_path / "heard").exists()
    assert sorted(job["starts"] for job in jobs(lsf)) == [1, 1, 1, 2]


def jobs(lsf):
    """All that were submitted."""
    return [lsf.job(path.parent.name) for path in (lsf.folder / "jobs").glob("*/job.json")]


def test_an_interrupted_farm_takes_its_jobs_out_of_the_queue(lsf, tmp_path, machine, fasta, prottrans):
    (tmp_path / "wait").write_text("00001")
    command = ("preprocess", str(fasta), "--out", str(tmp_path / "corpus"), "--machine", str(machine), "--nodes", "2", "--account", "BIO123", *RULES)
    process = subprocess.Popen([*prottrans.argv, *command], env=lsf.environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    lsf.wait_for((tmp_path / "waiting").exists, "the item to wait")
    process.send_signal(signal.SIGINT)
    assert process.wait(180) == 130
    for job in jobs(lsf):
        lsf.wait(job["id"], "EXIT", "DONE")


# A file system that takes its time to note what the scheduler has answered: the command is stopped before that.
FORGETFUL = """
import pathlib, sys, time
from prottrans_hpc.launch import cli, farm_round
write = farm_round.write_state
def slow(files, name, scheduler, jobs):
    if any(job.state == "submitted" for job in jobs):
        pathlib.Path(sys.argv[1]).touch()
        time.sleep(600)
    write(files, name, scheduler, jobs)
farm_round.write_state = slow
sys.exit(cli.main(sys.argv[2:]))
"""


def test_jobs_that_a_killed_command_never_knew_of_end_by_themselves(lsf, tmp_path, machine, fasta, tiny_checkpoint):
    few = tmp_path / "few.fasta"
    few.write_bytes(b">" + b">".join(fasta.read_bytes().split(b">")[1:60]))
    (tmp_path / "wait").write_text("00000")
    out = ("--out", str(tmp_path / "out.h5"), "--device", "cpu")
    command = ("embed", str(tiny_checkpoint), str(few), *out, "--machine", str(machine), "--items", "1", "--account", "BIO123")
    process = subprocess.Popen([sys.executable, "-P", "-c", FORGETFUL, str(tmp_path / "mark"), *command], env=lsf.environment, stderr=subprocess.DEVNULL)
    lsf.wait_for(lambda: (tmp_path / "mark").exists() and (tmp_path / "waiting").exists(), "the job that nobody knows of")
    process.kill()
    process.wait(60)
    second = subprocess.Popen([sys.executable, "-P", "-c", COMMAND, *command], env=lsf.environment, stderr=subprocess.PIPE, text=True)
    lsf.wait_for((tmp_path / "heard").exists, "the forgotten item to be told to stop", timeout_s=60)
    _, said = second.communicate(timeout=300)
    assert second.returncode == 0, said
    for job in jobs(lsf):
        lsf.wait(job["id"], "EXIT", "DONE")


COMMAND = "import sys; from prottrans_hpc.launch import cli; sys.exit(cli.main(sys.argv[1:]))"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_command_that_is_stopped_while_bsub_answers_says_what_may_be_left(lsf, tmp_path, machine, fasta, prottrans, number):
    bsub = next(path for path in map(Path, lsf.environment["PATH"].split(os.pathsep)) if (path / "bsub").exists()) / "bsub"
    quick = bsub.read_text()
    bsub.write_text(quick.replace("exec ", "") + f"touch {tmp_path}/submitted; sleep 600\n")
    prottrans("preprocess", str(fasta), "--out", str(tmp_path / "wanted"), "--workers", "1", *RULES)
    command = ("preprocess", str(fasta), "--out", str(tmp_path / "corpus"), "--machine", str(machine), "--nodes", "2", "--account", "BIO123", *RULES)
    process = subprocess.Popen([*prottrans.argv, *command], env=lsf.environment, stderr=subprocess.PIPE, text=True)
    lsf.wait_for((tmp_path / "submitted").exists, "the submission")
    process.send_signal(number)
    _, said = process.communicate(timeout=180)
    assert ("any that are in the queue under the name preprocess-corpus end by themselves" in said) == (number == signal.SIGINT)
    bsub.write_text(quick)
    run(lsf, prottrans, *command)
    files = {folder: {path.name: path.read_bytes() for path in (tmp_path / folder).iterdir()} for folder in ("wanted", "corpus")}
    assert files["corpus"] == files["wanted"]


IMPATIENT = COMMAND.replace("import cli;", "import cli, farm_jobs; farm_jobs.BatchJobs.query_every_s = 2.0;")


def test_more_jobs_than_may_be_queued_go_one_array_after_the_other(lsf, tmp_path, machine, fasta, prottrans):
    lsf.configure(max_queued=3)
    machine.write_text(machine.read_text().replace("account_required", "max_queued_jobs = 3\naccount_required"))
    prottrans("preprocess", str(fasta), "--out", str(tmp_path / "wanted"), "--workers", "1", *RULES)
    command = ("preprocess", str(fasta), "--out", str(tmp_path / "corpus"), "--machine", str(machine), "--nodes", "2", "--account", "BIO123")
    shown = run(lsf, prottrans, *command, "--items", "5", *RULES, "--dry-run")
    assert '#BSUB -J "preprocess-corpus[1-3]%2"' in shown.stdout
    assert "the first 3 jobs; the other 2 follow in arrays of this size, one after the other" in shown.stderr
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", IMPATIENT, *command, "--items", "5", *RULES], env=lsf.environment, stderr=subprocess.PIPE, text=True
    )
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    files = {folder: {path.name: path.read_bytes() for path in (tmp_path / folder).iterdir()} for folder in ("wanted", "corpus")}
    assert files["corpus"] == files["wanted"]
    sizes = [sum(job["number"] == number for job in jobs(lsf)) for number in sorted({job["number"] for job in jobs(lsf)})]
    assert sizes[0] == max(sizes) == 3
    assert len(sizes) > 2


def test_the_account_is_asked_for(lsf, tmp_path, machine, fasta, prottrans):
    command = ("preprocess", str(fasta), "--out", str(tmp_path / "corpus"), "--machine", str(machine), "--nodes", "2")
    assert "give --account" in run(lsf, prottrans, *command, code=64).stderr
