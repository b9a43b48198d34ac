"""A run that begins with another's weights: really with those, once chosen always the same, and resumed bit for bit."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from prottrans_hpc import durable, run_dir
from prottrans_hpc.errors import CheckpointError
from prottrans_hpc.launch import ancestor as launch_side
from prottrans_hpc.run_dir import Init, RunDir
from prottrans_hpc.train import ancestor, checkpoint

STEPS = 4


@pytest.fixture(scope="module")
def finished(tmp_path_factory, make_run):
    """The folder of an ancestor that has no checkpoint yet."""
    return make_run(tmp_path_factory.mktemp("ancestor") / "run", stop_after_step=STEPS, num_ranks=1)


@pytest.fixture
def first(finished, start_ranks):
    """An ancestor that is done: 4 steps."""
    if not RunDir(finished).checkpoint_steps():
        start_ranks(finished, 1).end(0)
    return finished


@pytest.fixture
def make_heir(make_run):
    """`make_heir(folder, init, "section.key=value"...)` writes the run.json of a run that begins with another's weights."""

    def make(folder: Path, init: Init, *settings: str, **changes) -> Path:
        made = make_run(folder, "seed=43", *settings, **changes)
        run_dir.write_run(RunDir(made), replace(run_dir.read_run(RunDir(made)), init=init))
        return made

    return make


def of_run(folder: Path, *, optimizer: bool = False) -> Init:
    """As the command line makes it from a run that is done."""
    return launch_side.find(folder, run_dir.read_run(RunDir(folder)).recipe, optimizer=optimizer, waits=False)


def tensors(folder: Path) -> checkpoint.Checkpoint:
    return checkpoint.read_checkpoint(checkpoint.find_checkpoint(folder))


@pytest.mark.parametrize("optimizer", [False, True])
def test_it_begins_with_those_weights_and_its_own_steps_and_order(first, tmp_path, make_heir, start_ranks, optimizer):
    init = of_run(first, optimizer=optimizer)
    still = make_heir(tmp_path / "heir", init, "optimizer.learning_rate=1e-30", stop_after_step=1, num_ranks=2)
    start_ranks(still, 2).end(0)
    before, after = tensors(first), tensors(still)
    assert all(torch.allclose(after.model[name], tensor, rtol=0, atol=1e-20) for name, tensor in before.model.items())
    assert after.step == 1 and after.optimizer["num_updates"] == (STEPS + 1 if optimizer else 1)
    assert after.state["position"] != before.state["position"] and after.state["identity"]["run_id"] == run_dir.read_run(RunDir(still)).run_id
    noted = json.loads(RunDir(still).init_json.read_text())
    assert noted == {
        "checkpoint": str(checkpoint.find_checkpoint(first).resolve()),
        "manifest_sha256": durable.sha256_of(checkpoint.find_checkpoint(first) / durable.MANIFEST),
        "optimizer": optimizer,
        "run_id": before.state["run_id"],
        "step": STEPS,
    }
    assert after.state["init"] == vars(init)


def test_stopped_and_resumed_it_is_the_straight_run_and_needs_the_ancestor_no_more(first, tmp_path, make_heir, start_ranks, outcome, same):
    copy = shutil.copytree(first, tmp_path / "first")
    straight, stopped = (make_heir(tmp_path / name, of_run(copy), stop_after_step=6, num_ranks=2) for name in ("straight", "stopped"))
    start_ranks(straight, 2).end(0)
    gang = start_ranks(stopped, 2)
    gang.wait_for_step(3)
    gang.kill()
    saved = RunDir(stopped).checkpoint_steps()
    if saved:
        shutil.rmtree(copy)
    start_ranks(stopped, 2).end(0)
    same(outcome(stopped), outcome(straight))


def test_an_ancestor_that_changed_or_is_gone_is_not_begun_with(first, tmp_path, make_heir, start_ranks):
    copy = shutil.copytree(first, tmp_path / "first")
    heir = make_heir(tmp_path / "heir", of_run(copy), num_ranks=2)
    manifest = RunDir(copy).checkpoint(STEPS) / durable.MANIFEST
    manifest.write_bytes(manifest.read_bytes() + b"\n")
    start_ranks(heir, 2).end(66)
    assert "it has changed: its manifest had SHA-256" in (heir / "logs" / "node-0000.log").read_text()
    assert not RunDir(heir).checkpoint_steps() and not RunDir(heir).init_json.exists()


def test_which_checkpoint_is_chosen_once(first, tmp_path):
    directory, copy = RunDir(tmp_path / "heir"), shutil.copytree(first, tmp_path / "first")
    directory.path.mkdir()
    waiting = Init(str(copy))
    chosen = ancestor._choose(directory, waiting)
    assert chosen["checkpoint"] == str(RunDir(copy).checkpoint(STEPS))
    durable.write_json(directory.init_json, {"checkpoint": "/elsewhere", "manifest_sha256": "abc", "step": 1})
    assert ancestor._choose(directory, waiting) == {"checkpoint": "/elsewhere", "manifest_sha256": "abc"}
    directory.init_json.unlink()
    run_dir.write_run(RunDir(copy), replace(run_dir.read_run(RunDir(copy)), stop_after_step=9))
    assert f"has step {STEPS} of 9; finish it" in ancestor._choose(directory, waiting)["error"]
    assert "not a run directory" in ancestor._choose(directory, Init(str(tmp_path / "nothing")))["error"]
    with pytest.raises(CheckpointError, match="it is gone"):
        ancestor._read(tmp_path / "nothing", "abc", optimizer=False)
    assert launch_side.STATE == checkpoint.STATE
