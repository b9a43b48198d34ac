"""The job script: the same bytes as last time, good shell, and nothing in it that a name or path could smuggle in."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prottrans_hpc import __version__
from prottrans_hpc.errors import ConfigError
from prottrans_hpc.launch import job_script, planner
from prottrans_hpc.launch.demand import Demand
from prottrans_hpc.launch.job import Job
from prottrans_hpc.launch.schedulers import SCHEDULERS
from prottrans_hpc.launch.starters import STARTERS
from prottrans_hpc.machine import read_machine
from prottrans_hpc.recipe import read_recipe
from prottrans_hpc.run_dir import RunDir

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
MACHINES = {
    "frontier": Demand(num_racks=2),
    "laptop": Demand(num_nodes=2),
    "laptop_mpi": Demand(num_nodes=2),
    "nvl72": Demand(num_gpus=144),
    "perlmutter": Demand(num_nodes=16, walltime_min=90, queue="preempt"),
    "rhea": Demand(num_nodes=16),
    "slurm_cluster": Demand(num_nodes=4),
    "summit": Demand(num_racks=52),
}
"""Every machine that ships, and a size of it; summit's is the published one."""


def job(machine: str = "laptop", demand: Demand | None = None, run_dir: str = "/data/runs/tiny_prot_bert-1a2b3c4d", **changes: Any) -> Job:
    profile = read_machine(machine)
    if profile.node.num_cpu_cores == 0:
        profile = replace(profile, node=replace(profile.node, num_cpu_cores=8))  # whatever this computer has
    allocation = planner.plan(read_recipe("tiny_prot_bert"), profile, demand or MACHINES[machine])
    account = "ABC123" if profile.account_required else None
    values = {"name": Path(run_dir).name, "python": "/venv/bin/python", "account": account} | changes
    return Job(stage="pretrain", run_dir=RunDir(Path(run_dir)), machine=profile, allocation=allocation, **values)


def render(job: Job) -> bytes:
    return job_script.render(job, SCHEDULERS[job.machine.scheduler].render_header(job))


@pytest.mark.parametrize("machine", MACHINES)
def test_scripts_are_as_they_were_reviewed(machine: str) -> None:
    """After a change on purpose: `UPDATE_GOLDEN=1 pytest tests/launch/test_job_script.py`, and review the diff."""
    path = GOLDEN / f"{machine}-pretrain.sh"
    script = render(job(machine)).replace(__version__.encode(), b"VERSION")
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_bytes(script)
    assert script == path.read_bytes()


def test_every_shipped_machine_has_a_golden_script() -> None:
    from prottrans_hpc import config

    assert set(config.shipped_names("hpc")) == set(MACHINES)


@pytest.mark.parametrize("starter", [name for name in STARTERS if name not in ("srun", "jsrun")])
def test_scripts_are_good_shell(starter: str, tmp_path: Path) -> None:
    base = job(demand=Demand(num_nodes=1), run_dir=str(tmp_path / "with space" / "run"))
    script = tmp_path / "job.sh"
    script.write_bytes(render(replace(base, machine=replace(base.machine, starter=starter, setup_lines=("module load python",)))))
    subprocess.run(["bash", "-n", str(script)], check=True)
    if shutil.which("shellcheck"):
        done = subprocess.run(["shellcheck", str(script)], stdout=subprocess.PIPE, text=True, check=False)
        assert done.returncode == 0, done.stdout


def test_setup_lines_stand_in_front_of_the_starter() -> None:
    base = job()
    text = render(replace(base, machine=replace(base.machine, setup_lines=("module load cuda/12", "source /sw/venv/bin/activate")))).decode()
    assert text.index("module load cuda/12\nsource /sw/venv/bin/activate") < text.index("local_ranks")


