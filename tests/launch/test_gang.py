"""The run directory of a gang: new, resumed, refused."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from prottrans_hpc import run_dir
from prottrans_hpc.errors import ConfigError, IdentityError
from prottrans_hpc.launch import foreground, gang, planner
from prottrans_hpc.launch.checks import CorpusFacts
from prottrans_hpc.launch.gang import Plan
from prottrans_hpc.machine import read_machine
from prottrans_hpc.recipe import read_recipe
from prottrans_hpc.run_dir import RunDir

MakePlan = Callable[..., Plan]


@pytest.fixture
def make_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakePlan:
    """Plans on one run directory; carrying one out starts nothing but takes the lock."""

    def plan(*settings: str, nodes: int = 1, steps: int | None = None, corpus_sha256: str = "a" * 64) -> Plan:
        recipe, machine = read_recipe("tiny_prot_bert", settings), read_machine("laptop")
        facts = CorpusFacts(tmp_path / "corpus", corpus_sha256, 500, 50_000, 5)
        return Plan(recipe, "tiny_prot_bert", facts, machine, planner.plan(recipe, machine, num_nodes=nodes), steps, RunDir(tmp_path / "run"))

    monkeypatch.setattr(foreground, "run", lambda argv, lock: 0)
    return plan


def test_a_new_run(make_plan: MakePlan) -> None:
    plan = make_plan(nodes=2, steps=10)
    assert gang.existing_run(plan) is None
    assert gang.carry_out(plan, detach=False) == 0
    run = run_dir.read_run(plan.run_dir)
    assert (run.recipe, run.allocation.num_nodes, run.stop_after_step, run.last_step) == (plan.recipe, 2, 10, 10)
    assert (run.corpus, run.corpus_sha256) == (str(plan.corpus.path), "a" * 64)
    assert plan.run_dir.job_script.read_bytes() == plan.script
    assert stat.S_IMODE(plan.run_dir.path.stat().st_mode) & 0o077 == 0


def test_the_same_experiment_resumes_and_keeps_its_identity(make_plan: MakePlan, capsys: pytest.CaptureFixture[str]) -> None:
    gang.carry_out(make_plan(steps=10), detach=False)
    first = run_dir.read_run(make_plan().run_dir)
    changed = make_plan("loading.bin_residues=4096", "checkpoint.every_steps=7", "validation.every_steps=0", "description=other", nodes=2, steps=20)
    assert gang.existing_run(changed) == first
    gang.carry_out(changed, detach=False)
    second = run_dir.read_run(changed.run_dir)
    assert (second.run_id, second.created) == (first.run_id, first.created)
    assert (second.stop_after_step, second.recipe.loading.bin_residues, second.allocation.num_nodes) == (20, 4096, 2)
    said = capsys.readouterr().err
    assert "loading.bin_residues: 8192 -> 4096" in said and "stop_after_step: 10 -> 20" in said


def test_the_command_of_the_latest_start_is_kept_and_is_no_change_of_the_run(make_plan: MakePlan, capsys: pytest.CaptureFixture[str]) -> None:
    for command_line in ("prottrans pretrain tiny_prot_bert", "prottrans runs resume run"):
        gang.carry_out(replace(make_plan(), command_line=command_line), detach=False)
        assert run_dir.read_run(make_plan().run_dir).command_line == command_line
    assert "changed" not in capsys.readouterr().err


def test_nothing_changed_rewrites_nothing(make_plan: MakePlan) -> None:
    gang.carry_out(make_plan(), detach=False)
    before = make_plan().run_dir.run_json.stat()
    gang.carry_out(make_plan(), detach=False)
    assert make_plan().run_dir.run_json.stat().st_ino == before.st_ino


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("seed=7", "seed: 42 -> 7"),
        ("optimizer.weight_decay=0.5", "optimizer.weight_decay: 0.01 -> 0.5"),
        ("phases.0.global_batch_size=32", "phases.0.global_batch_size: 64 -> 32"),
        ("architecture.size=small", "architecture.size: 'tiny' -> 'small'"),
        ("objective.fraction=0.2", "objective.fraction: 0.15 -> 0.2"),
        ("precision=bf16", "precision: 'fp32' -> 'bf16'"),
        ("order.block_sequences=8", "order.block_sequences: 64 -> 8"),
    ],
)
def test_another_experiment_is_refused_with_what_differs(make_plan: MakePlan, setting: str, named: str) -> None:
    gang.carry_out(make_plan(), detach=False)
    before = make_plan().run_dir.run_json.read_bytes()
    with pytest.raises(IdentityError) as refusal:
        gang.existing_run(make_plan(setting))
    assert named in str(refusal.value) and "--run-dir" in str(refusal.value)
    with pytest.raises(IdentityError):
        gang.carry_out(make_plan(setting), detach=False)
    assert make_plan().run_dir.run_json.read_bytes() == before


def test_another_corpus_is_refused(make_plan: MakePlan) -> None:
    gang.carry_out(make_plan(), detach=False)
    with pytest.raises(IdentityError, match=r"corpus_sha256: 'aaa.* -> 'bbb"):
        gang.existing_run(make_plan(corpus_sha256="b" * 64))


def test_a_folder_with_other_things_is_refused(make_plan: MakePlan) -> None:
    folder = make_plan().run_dir.path
    folder.mkdir()
    (folder / "thesis.tex").touch()
    with pytest.raises(ConfigError, match=r"thesis\.tex"):
        gang.existing_run(make_plan())
    with pytest.raises(ConfigError, match="not empty"):
        gang.carry_out(make_plan(), detach=False)


def test_a_start_that_died_before_run_json_is_no_obstacle(make_plan: MakePlan) -> None:
    run_dir.prepare(make_plan().run_dir.path)
    make_plan().run_dir.lock.touch()
    assert gang.existing_run(make_plan()) is None


def test_a_directory_that_others_can_write_is_refused(make_plan: MakePlan) -> None:
    folder = make_plan().run_dir.path
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(ConfigError, match="can be written by others"):
        gang.carry_out(make_plan(), detach=False)


def test_the_default_run_directory_is_that_of_the_experiment(tmp_path: Path) -> None:
    def default(*settings: str, corpus: Path = tmp_path) -> Path:
        return gang.default_run_dir(read_recipe("tiny_prot_bert", settings), "tiny_prot_bert", corpus)

    assert default() == default() == default("checkpoint.every_steps=3", "loading.prefetch_steps=4")
    assert len({default(), default("seed=1"), default("phases.0.steps=50"), default(corpus=tmp_path / "other")}) == 4
    assert default().parent == Path("runs") and default().name.startswith("tiny_prot_bert-")


@pytest.mark.parametrize(
    ("value", "name"),
    [("tiny_prot_bert", "tiny_prot_bert"), ("/a b/my recipe.toml", "my_recipe"), ("..toml", "recipe"), ("$(x).toml", "__x_"), ("-rf.toml", "rf")],
)
def test_the_name_of_a_recipe_is_safe(value: str, name: str) -> None:
    assert gang.usable_name(value) == name


def test_a_damaged_run_json_is_named(make_plan: MakePlan, prottrans: Any) -> None:
    plan = make_plan()
    gang.carry_out(plan, detach=False)
    plan.run_dir.run_json.write_text(plan.run_dir.run_json.read_text()[:100])
    split = {"sequences": 500, "residues": 50_000, "bytes": 0, "shards": []}
    plan.corpus.path.mkdir()
    (plan.corpus.path / "index.json").write_text(json.dumps({"format": 1, "splits": {"train": split, "validation": split}}))
    done = prottrans("pretrain", "tiny_prot_bert", "--corpus", str(plan.corpus.path), "--run-dir", str(plan.run_dir.path), code=65)
    assert "run.json is damaged" in done.stderr
