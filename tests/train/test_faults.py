"""What goes wrong while real ranks train: non-finite numbers, a dead rank, a full disk, damage, another experiment."""

from __future__ import annotations

import json
import re
import resource
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from prottrans_hpc.run_dir import RunDir
from prottrans_hpc.train.checkpoint import find_checkpoint, problems, read_checkpoint

POISONED = Path(__file__).with_name("poisoned_rank.py")


def _poison(**poison: object) -> dict[str, str]:
    return {"POISON": json.dumps({"steps": [], "ranks": [1], "how": "loss", "passes": 1} | poison)}


def _metrics(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_one_bad_step_on_one_rank_is_skipped_by_all(tmp_path, make_run, start_ranks, how):
    folder = make_run(tmp_path / "run", num_ranks=2, stop_after_step=8)
    start_ranks(folder, 2, main=POISONED, env=_poison(steps=[6], how=how)).end(0)
    lines = _metrics(folder)
    assert [line["step"] for line in lines if line["skipped"]] == [6]
    assert lines[5]["loss"] is None
    assert all(isinstance(line["loss"], float) for line in lines if line["step"] != 6)
    # Step 6 was to be saved and was not; the next good step was, in its place.
    assert RunDir(folder).checkpoint_steps() == [3, 7, 8]
    log = (folder / "logs" / "node-0000.log").read_text()
    skipped = re.search(r"step 6 is not finite; all ranks skip it. It had the samples ([\d ]+)", log)
    assert skipped is not None
    assert len(skipped[1].split()) == 6
    if how == "loss":
        assert re.search(r"rank 1 .*non-finite loss in step 6, rank 1, in a micro batch of the samples [\d ]+", log)
    assert read_checkpoint(find_checkpoint(folder)).optimizer["num_updates"].item() == 7


def test_a_streak_goes_back_once_and_then_goes_on_as_if_nothing_had_been(tmp_path, make_run, start_ranks, outcome, same, history):
    straight = make_run(tmp_path / "straight", num_ranks=2, stop_after_step=10)
    start_ranks(straight, 2).end(0)
    folder = make_run(tmp_path / "run", num_ranks=2, stop_after_step=10)
    start_ranks(folder, 2, main=POISONED, env=_poison(steps=[5, 6, 7])).end(0)
    same(outcome(folder), outcome(straight))
    (back,) = [event for event in history(folder) if event["event"] == "went back"]
    assert (back["step"], back["to"]) == (7, 3)


@pytest.mark.parametrize(("num_ranks", "settings"), [(1, ()), (2, ("parallel.sharding=full",))])
def test_a_streak_before_the_first_checkpoint_goes_back_to_the_starting_weights(tmp_path, make_run, start_ranks, outcome, same, num_ranks, settings):
    straight = make_run(tmp_path / "straight", *settings, num_ranks=num_ranks, stop_after_step=5)
    start_ranks(straight, num_ranks).end(0)
    folder = make_run(tmp_path / "run", "non_finite_limit=1", *settings, num_ranks=num_ranks, stop_after_step=5)
    start_ranks(folder, num_ranks, main=POISONED, env=_poison(steps=[2], ranks=[0])).end(0)
    found, expected = outcome(folder), outcome(straight)
    assert found["state"].pop("identity") != expected["state"].pop("identity")  # the limit belongs to the recipe
    same(found, expected)


def test_a_streak_that_stays_ends_with_the_last_good_checkpoint(tmp_path, make_run, start_ranks, history):
    folder = make_run(tmp_path / "run", num_ranks=2)
    start_ranks(folder, 2, main=POISONED, env=_poison(steps=list(range(5, 17)), passes=9)).end(76)
    assert RunDir(folder).checkpoint_steps() == [3]
    assert all(tensor.isfinite().all() for tensor in read_checkpoint(find_checkpoint(folder)).model.values())
    events = [event for event in history(folder) if event["event"] != "non-finite numbers"]
    assert [event["event"] for event in events] == ["start", "went back", "stop"]
    assert events[-1]["exit_code"] == 76


def test_ending_in_a_streak_is_not_done(tmp_path, make_run, start_ranks):
    folder = make_run(tmp_path / "run", num_ranks=1, stop_after_step=4)
    start_ranks(folder, 1, main=POISONED, env=_poison(steps=[4], ranks=[0], passes=9)).end(76)
    assert RunDir(folder).checkpoint_steps() == [3]


def test_a_dead_rank_ends_the_others(tmp_path, make_run, start_ranks):
    folder = make_run(tmp_path / "run", "phases.0.steps=100000", num_ranks=3)
    gang = start_ranks(folder, 3)
    assert gang.wait_for_step(2)
    pids = gang.rank_pids()
    gang.signal_rank(1, 9)
    began = time.monotonic()
    assert gang.end(None) == 137
    assert time.monotonic() - began < 120  # the comm time-out of the recipe is 180 s; a closed connection is seen at once
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def test_a_full_disk_is_named_and_the_last_good_checkpoint_stays(tmp_path, make_run, start_ranks, history):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("this user may not mount a small file system")
    try:
        folder = make_run(disk / "run", "phases.0.steps=100000", "checkpoint.every_steps=1", "checkpoint.keep_last=100000", num_ranks=2)
        gang = start_ranks(folder, 2)
        gang.end(73)
        assert f"(file system {disk})" in gang.story()
        assert history(folder)[-1]["exit_code"] == 73 or shutil.disk_usage(disk).free < 4096
        names = sorted(path.name for path in (folder / "checkpoints").iterdir())
        assert names
        assert not [name for name in names if name.startswith(".")]
        assert problems(folder / "checkpoints" / names[-1]) == []
        shutil.rmtree(folder / "checkpoints" / names[0])
        shutil.rmtree(folder / "checkpoints" / names[1])
        make_run(folder, "phases.0.steps=100000", "checkpoint.keep_last=1", num_ranks=2, stop_after_step=int(names[-1][5:]) + 2)
        start_ranks(folder, 2).end(0)  # with space again the same command goes on
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_file_size_limit_fails_a_save_on_the_rank_that_meets_it(tmp_path, make_run, start_ranks):
    """Every rank learns of it: all end with 73, none hangs."""
    folder = make_run(tmp_path / "run", num_ranks=2)
    limited = tmp_path / "limited.py"
    limited.write_text(
        "import os, resource, sys\n"
        "if os.environ['PROTTRANS_RANK'] == '1':\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))\n"
        "os.execv(sys.executable, [sys.executable, '-m', 'prottrans_hpc', 'pretrain', sys.argv[1]])\n"
    )
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    gang = start_ranks(folder, 2, main=limited)
    gang.end(73)
    story = gang.story()
    assert "rank 1 could not write" in story  # says rank 0
    assert "File too large" in story  # says rank 1
    assert list((folder / "checkpoints").iterdir()) == []


def test_damage_to_the_newest_is_said_and_the_run_is_the_same(tmp_path, make_run, start_ranks, outcome, same):
    folder = make_run(tmp_path / "run", num_ranks=2, stop_after_step=9)
    start_ranks(folder, 2).end(0)
    expected = outcome(folder)
    newest = folder / "checkpoints" / "step-00000009"
    (path,) = newest.glob("model-00000-*")
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)
    gang = start_ranks(folder, 2)
    gang.end(0)
    assert re.search(r"skipping a checkpoint: .*step-00000009", gang.errors.read_text())
    same(outcome(folder), expected)
    assert problems(newest) == []


