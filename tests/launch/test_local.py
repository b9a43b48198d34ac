"""The local scheduler's six functions; recorded output here, the real commands in test_foreground.py."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from prottrans_hpc.errors import SubmitError
from prottrans_hpc.launch import local
from prottrans_hpc.launch.job_state import State
from prottrans_hpc.run_dir import RunDir


def test_the_submitted_command_prints_the_job_id(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path / "a run")
    run_dir.node_log(0).parent.mkdir(parents=True)
    run_dir.job_script.write_text('echo "$$"; echo to the log >&2\n')
    done = subprocess.run(local.submit_argv(run_dir, None), capture_output=True, text=True, check=True, timeout=60)
    job_id = local.parse_job_id(done.stdout)
    while os.path.exists(f"/proc/{job_id}"):
        pass
    assert run_dir.job_log.read_text() == f"{job_id}\nto the log\n"


@pytest.mark.parametrize("output", ["", "bash: fork: retry: Resource temporarily unavailable\n", "12 34\n", "Submitted batch job 7"])
def test_anything_but_a_process_id_is_a_failed_submission(output: str) -> None:
    with pytest.raises(SubmitError, match="not started"):
        local.parse_job_id(output)


def test_states_of_recorded_output() -> None:
    output = (
        "/proc/4242/status:State:\tS (sleeping)\n"
        "/proc/4243/status:State:\tR (running)\n"
        "/proc/4244/status:State:\tZ (zombie)\n"
        "/proc/4245/status:State:\tI (idle)\n"
        "grep: /proc/4246/status: No such file or directory\n"
    )
    assert local.parse_states(output) == {"4242": State.RUNNING, "4243": State.RUNNING, "4245": State.UNKNOWN}


def test_states_of_real_processes() -> None:
    done = subprocess.run(local.state_argv([str(os.getpid()), "4194304"]), stdout=subprocess.PIPE, text=True, check=False)
    assert local.parse_states(done.stdout) == {str(os.getpid()): State.RUNNING}
