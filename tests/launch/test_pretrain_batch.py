"""`prottrans pretrain` on machines with a batch system: what is refused, dry runs, chains, following."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prottrans_hpc import config, run_dir
from prottrans_hpc.launch import begin, cli, follow, job_events, lr_range
from prottrans_hpc.run_dir import RunDir

Told = Callable[..., tuple[int, str, str]]

# Ids that ascend, and a line for each call; without other programs, so that PATH holds nothing of this computer's.
SBATCH = """#!/bin/bash
echo "sbatch $*" >> {log}
mapfile -t calls < {log}
echo $((41 + ${{#calls[@]}}))
"""


@pytest.fixture
def tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]) -> Told:
    """`tell(*arguments)` runs `prottrans pretrain` with a corpus, where sbatch is a small program, and gives (exit code, output, errors)."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, body in {"sbatch": SBATCH.format(log=tmp_path / "calls"), "squeue": "#!/bin/bash\n"}.items():
        (programs / name).write_text(body)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(programs))
    split = {"sequences": 500, "residues": 50_000, "bytes": 0, "shards": []}
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "index.json").write_text(json.dumps({"format": 1, "splits": {"train": split, "validation": split}}))
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        code = cli.main(["pretrain", "tiny_prot_bert", "--corpus", "corpus", *arguments])
        said = capfdbinary.readouterr()
        return code, said.out.decode(), said.err.decode()

    return run


SUMMIT = ("--machine", "summit", "--account", "ABC123")
CLUSTER = ("--machine", "slurm_cluster", "--run-dir", "run")


def calls(tmp_path: Path) -> list[str]:
    path = tmp_path / "calls"
    return path.read_text().splitlines() if path.exists() else []


def test_the_published_run_is_one_command(tell: Told, tmp_path: Path) -> None:
    code, script, said = tell(*SUMMIT, "--racks", "52", "--chain", "auto", "--total-time", "36:00", "--dry-run")
    assert code == 0
    for line in ("#BSUB -P ABC123", "#BSUB -q batch", "#BSUB -W 24:00", "#BSUB -n 39313"):
        assert f"\n{line}\n" in script
    assert "maxcus=52" in script and "jsrun -n 5616 -r 6 -a 1 -c 7 -g 1" in script
    assert script.startswith("#!/bin/bash\n") and "note" not in script
    assert "job: 52 whole racks, queue batch, walltime 24:00, a chain of 2 jobs" in said
    assert not (tmp_path / "runs").exists() and calls(tmp_path) == []


@pytest.mark.parametrize(
    ("machine", "arguments", "lines"),
    [
        ("frontier", ("--racks", "1", "--account", "A"), ("--nodes=128", "--time=06:00:00", "--partition=batch")),
        ("frontier", ("--nodes", "4", "--account", "A", "--queue", "debug"), ("--partition=batch", "--qos=debug", "--time=02:00:00")),
        ("perlmutter", ("--gpus", "16", "--account", "A", "--walltime", "3:30"), ("--nodes=4", "--qos=regular", "--time=03:30:00")),
        ("nvl72", ("--racks", "2"), ("--nodes=36", "--segment=18")),
        ("nvl72", ("--nodes", "5", "--partial-rack"), ("--nodes=5",)),
        ("slurm_cluster", (), ("--nodes=1", "--time=1-00:00:00")),
    ],
)
def test_dry_runs_of_slurm_machines(machine: str, arguments: tuple[str, ...], lines: tuple[str, ...], tell: Told) -> None:
    code, script, _ = tell("--machine", machine, *arguments, "--dry-run")
    assert code == 0
    for line in lines:
        assert f"\n#SBATCH {line}\n" in script
    assert ("--segment" in script) == ("--segment=18" in lines)
    assert ("--partition" in script) == (machine != "perlmutter")


WRONG = [
    ((*SUMMIT,), "--racks R (1 to 256"),
    ((*SUMMIT, "--nodes", "930"), "51 racks = 918 nodes or 52 racks = 936 nodes"),
    ((*SUMMIT, "--racks", "51", "--walltime", "24:00"), "52 racks = 936 nodes, the smallest size"),
    ((*SUMMIT, "--racks", "54", "--set", "parallel.comm=horovod"), "ends at 954 nodes"),
    ((*SUMMIT, "--racks", "1", "--chain", "0"), "neither 'auto' nor a number of jobs"),
    ((*SUMMIT, "--racks", "1", "--chain", "many"), "neither 'auto' nor a number of jobs"),
    ((*SUMMIT, "--racks", "1", "--chain", "auto", "--total-time", "999:00"), "more than the 100"),
    ((*SUMMIT, "--racks", "1", "--follow", "--detach"), "contradict"),
    ((*SUMMIT, "--racks", "1", "--account", "; rm -rf /"), "the account"),
    (("--machine", "rhea", "--account", "A", "--chain", "auto"), "give --total-time H:MM, or --chain N"),
    (("--account", "A"), "laptop has none"),
    (("--chain", "2"), "--chain and --total-time are for batch systems"),
    (("--chain", "auto"), "laptop has none"),
    (("--total-time", "3:00"), "laptop has none"),
    (("--walltime", "3:00"), "laptop has none"),
    (("--queue", "batch"), "laptop has none"),
    (("--racks", "1"), "has no racks"),
]


@pytest.mark.parametrize(("arguments", "words"), WRONG, ids=[" ".join(case[0]) for case in WRONG])
@pytest.mark.parametrize("dry", [(), ("--dry-run",)], ids=["", "dry"])
def test_what_cannot_work_is_refused_before_anything_is_queued(
    arguments: tuple[str, ...], dry: tuple[str, ...], words: str, tell: Told, tmp_path: Path
) -> None:
    code, out, err = tell(*arguments, *dry)
    assert (code, out) == (64, "") and words in err, err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bin", "corpus"], "a refused command leaves nothing behind"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(("--corpus", "corpus", "--machine", "summit", "--racks", "1"), "--account PROJECT"), ((*SUMMIT, "--racks", "1"), "--corpus names what to train on")],
)
def test_a_dry_run_alone_goes_without_corpus_and_account(arguments: tuple[str, ...], words: str, tell: Told, tmp_path: Path, capfdbinary: Any) -> None:
    assert cli.main(["pretrain", "tiny_prot_bert", *arguments]) == 64
    assert words in capfdbinary.readouterr().err.decode() and calls(tmp_path) == [] and not (tmp_path / "runs").exists()
    assert cli.main(["pretrain", "tiny_prot_bert", *arguments, "--dry-run"]) == 0
    said = capfdbinary.readouterr()
    account = "ABC123" if "--account" in arguments else "ACCOUNT"
    assert f"\n#BSUB -P {account}\n" in said.out.decode()
    notes = said.err.decode()
    assert ("ACCOUNT stands for the --account" in notes) == (account == "ACCOUNT") != ("CORPUS stands for it" in notes)


def test_a_job_is_submitted(tell: Told, tmp_path: Path) -> None:
    code, out, err = tell(*CLUSTER, "--nodes", "2", "--set", "description=two words")
    assert (code, out) == (0, "") and "job 42" in err and "embed" not in err, "it has been submitted, not done"
    (call,) = calls(tmp_path)
    assert call.endswith(str(tmp_path / "run" / "job.sh"))
    (submitted,) = job_events.read_events(RunDir(tmp_path / "run"))
    run = run_dir.read_run(RunDir(tmp_path / "run"))
    assert (run.allocation.num_nodes, run.allocation.queue, run.allocation.walltime_min) == (2, "gpu", 1440)
    typed = "prottrans pretrain tiny_prot_bert --corpus corpus --machine slurm_cluster --run-dir run --nodes 2 --set 'description=two words'"
    assert run.command_line == submitted["command_line"] == typed


def test_a_job_whose_submission_was_interrupted_can_be_cancelled_once_it_begins(
    tell: Told, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary: Any
) -> None:
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.write_text(f"#!/bin/bash\nkill -INT $PPID\n{shutil.which('sleep', path=os.defpath)} 60\n")
    code, _, err = tell(*CLUSTER)
    assert code == 130 and "The job may be in the queue: look for run there" in err
    (tmp_path / "bin" / "squeue").write_text("#!/bin/bash\necho '1001|RUNNING'\n")
    scancel = tmp_path / "bin" / "scancel"
    scancel.write_text(f"#!/bin/bash\necho scancel $* >> {tmp_path / 'calls'}\n")
    scancel.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.defpath}")
    assert begin.begin("slurm", RunDir(tmp_path / "run"), {"SLURM_JOB_ID": "1001", "SLURM_JOB_NODELIST": "n1"}) == begin.GO
    assert cli.main(["runs", "list", "--runs", ".", "--json"]) == 0 and cli.main(["runs", "cancel", "run", "--runs", "."]) == 0
    listed, _, cancelled = capfdbinary.readouterr().out.decode().rpartition("]\n")
    assert json.loads(f"{listed}]")[0]["state"] == "running"
    assert cancelled == "job 1001: asked to save and stop\n" and "1001" in calls(tmp_path)[-1]