def test_all_damaged_is_66(tmp_path, make_run, start_ranks):
    folder = make_run(tmp_path / "run", num_ranks=1, stop_after_step=3)
    start_ranks(folder, 1).end(0)
    (folder / "checkpoints" / "step-00000003" / "manifest.json").write_text("{}")
    gang = start_ranks(folder, 1)
    gang.end(66)
    assert "none of the 1 checkpoints" in gang.errors.read_text()


def test_another_experiment_is_refused_and_what_differs_is_listed(tmp_path, make_run, start_ranks):
    folder = make_run(tmp_path / "run", num_ranks=1, stop_after_step=3)
    start_ranks(folder, 1).end(0)
    make_run(folder, "optimizer.weight_decay=0.5", "seed=7", num_ranks=1)
    gang = start_ranks(folder, 1)
    gang.end(78)
    story = gang.errors.read_text()
    differing = re.search(r"these differ \(checkpoint -> now\): (.*)\. Put them back", story)
    assert differing is not None
    assert sorted(differing[1].split("; ")) == ["science.optimizer.weight_decay: 0.01 -> 0.5", "science.seed: 42 -> 7"]
    # What is no science may change.
    make_run(folder, "checkpoint.every_steps=2", "loading.prefetch_steps=1", "parallel.bucket_mib=1", num_ranks=1, stop_after_step=5)
    start_ranks(folder, 1).end(0)


