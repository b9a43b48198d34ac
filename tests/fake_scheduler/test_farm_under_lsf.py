"""`prottrans preprocess` as a farm on LSF: arrays through the LSF executor and jsrun, and a warning that an item heeds."""

from __future__ import annotations

import subprocess
import sys

import pytest

RULES = ("--shards", "2", "--validation", "0.05")


@pytest.fixture
def machine(tmp_path, lsf, repository):
    """A profile like Summit's, smaller, and an interpreter that can be told to wait for a signal first."""
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/bash\n"
        f'if [[ "$*" == *stage_process* && "$*" == *00001.0.request.json* && -e {tmp_path}/wait ]]; then\n'
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
    (tmp_path / "wait").touch()
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
    import signal

    (tmp_path / "wait").touch()
    command = ("preprocess", str(fasta), "--out", str(tmp_path / "corpus"), "--machine", str(machine), "--nodes", "2", "--account", "BIO123", *RULES)
    process = subprocess.Popen([*prottrans.argv, *command], env=lsf.environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    lsf.wait_for((tmp_path / "waiting").exists, "the item to wait")
    process.send_signal(signal.SIGINT)
    assert process.wait(180) == 130
    for job in jobs(lsf):
        lsf.wait(job["id"], "EXIT", "DONE")


def test_the_account_is_asked_for(lsf, tmp_path, machine, fasta, prottrans):
    command = ("preprocess", str(fasta), "--out", str(tmp_path / "corpus"), "--machine", str(machine), "--nodes", "2")
    assert "give --account" in run(lsf, prottrans, *command, code=64).stderr