def test_a_chain_is_submitted(tell: Told, tmp_path: Path) -> None:
    code, _, err = tell(*CLUSTER, "--nodes", "2", "--walltime", "6:00", "--chain", "auto", "--total-time", "17:00")
    assert code == 0 and "a chain of 3 jobs" in err
    depends = [re.findall(r"--dependency=\w+:(\d+)", call) for call in calls(tmp_path)]
    assert depends == [[], ["42"], ["43"]]
    jobs = run_dir.read_jobs(RunDir(tmp_path / "run"))
    assert jobs and jobs.job_ids == ("42", "43", "44")


def test_what_is_done_needs_no_jobs(tell: Told, tmp_path: Path) -> None:
    """A chain is as long as the work that is left: 100 of 200 steps are saved here."""
    (tmp_path / "run" / "checkpoints" / "step-00000100").mkdir(parents=True)
    _, _, err = tell(*CLUSTER, "--walltime", "6:00", "--chain", "auto", "--total-time", "20:00")
    assert "a chain of 2 jobs" in err


def test_a_training_that_fits_no_job_is_remarked_on(tell: Told) -> None:
    _, _, err = tell(*SUMMIT, "--racks", "52", "--dry-run", "--set", "phases.0.steps=90000000", "--set", "architecture.size=prot_bert_bfd")
    assert "do not fit into one job: --chain auto" in err
    assert "--chain auto" not in tell(*SUMMIT, "--racks", "52", "--dry-run")[2]


