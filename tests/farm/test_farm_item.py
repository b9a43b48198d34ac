"""A job of a farm on its node: it works only as long as the farm's file of the job names its own submission."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from prottrans_hpc.launch import farm_item
from prottrans_hpc.launch.farm_files import FarmFiles

QUICK = """
import sys
from prottrans_hpc.launch import farm_item
farm_item._FENCE_EVERY_S, farm_item._STALE_S, farm_item._GRACE_S = 0.2, 2.0, 2.0
sys.exit(farm_item.main(sys.argv[1:]))
"""


@pytest.fixture
def files(tmp_path: Path) -> FarmFiles:
    files = FarmFiles(tmp_path / "farm")
    files.prepare()
    return files


def write_job(files: FarmFiles, token: str, command: str) -> None:
    job = {"driver": None, "token": token, "commands": [{"argv": ["bash", "-c", command], "environment": {}}]}
    new = files.job(3).with_suffix(".new")
    new.write_text(json.dumps(job))
    new.rename(files.job(3))


def start(files: FarmFiles, token: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-P", "-c", QUICK, str(files.folder), "3", "1", token], stderr=subprocess.PIPE, text=True)


def wait_for(path: Path) -> None:
    end = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < end, f"waited in vain for {path}"
        time.sleep(0.02)


def test_it_leaves_an_outcome_of_its_own(files):
    write_job(files, "aa", "exit 3")
    assert start(files, "aa").wait(120) == 3
    assert files.outcomes() == {(3, 1, "aa")}
    assert files.code(3, 1, "aa") == 3


@pytest.mark.parametrize("other", ["bb", None])
def test_one_that_is_not_wanted_any_more_does_nothing(files, tmp_path, other):
    if other is not None:
        write_job(files, other, f"touch {tmp_path}/begun")
    process = start(files, "aa")
    assert process.wait(120) == 75
    assert process.stderr is not None
    assert "is not for this submission" in process.stderr.read()
    assert not (tmp_path / "begun").exists()
    assert files.outcomes() == set()


def test_a_node_that_sees_an_old_file_at_first_looks_again(files, tmp_path):
    write_job(files, "old", "exit 9")
    process = start(files, "aa")
    time.sleep(0.5)
    write_job(files, "aa", "exit 0")
    assert process.wait(120) == 0
    assert files.outcomes() == {(3, 1, "aa")}


@pytest.mark.parametrize("stubborn", [False, True])
def test_one_whose_place_is_taken_ends_what_it_runs_and_says_nothing(files, tmp_path, stubborn):
    on_term = "''" if stubborn else f"'touch {tmp_path}/saved; exit 75'"
    write_job(files, "aa", f"trap {on_term} TERM; touch {tmp_path}/begun; while :; do sleep 0.1; done")
    process = start(files, "aa")
    wait_for(tmp_path / "begun")
    write_job(files, "bb", "exit 0")
    assert process.wait(120) == 75
    assert (tmp_path / "saved").exists() != stubborn
    assert files.outcomes() == set()


def test_a_moment_of_disorder_is_not_taken_for_the_end(files, monkeypatch):
    monkeypatch.setattr(farm_item, "_FENCE_EVERY_S", 0.0)
    write_job(files, "aa", "exit 0")
    fence = farm_item.Fence(files.job(3), "aa")
    for is_there in (True, False, True, False):
        write_job(files, "aa", "exit 0") if is_there else files.job(3).unlink()
        fence.look()
        assert not fence.is_lost
    fence.look()
    assert fence.is_lost


def test_one_that_is_queued_again_under_its_id_starts_anew(files, tmp_path):
    write_job(files, "aa", f"if [ -e {tmp_path}/again ]; then exit 0; fi; trap 'exit 75' TERM; touch {tmp_path}/begun; while :; do sleep 0.1; done")
    process = start(files, "aa")
    wait_for(tmp_path / "begun")
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 75
    assert files.code(3, 1, "aa") == 75
    (tmp_path / "again").touch()
    assert start(files, "aa").wait(120) == 0
    assert files.code(3, 1, "aa") == 0
