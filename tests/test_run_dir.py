"""File names of a run, and run.json in and out."""

from __future__ import annotations

import json
import os
import stat

import pytest

from prottrans_hpc import machine, recipe, run_dir
from prottrans_hpc.errors import CheckpointError, ConfigError, DataError


def a_run(**changes) -> run_dir.Run:
    values = {
        "run_id": run_dir.new_run_id(),
        "created": "2026-01-01T00:00:00Z",
        "version": "0.1.0",
        "recipe": recipe.read_recipe("tiny_prot_bert"),
        "recipe_name": "tiny_prot_bert",
        "corpus": "/data/corpus",
        "corpus_sha256": "0" * 64,
        "machine": machine.read_machine("laptop"),
        "allocation": machine.Allocation(num_nodes=2, ranks_per_node=1, cpu_cores_per_rank=1, gpus_per_rank=0),
        "stop_after_step": None,
    }
    return run_dir.Run(**values | changes)


def test_run_json_goes_out_and_in_unchanged(tmp_path):
    folder = run_dir.prepare(tmp_path / "run")
    for run in (a_run(), a_run(stop_after_step=30), a_run(command_line="prottrans pretrain tiny")):
        run_dir.write_run(folder, run)
        assert run_dir.read_run(folder) == run


@pytest.mark.parametrize(("stop", "last"), [(None, 200), (30, 30), (1000, 200)])
def test_a_run_ends_with_the_recipe_or_before(stop, last):
    assert a_run(stop_after_step=stop).last_step == last


def test_a_run_directory_is_its_owners_alone(tmp_path):
    folder = run_dir.prepare(tmp_path / "run")
    for path in (folder.path, folder.path / "logs", folder.checkpoints):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0
    assert run_dir.prepare(tmp_path / "run") == folder


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o707])
def test_a_directory_that_others_can_write_is_refused(tmp_path, mode):
    path = tmp_path / "run"
    path.mkdir()
    path.chmod(mode)
    with pytest.raises(ConfigError, match="chmod go-w"):
        run_dir.prepare(path)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a directory away")
def test_another_users_directory_is_refused(tmp_path):
    path = tmp_path / "run"
    path.mkdir(mode=0o700)
    os.chown(path, 12345, -1)
    with pytest.raises(ConfigError, match="belongs to another user"):
        run_dir.prepare(path)


def test_names_of_checkpoints_are_read_back_in_order(tmp_path):
    folder = run_dir.prepare(tmp_path / "run")
    assert folder.checkpoint_steps() == []
    for step in (200, 50, 123_456_789):
        folder.checkpoint(step).mkdir()
    for stranger in (".step-00000007.tmp-abc", "step-7", "step-0000000x", "notes"):
        (folder.checkpoints / stranger).mkdir()
    assert folder.checkpoint_steps() == [50, 200, 123_456_789]
    assert folder.checkpoint(50).name == "step-00000050"
    assert folder.node_log(3).name == "node-0003.log"


def test_a_directory_without_run_json_is_no_run(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(CheckpointError, match="is not a run directory"):
            run_dir.read_run(run_dir.RunDir(path))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda values: [values], "is no run"),
        (lambda values: values | {"format": 99}, "has format 99; this version reads 1"),
        (lambda values: {key: value for key, value in values.items() if key != "corpus"}, "lacks the key 'corpus'"),
        (lambda values: values | {"recipe": values["recipe"] | {"sede": 1}}, "unknown key sede"),
        (lambda values: values | {"recipe": 5}, "run.json"),
        (lambda values: values | {"machine": None}, "run.json"),
        (lambda values: values | {"stop_after_step": "soon"}, "stop_after_step is 'soon'"),
    ],
)
def test_a_run_json_that_is_not_one_says_why(tmp_path, change, said):
    folder = run_dir.prepare(tmp_path / "run")
    run_dir.write_run(folder, a_run())
    folder.run_json.write_text(json.dumps(change(json.loads(folder.run_json.read_text()))))
    with pytest.raises(ConfigError) as caught:
        run_dir.read_run(folder)
    assert said in str(caught.value)


def test_a_damaged_run_json_is_bad_data(tmp_path):
    folder = run_dir.prepare(tmp_path / "run")
    folder.run_json.write_text('{"format": 1,')
    with pytest.raises(DataError, match=r"run\.json is damaged"):
        run_dir.read_run(folder)


def test_run_ids_differ():
    assert len({run_dir.new_run_id() for _ in range(100)}) == 100
