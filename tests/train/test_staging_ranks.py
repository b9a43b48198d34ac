"""Ranks of two "nodes" train from their own disks: the same losses, and what fails on one node ends all, by name."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from prottrans_hpc.corpus.node_disk import JOURNAL, read_journal
from prottrans_hpc.machine import Machine, read_machine
from prottrans_hpc.run_dir import RunDir, read_run
from prottrans_hpc.train.checkpoint import find_checkpoint, read_checkpoint

STEPS = 6


def staging_machine(disks: Path, **changes: str) -> Machine:
    """The laptop, with a folder for each "node"."""
    disks.mkdir(exist_ok=True)
    laptop = read_machine("laptop")
    return replace(laptop, staging="node_local", node=replace(laptop.node, local_disk_path=f"{disks}/node-$PROTTRANS_NODE_RANK"), **changes)


def copies(disks: Path) -> list[Path]:
    return sorted(path.parent for path in disks.glob("node-*/prottrans-*/*/index.json"))


@pytest.fixture(scope="module")
def unstaged(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("unstaged") / "run"


@pytest.fixture
def expected(unstaged, make_run, start_ranks, outcome) -> dict[str, object]:
    """What two ranks give without staging."""
    if not unstaged.exists():
        make_run(unstaged, stop_after_step=STEPS)
        start_ranks(unstaged, 2, num_nodes=2).end(0)
    return outcome(unstaged)


def test_the_numbers_are_those_of_a_run_that_reads_the_shared_corpus(tmp_path, small_corpus, make_run, start_ranks, outcome, same, expected):
    disks = tmp_path / "disks"
    folder = make_run(tmp_path / "run", machine=staging_machine(disks), stop_after_step=STEPS)
    gang = start_ranks(folder, 2, num_nodes=2)
    gang.end(0)
    same(outcome(folder), expected)
    assert outcome(folder)["validation"], "the validation shards were read there, too"
    assert [path.parts[-3] for path in copies(disks)] == ["node-0", "node-1"]
    assert read_run(RunDir(folder)).corpus == str(small_corpus)
    for node in (0, 1):
        assert re.search(rf"the corpus is staged in .*/node-{node}/.*: 3 of 3 shards copied", RunDir(folder).node_log(node).read_text())
    assert "on each of 2 nodes" in gang.errors.read_text()


def test_a_resume_reads_what_is_there(tmp_path, make_run, start_ranks, outcome, same, expected):
    disks = tmp_path / "disks"
    folder = make_run(tmp_path / "run", machine=staging_machine(disks), stop_after_step=3)
    start_ranks(folder, 2, num_nodes=2).end(0)
    before = {path: path.stat().st_ino for path in disks.rglob("*.h5")}
    make_run(folder, machine=staging_machine(disks), stop_after_step=STEPS)
    start_ranks(folder, 2, num_nodes=2).end(0)
    assert {path: path.stat().st_ino for path in disks.rglob("*.h5")} == before
    assert "0 of 3 shards copied" in RunDir(folder).node_log(1).read_text()
    same(outcome(folder), expected)


def test_the_shared_shards_are_not_read_in_training(tmp_path, small_corpus, make_run, start_ranks):
    """They are gone before the first step is taken; only the index stays."""
    corpus, disks = tmp_path / "corpus", tmp_path / "disks"
    shutil.copytree(small_corpus, corpus)
    machine = staging_machine(disks)
    start_ranks(make_run(tmp_path / "first", machine=machine, corpus=corpus, stop_after_step=1), 2, num_nodes=2).end(0)
    for shard in corpus.glob("*.h5"):
        shard.unlink()
    start_ranks(make_run(tmp_path / "second", machine=machine, corpus=corpus, stop_after_step=STEPS), 2, num_nodes=2).end(0)


def test_one_reader_a_node_copies_for_all_its_ranks(tmp_path, make_run, start_ranks):
    disks = tmp_path / "disks"
    folder = make_run(tmp_path / "run", machine=staging_machine(disks), num_ranks=4, stop_after_step=2)
    start_ranks(folder, 4, num_nodes=2).end(0)
    assert len(copies(disks)) == 2
    said = [line for node in (0, 1) for line in RunDir(folder).node_log(node).read_text().splitlines() if "shards copied" in line]
    assert [re.search(r" rank (\d) ", line)[1] for line in said] == ["0", "2"]


def test_two_nodes_that_share_a_disk_share_the_copy(tmp_path, make_run, start_ranks):
    machine = staging_machine(tmp_path / "disks")
    machine = replace(machine, node=replace(machine.node, local_disk_path=f"{tmp_path}/disks/node-x"))
    folder = make_run(tmp_path / "run", machine=machine, stop_after_step=2)
    start_ranks(folder, 2, num_nodes=2).end(0)
    assert len(copies(tmp_path / "disks")) == 1


def test_the_copy_goes_when_the_profile_says_so(tmp_path, make_run, start_ranks):
    disks = tmp_path / "disks"
    folder = make_run(tmp_path / "run", machine=staging_machine(disks, staging_cleanup="remove"), stop_after_step=2)
    start_ranks(folder, 2, num_nodes=2).end(0)
    assert list(disks.rglob("*.h5")) == []


def fails(folder: Path, start_ranks: Callable[..., object], code: int, *, num_ranks: int = 2) -> str:
    began = time.monotonic()
    gang = start_ranks(folder, num_ranks, num_nodes=2)
    gang.end(code)
    assert time.monotonic() - began < 120  # the comm time-out of the recipe is 180 s
    return gang.errors.read_text()


def test_a_node_without_the_disk_ends_all_with_its_name(tmp_path, make_run, start_ranks):
    disks = tmp_path / "disks"
    machine = staging_machine(disks)
    machine = replace(machine, node=replace(machine.node, local_disk_path=f"{disks}/node-$PROTTRANS_NODE_RANK/scratch"))
    (disks / "node-0").mkdir()
    said = fails(make_run(tmp_path / "run", machine=machine), start_ranks, 71)
    assert f"the corpus could not be staged on node 1 ({os.uname().nodename}): this node has no {disks}/node-1/scratch" in said


def test_a_full_disk_of_one_node_ends_all_with_its_name_and_the_numbers(tmp_path, make_run, start_ranks):
    disks = tmp_path / "disks"
    full = disks / "node-1"
    full.mkdir(parents=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(full)], capture_output=True).returncode:
        pytest.skip("this user may not mount a small file system")
    try:
        said = fails(make_run(tmp_path / "run", machine=staging_machine(disks)), start_ranks, 73)
    finally:
        subprocess.run(["umount", "-l", str(full)], check=True)
    assert re.search(r"could not be staged on node 1 \(.*\): .*No space left on device: 0\.\d MB of the corpus .* are free \(file system .*/node-1\)", said)


def test_damage_ends_all(tmp_path, small_corpus, make_run, start_ranks):
    corpus = tmp_path / "corpus"
    shutil.copytree(small_corpus, corpus)
    with (corpus / "train-00001.h5").open("r+b") as file:
        file.seek(5000)
        file.write(b"\x00\x01\x02")
    folder = make_run(tmp_path / "run", machine=staging_machine(tmp_path / "disks"), corpus=corpus)
    said = fails(folder, start_ranks, 65, num_ranks=4)
    assert "train-00001.h5 is damaged" in said
    assert RunDir(folder).checkpoint_steps() == []


def test_a_variable_that_is_not_set_is_named(tmp_path, make_run, start_ranks):
    machine = staging_machine(tmp_path)
    machine = replace(machine, node=replace(machine.node, local_disk_path="/tmp/$PROTTRANS_NO_SUCH"))
    assert "the environment variable PROTTRANS_NO_SUCH is not set on this node" in fails(make_run(tmp_path / "run", machine=machine), start_ranks, 64)


@pytest.fixture
def slow_corpus(tmp_path, small_corpus):
    """A corpus of which one shard is a pipe that gives nothing until it is written to."""
    corpus = tmp_path / "slow"
    shutil.copytree(small_corpus, corpus)
    shard = corpus / "train-00001.h5"
    content = shard.read_bytes()
    shard.unlink()
    os.mkfifo(shard)
    return corpus, shard, content


def test_a_file_system_that_hangs_is_named(tmp_path, slow_corpus, make_run, start_ranks):
    folder = make_run(tmp_path / "run", "parallel.timeout_s=8", machine=staging_machine(tmp_path / "disks"), corpus=slow_corpus[0])
    said = fails(folder, start_ranks, 74)
    assert re.search(r"could not be staged on node 0 \(.*\): .*/slow: nothing was read or written for \d+ s; on node 1", said)


def test_a_request_to_stop_is_heard_while_a_copy_runs(tmp_path, slow_corpus, make_run, start_ranks, outcome, same, expected):
    corpus, shard, content = slow_corpus
    disks = tmp_path / "disks"
    machine = staging_machine(disks)
    folder = make_run(tmp_path / "run", machine=machine, corpus=corpus, stop_after_step=STEPS)
    gang = start_ranks(folder, 2, num_nodes=2)
    with shard.open("r+b", buffering=0) as pipe:  # open for reading, too: it waits for nobody
        deadline = time.monotonic() + 120
        while len(list(disks.rglob("validation-00000.h5"))) < 2:
            assert time.monotonic() < deadline, gang.story()
            time.sleep(0.01)
        gang.signal_rank(1, 15)
        time.sleep(3.0)  # a busy rank hears it later
        pipe.write(b"x" * 10_000)
        gang.end(75)
    assert "while the corpus was staged" in gang.errors.read_text()
    shard.unlink()
    shard.write_bytes(content)
    start_ranks(folder, 2, num_nodes=2).end(0)
    same(outcome(folder), expected)


def test_a_killed_copy_is_taken_up(tmp_path, slow_corpus, make_run, start_ranks):
    corpus, shard, content = slow_corpus
    disks = tmp_path / "disks"
    machine = staging_machine(disks)
    folder = make_run(tmp_path / "run", machine=machine, corpus=corpus, stop_after_step=2)
    gang = start_ranks(folder, 2, num_nodes=2)
    with shard.open("r+b", buffering=0):
        deadline = time.monotonic() + 120
        while [len(read_journal(journal.parent)) for journal in disks.rglob(JOURNAL)] != [2, 2]:  # what a start believes of an earlier one
            assert time.monotonic() < deadline, gang.story()
            time.sleep(0.01)
        gang.kill()
    assert copies(disks) == []
    shard.unlink()
    shard.write_bytes(content)
    start_ranks(folder, 2, num_nodes=2).end(0)
    assert "1 of 3 shards copied" in RunDir(folder).node_log(0).read_text()
    assert read_checkpoint(find_checkpoint(folder)).step == 2
