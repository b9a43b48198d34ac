"""--init and --after on the command line: what they may name, what is refused before anything is queued, and what the scheduler is told."""

from __future__ import annotations

import dataclasses
import json
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from prottrans_hpc import architecture, durable, run_dir
from prottrans_hpc.errors import CheckpointError, ConfigError, IdentityError
from prottrans_hpc.launch import ancestor, foreground, gang, planner
from prottrans_hpc.launch.checks import CorpusFacts
from prottrans_hpc.machine import Bin, Queue, read_machine
from prottrans_hpc.recipe import read_recipe
from prottrans_hpc.run_dir import Init, Jobs, RunDir

RECIPE = read_recipe("tiny_prot_bert")
LAPTOP = read_machine("laptop")
SLURM = replace(LAPTOP, scheduler="slurm", starter="srun", queues=(Queue("batch", (Bin(1, 8, 60),)),))


@pytest.fixture
def make_plan(tmp_path, monkeypatch):
    """Plans on one run directory; carrying one out starts nothing."""
    monkeypatch.setattr(foreground, "run", lambda argv, lock: 0)

    def make(init: Init | None = None, *, name: str = "run", steps: int | None = None) -> gang.Plan:
        facts = CorpusFacts(tmp_path / "corpus", "a" * 64, 500, 50_000, 5)
        return gang.Plan(RECIPE, "tiny", facts, LAPTOP, planner.plan(RECIPE, LAPTOP, num_nodes=1), steps, RunDir(tmp_path / name), init=init)

    return make


@pytest.fixture
def source(tmp_path, make_plan, tiny_checkpoint):
    """`source(step)`: a run of 10 steps that has a checkpoint of this one."""

    def make(step: int) -> Path:
        plan = make_plan(name="source", steps=10)
        gang.carry_out(plan, detach=False)
        shutil.copytree(tiny_checkpoint, plan.run_dir.checkpoint(step))
        return plan.run_dir.path

    return make


def find(path, *, recipe=RECIPE, optimizer=False, waits=False, must_exist=True):
    return ancestor.find(path, recipe, optimizer=optimizer, waits=waits, must_exist=must_exist)


def test_a_checkpoint_and_a_finished_run_are_found_with_their_digest(tiny_checkpoint, source):
    digest = durable.sha256_of(tiny_checkpoint / durable.MANIFEST)
    assert find(tiny_checkpoint) == Init(str(tiny_checkpoint), str(tiny_checkpoint), digest)
    run = source(10)
    assert find(run) == Init(str(run), str(RunDir(run).checkpoint(10)), digest)


def test_a_run_that_is_not_done_is_waited_for_or_refused(source):
    run = source(7)
    with pytest.raises(ConfigError, match=r"has step 7 of 10.*--after"):
        find(run)
    assert find(run, waits=True) == Init(str(run))


