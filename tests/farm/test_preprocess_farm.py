"""`prottrans preprocess` as a farm of real local jobs: the same bytes as one process, whatever happens to its items."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

RULES = ("--shards", "3", "--dedup", "--validation", "0.05")


def content_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def wanted(tmp_path_factory, megabytes_fasta, prottrans) -> dict[str, bytes]:
    """The corpus that one process makes."""
    corpus = tmp_path_factory.mktemp("wanted") / "corpus"
    prottrans("preprocess", str(megabytes_fasta), "--out", str(corpus), "--workers", "1", *RULES)
    return content_of(corpus)


def test_the_bytes_are_those_of_one_process(tmp_path, megabytes_fasta, prottrans, wanted, machine):
    corpus = tmp_path / "corpus"
    done = prottrans("preprocess", str(megabytes_fasta), "--out", str(corpus), "--machine", machine.profile, "--items", "2", "--json", *RULES)
    assert content_of(corpus) == wanted
    assert json.loads(done.stdout)["sequences"] == json.loads(wanted["index.json"])["sequences"]
    # Two rounds of two: reading, writing shards. What was needed on the way is gone.
    assert machine.take_calls() == ["00000.0", "00000.0", "00001.0", "00001.0"]
    assert [path.name for path in tmp_path.iterdir() if path.name != "machine"] == ["corpus"]


def test_a_killed_item_is_run_again(tmp_path, megabytes_fasta, prottrans, wanted, machine):
    machine.misbehave("00001.0", "kill -9 $$", "exit 71")
    corpus = tmp_path / "corpus"
    done = prottrans("preprocess", str(megabytes_fasta), "--out", str(corpus), "--machine", machine.profile, "--nodes", "2", *RULES)
    assert content_of(corpus) == wanted
    assert "01-scan: job 1 ended with exit code 137 (killed by SIGKILL); it is run again" in done.stderr
    assert "01-scan: job 1 ended with exit code 71" in done.stderr
    assert machine.take_calls() == ["00000.0"] * 2 + ["00001.0"] * 4


def test_an_item_that_goes_on_failing_ends_the_command_with_its_code(tmp_path, megabytes_fasta, prottrans, wanted, machine):
    machine.misbehave("00000.0", *["echo no node today; exit 71"] * 3)
    corpus = tmp_path / "corpus"
    command = ("preprocess", str(megabytes_fasta), "--out", str(corpus), "--machine", machine.profile, "--items", "2", *RULES)
    done = prottrans(*command, code=71)
    assert "01-scan: job 0 ended with exit code 71" in done.stderr.splitlines()[-1]
    assert "no node today" in done.stderr
    log = tmp_path / "corpus.farm" / "01-scan" / "logs" / "00000.log"
    assert f"(see {log})" in done.stderr
    assert log.read_text().count("no node today") == 3
    assert machine.take_calls().count("00000.0") == 3
    # The same command is a new chance.
    prottrans(*command)
    assert content_of(corpus) == wanted
    assert not (tmp_path / "corpus.farm").exists()


def test_bad_input_is_not_tried_again(tmp_path, megabytes_fasta, prottrans, machine):
    fasta = tmp_path / "bad.fasta"
    fasta.write_bytes(megabytes_fasta.read_bytes() + b">the culprit\nMKJ1\n")
    done = prottrans("preprocess", str(fasta), "--out", str(tmp_path / "corpus"), "--machine", machine.profile, "--items", "2", code=65)
    assert "record 'the': the character 'J' is no residue" in done.stderr
    assert "--invalid x" in done.stderr
    assert len(machine.take_calls()) == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_command_leaves_no_process_and_goes_on(tmp_path, megabytes_fasta, prottrans, wanted, machine, number):
    machine.misbehave("00001.0", f"echo $$ > {tmp_path}/pid; sleep 600")
    corpus = tmp_path / "corpus"
    command = ("preprocess", str(megabytes_fasta), "--out", str(corpus), "--machine", machine.profile, "--items", "2", *RULES)
    process = subprocess.Popen([*prottrans.argv, *command], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    item = _wait_for(lambda: int((tmp_path / "pid").read_text() or 0) if (tmp_path / "pid").exists() else 0)
    process.send_signal(number)
    assert process.wait(60) == {signal.SIGINT: 130, signal.SIGTERM: 75, signal.SIGKILL: -9}[number]
    _wait_for(lambda: not Path(f"/proc/{item}").exists())
    prottrans(*command)
    assert content_of(corpus) == wanted


def _wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
    return found


def test_two_commands_do_not_share_a_farm(tmp_path, megabytes_fasta, prottrans, machine):
    machine.misbehave("00000.0", f"touch {tmp_path}/started; sleep 600")
    command = ("preprocess", str(megabytes_fasta), "--out", str(tmp_path / "corpus"), "--machine", machine.profile, "--items", "2")
    first = subprocess.Popen([*prottrans.argv, *command], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        _wait_for((tmp_path / "started").exists)
        assert "another process works with" in prottrans(*command, code=71).stderr
    finally:
        first.send_signal(signal.SIGINT)
        first.wait(60)


def test_a_folder_that_others_can_write_is_refused(tmp_path, megabytes_fasta, prottrans, machine):
    folder = tmp_path / "corpus.farm"
    folder.mkdir()
    os.chmod(folder, 0o777)
    done = prottrans("preprocess", str(megabytes_fasta), "--out", str(tmp_path / "corpus"), "--machine", machine.profile, "--items", "2", code=64)
    assert "can be written by others" in done.stderr


def test_mpi_and_a_farm_exclude_each_other(tmp_path, megabytes_fasta, prottrans):
    done = prottrans("preprocess", str(megabytes_fasta), "--out", str(tmp_path / "corpus"), "--mpi", "--items", "2", code=64)
    assert "--mpi" in done.stderr