@pytest.mark.parametrize(("code", "words"), [(0, "done: embed with"), (75, "stopped before the first checkpoint"), (76, "diverged"), (130, "")])
def test_a_job_is_followed_to_its_end(code: int, words: str, tell: Told, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen = []

    def stand_in(directory: RunDir, job_ids: tuple[str, ...], *, log_from: int | None = None) -> int:
        seen.append((directory.path, tuple(job_ids), log_from))
        return code

    monkeypatch.setattr(follow, "follow", stand_in)
    ended, _, err = tell(*CLUSTER, "--follow")
    assert ended == code and words in err
    assert ("embed" in err) == (code == 0) and seen == [(tmp_path / "run", ("42",), 0)]


@pytest.mark.parametrize(
    ("code", "ended", "found", "words"),
    [
        (0, 0, True, ""),
        (76, 0, True, ""),
        (75, 75, False, "the sweep ended with exit code 75; the same command goes on with it"),
        (130, 130, False, "when the job has ended, the same command prints what it found"),
    ],
)
def test_a_followed_sweep_tells_of_itself_alone(
    code: int, ended: int, found: bool, words: str, tell: Told, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It may diverge, and goes on when only the following was ended."""
    stages = []
    monkeypatch.setattr(follow, "follow", lambda directory, job_ids, *, log_from=None: code)
    monkeypatch.setattr(lr_range, "run_stage", lambda name, request: stages.append((name, request)))
    got, _, err = tell(*CLUSTER, "--lr-range", "--follow")
    assert got == ended and words in err
    assert stages == ([("lr-range", {"run_dir": str(tmp_path / "run")})] if found else [])
    assert ("warning" in err) == (code == 75) and "diverged" not in err and "embed" not in err


def test_without_a_scheduler_only_dry_runs_work(tell: Told, tmp_path: Path) -> None:
    (tmp_path / "bin" / "sbatch").unlink()
    code, _, err = tell(*CLUSTER)
    assert code == 71 and "there is no command 'sbatch' here" in err
    assert tell(*CLUSTER, "--dry-run")[0] == 0


@pytest.mark.parametrize("name", config.shipped_names("hpc"))
def test_every_shipped_machine_can_be_tried_dry(name: str, tell: Told) -> None:
    profile = config.read_toml(config.find_file("hpc", name))
    arguments = [*(["--account", "A"] if profile.get("account_required") else []), *(["--racks", "1"] if "nodes_per_rack" in profile else [])]
    code, script, _ = tell("--machine", name, *arguments, "--dry-run")
    assert code == 0 and script.startswith("#!/bin/bash\n")