def test_what_cannot_be_begun_with_is_refused(tiny_checkpoint, tmp_path, source):
    with pytest.raises(CheckpointError, match="neither a checkpoint nor a run directory"):
        find(tmp_path)
    assert find(tmp_path / "elsewhere", must_exist=False) == Init(str(tmp_path / "elsewhere"))
    with pytest.raises(ConfigError, match="weights only"):
        find(tiny_checkpoint, optimizer=True)
    with pytest.raises(ConfigError, match=r"does not fit prot_bert small: shape\.num_layers: 2 -> 6"):
        find(tiny_checkpoint, recipe=read_recipe("small_prot_bert"))
    with pytest.raises(ConfigError, match=r"does not fit prot_t5 tiny: name: 'prot_bert' -> 'prot_t5'"):
        find(tiny_checkpoint, recipe=read_recipe("tiny_prot_t5"))
    with pytest.raises(ConfigError, match="trains prot_bert, this recipe prot_t5"):
        find(source(3), recipe=read_recipe("tiny_prot_t5"), waits=True)
    damaged = shutil.copytree(tiny_checkpoint, tmp_path / "damaged")
    (damaged / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is damaged"):
        find(damaged)


def test_dropout_may_differ(tmp_path):
    """As from ProtT5-XXL-BFD, without, to ProtT5-XXL-U50, with dropout."""
    old, new = (architecture.get("prot_t5").size(name).shape for name in ("prot_t5_xxl_bfd", "prot_t5_xxl_u50"))
    described = {"name": "prot_t5", "shape": dataclasses.asdict(old), "vocabulary": list(architecture.get("prot_t5").vocabulary.tokens)}
    assert old != new
    ancestor._check_fits(tmp_path, described, read_recipe("prot_t5_xxl_u50"))


def test_it_is_in_run_json_and_the_same_command_resumes(tiny_checkpoint, make_plan):
    init = find(tiny_checkpoint)
    plan = make_plan(init)
    assert gang.describe(plan, gang.existing_run(plan)) == f"new, with the weights of {tiny_checkpoint}"
    gang.carry_out(plan, detach=False)
    assert json.loads(plan.run_dir.run_json.read_text())["init"] == vars(init)
    changed = replace(init, checkpoint="/elsewhere", manifest_sha256="b" * 64)  # the ancestor was trained on since
    for again in (init, changed, None):
        gang.carry_out(make_plan(again), detach=False)
        assert run_dir.read_run(plan.run_dir).init == init
    with pytest.raises(IdentityError, match=r"init\.optimizer: False -> True"):
        gang.existing_run(make_plan(replace(init, optimizer=True)))
    gang.carry_out(make_plan(name="other"), detach=False)
    with pytest.raises(IdentityError, match="init"):
        gang.existing_run(make_plan(init, name="other"))


def test_runs_with_other_ancestors_have_other_directories(tmp_path):
    folders = {gang.default_run_dir(RECIPE, "tiny", tmp_path, init) for init in (None, Init("/a"), Init("/b"), Init("/a", optimizer=True))}
    assert len(folders) == 4
    assert gang.default_run_dir(RECIPE, "tiny", tmp_path, Init("/a")) == gang.default_run_dir(RECIPE, "tiny", tmp_path, Init("/a", "/a/step", "abc"))


def test_after_is_a_job_or_the_last_job_of_a_run(source):
    run = source(3)
    assert ancestor.job_before(None, LAPTOP) is None and ancestor.job_before("123", SLURM) == "123"
    run_dir.write_jobs(RunDir(run), Jobs("slurm", ("7", "8"), "host", "now"))
    assert ancestor.job_before(str(run), SLURM) == "8"
    with pytest.raises(ConfigError, match="no job of lsf to wait for"):
        ancestor.job_before(str(run), replace(SLURM, scheduler="lsf", starter="jsrun"))
    with pytest.raises(ConfigError, match="neither the number of a job nor a run"):
        ancestor.job_before("nothing", SLURM)
    with pytest.raises(ConfigError, match="for batch systems; laptop has none"):
        ancestor.job_before("123", LAPTOP)


def test_the_first_job_of_the_chain_waits_for_it(make_plan, tmp_path, monkeypatch):
    asked = []

    def submit(scheduler, directory, *, after=None, keep_open=()):
        asked.append(after)
        return str(50 + len(asked))

    monkeypatch.setattr(gang.submission, "submit", submit)
    plan = replace(make_plan(), machine=SLURM, num_jobs=3, after="8")
    gang._submit_chain(plan, run_dir.prepare(tmp_path / "chain"))
    assert asked == ["8", "51", "52"]


def test_the_command_line_begins_with_a_checkpoint(prottrans, small_corpus, tiny_checkpoint, tmp_path):
    command = ("pretrain", "tiny_prot_bert", "--corpus", str(small_corpus), "--set", "phases.0.global_batch_size=8", "--set", "validation.every_steps=0")
    run = ("--run-dir", str(tmp_path / "run"), "--init", str(tiny_checkpoint))
    said = prottrans(*command, *run, "--steps", "2").stderr
    assert f"(new, with the weights of {tiny_checkpoint})" in said
    assert json.loads((tmp_path / "run" / "init.json").read_text())["checkpoint"] == str(tiny_checkpoint)
    assert "(newest checkpoint: step 2 of 3)" in prottrans(*command, *run, "--steps", "3").stderr
    shown = json.loads(prottrans("runs", "show", str(tmp_path / "run"), "--json").stdout)
    typed = [shlex.join(["prottrans", *command, *run, "--steps", steps]) for steps in "23"]
    assert [start["command_line"] for start in shown["history"]["starts"]] == typed
    assert shown["environment"]["launched_with"] == shown["command_line"] == typed[-1]
    assert "give both" in prottrans(*command, "--init-optimizer", code=64).stderr