def test_a_changed_corpus_is_refused(tmp_path, make_run, start_ranks):
    folder = make_run(tmp_path / "run", num_ranks=1)
    run_json = json.loads((folder / "run.json").read_text())
    run_json["corpus_sha256"] = "0" * 64
    (folder / "run.json").write_text(json.dumps(run_json))
    gang = start_ranks(folder, 1)
    gang.end(78)
    assert "has changed since" in gang.errors.read_text()


def test_no_secret_is_recorded_and_nothing_is_written_per_rank(tmp_path, make_run, start_ranks):
    folder = make_run(tmp_path / "run", num_ranks=2, stop_after_step=2)
    canary = "canary-4711"
    start_ranks(folder, 2, env={"AWS_SECRET_ACCESS_KEY": canary, "WANDB_API_KEY": canary, "LOADEDMODULES": "gcc/12:cuda/12.4"}).end(0)
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert not [path for path in files if canary.encode() in path.read_bytes()]
    assert [path.name for path in (folder / "logs").iterdir()] == ["node-0000.log"]
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["modules"] == ["gcc/12", "cuda/12.4"]
    assert sum(environment["hosts"].values()) == environment["world_size"] == 2
    assert environment["command_line"][-2:] == ["pretrain", str(folder)]
    assert {"python", "torch", "numpy"} <= environment["versions"].keys()
    assert not [path for path in files if path.stat().st_mode & 0o022]


def test_one_start_at_a_time(tmp_path, make_run, start_ranks):
    folder = make_run(tmp_path / "run", "phases.0.steps=100000", num_ranks=1)
    first = start_ranks(folder, 1)
    assert first.wait_for_step(1)
    shorter = tmp_path / "impatient.py"
    shorter.write_text(
        "import sys\nfrom prottrans_hpc import __main__\nfrom prottrans_hpc.train import run_lock, stage\n"
        "stage.only_start = lambda *a: run_lock.only_start(*a, wait_s=0.5)\n"
        "sys.exit(__main__.main(['pretrain', sys.argv[1]]))\n"
    )
    second = start_ranks(folder, 1, main=shorter)
    second.end(71)
    assert f"process {first.rank_pids()[0]} on" in second.errors.read_text()
    first.signal(15)
    first.end(75)


@pytest.mark.parametrize("where", ["train", "open_session"])
def test_memory_that_runs_out_ends_with_71_and_says_what_takes_less(tmp_path, make_run, start_ranks, history, where):
    """An error of torch's own, for more than any address space holds."""
    folder = make_run(tmp_path / "run", num_ranks=1)
    hungry = tmp_path / "hungry.py"
    hungry.write_text(
        "import sys\nimport torch\nfrom prottrans_hpc import __main__\nfrom prottrans_hpc.train import stage\n"
        f"stage.{where} = lambda *a, **k: torch.empty(2**60, dtype=torch.uint8)\n"
        "sys.exit(__main__.main(['pretrain', sys.argv[1]]))\n"
    )
    ranks = start_ranks(folder, 1, main=hungry)
    ranks.end(71)
    said = ranks.errors.read_text()
    assert "rank 0 on" in said
    assert "is out of memory: " in said
    assert "--set loading.bin_residues" in said
    assert "frame #" not in said
    assert "report it" not in said
    if where == "train":
        assert history(folder)[-1]["exit_code"] == 71