def test_a_dry_run_prints_the_very_bytes_that_a_real_run_writes(tmp_path: Path, prottrans: Callable[..., Any]) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    arguments = ("pretrain", "tiny_prot_bert", "--corpus", str(corpus), "--run-dir", str(tmp_path / "run"))
    dry = prottrans(*arguments, "--dry-run", cwd=tmp_path)  # the corpus may be on another machine
    assert "is not on this machine" in dry.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus"], "a dry run makes nothing"
    split = {"sequences": 500, "residues": 50_000, "bytes": 0, "shards": []}
    import json

    (corpus / "index.json").write_text(json.dumps({"format": 1, "splits": {"train": split, "validation": split}}))
    prottrans(*arguments, code=None, cwd=tmp_path)  # the ranks refuse this corpus; the script is written before
    assert (tmp_path / "run" / "job.sh").read_bytes() == dry.stdout.encode()


HOSTILE = [
    "plain",
    "two words",
    "it's",
    'a "quoted" name',
    "$(touch MARKER)",
    "`touch MARKER`",
    "; touch MARKER ;",
    "&& touch MARKER",
    "| touch MARKER",
    "> MARKER",
    "'; touch MARKER; '",
    '"; touch MARKER; "',
    "$HOME ${PATH} $'x'",
    "-rf",
    "--help",
    "*?[a-z]",
    "~",
    "#comment",
    "back\\slash\\",
    "%j %s",
    "line\nbreak\ntouch MARKER",
    "carriage\rreturn",
    "tab\there",
    "bell\x07 escape\x1b[2J",
    "prot\u00e9ine \u03b1-helix \U0001f9ec",
    "right\u202eto left",
    "line\u2028separator",
    "x" * 200,
    os.fsdecode(b"not-utf8-\xff\xfe"),
]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_paths_round_trip_under_bash_or_are_refused(text: str, tmp_path: Path) -> None:
    assert_round_trip_or_refusal(text, tmp_path)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.characters(blacklist_characters="/\x00", blacklist_categories=["Cs"]), min_size=1, max_size=40))
def test_any_path_round_trips_under_bash_or_is_refused(text: str, tmp_path: Path) -> None:
    assert_round_trip_or_refusal(text, tmp_path)


def assert_round_trip_or_refusal(text: str, tmp_path: Path) -> None:
    """Run the script for real, with a starter that tells its arguments and the environment of the ranks."""
    for name in ("MARKER", "told"):
        (tmp_path / name).unlink(missing_ok=True)
    place = tmp_path / text if text not in (".", "..") else tmp_path
    python = place / "python"
    try:
        hostile = job(run_dir=str(place / "run"), python=str(python))
    except ConfigError:
        return
    place.mkdir(exist_ok=True)
    (place / "run").mkdir(exist_ok=True)
    python.write_text(f"#!{sys.executable}\nimport sys\nopen({str(tmp_path / 'told')!r}, 'w', errors='surrogateescape').write('\\0'.join(sys.argv[1:]))\n")
    python.chmod(0o755)
    (tmp_path / "job.sh").write_bytes(render(hostile))
    done = subprocess.run(["bash", str(tmp_path / "job.sh")], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told = (tmp_path / "told").read_text(errors="surrogateescape").split("\0")
    assert told == STARTERS["processes"].argv(hostile)[1:]
    assert not list(tmp_path.rglob("MARKER"))
    assert (place / "run" / "job.exit-code").read_text() == "0\n"


@pytest.mark.parametrize("name", [text for text in HOSTILE if text != "plain"])
def test_hostile_job_names_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="not a usable name"):
        job(name=name)


@pytest.mark.parametrize("path", ["relative/run", "run", "-rf"])
def test_relative_paths_are_refused(path: str) -> None:
    with pytest.raises(ConfigError, match="absolute"):
        job(run_dir=path, name="run")


def test_a_machine_name_cannot_leave_its_comment() -> None:
    base = job()
    text = render(replace(base, machine=replace(base.machine, name="x\ntouch MARKER #"))).decode()
    assert "\ntouch MARKER" not in text
