"""`prottrans plan` and `prottrans machines` as a person or a script meets them."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prottrans_hpc import config
from prottrans_hpc.launch import cli

Told = Callable[..., tuple[int, str, str]]


@pytest.fixture
def tell(capsys: pytest.CaptureFixture[str]) -> Told:
    """`tell(*arguments)` runs a command line here and gives (exit code, standard output, standard error)."""

    def run(*arguments: str) -> tuple[int, str, str]:
        code = cli.main(arguments)
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def test_the_published_run(tell: Told) -> None:
    code, out, err = tell("plan", "prot_bert_bfd", "--machine", "summit", "--racks", "52", "--total-time", "36:00")
    assert (code, err) == (0, "")
    for line in ("52 racks = 936 nodes", "5,616 ranks", "bin 2 (922-2,764 nodes)", "walltime 24:00", "2 chained jobs", "= 53 racks", "134,784 GPU-hours"):
        assert line in out


def test_the_same_as_json(tell: Told) -> None:
    code, out, _ = tell("plan", "prot_bert_bfd", "--machine", "summit", "--gpus", "5616", "--walltime", "12:00", "--total-time", "36:00", "--json")
    values = json.loads(out)
    assert code == 0
    assert (values["allocation"]["num_racks"], values["allocation"]["walltime_min"], values["num_jobs"]) == (52, 720, 4)


def test_a_corpus_is_looked_at(tell: Told, small_corpus: Path) -> None:
    code, out, _ = tell("plan", "tiny_prot_bert", "--corpus", str(small_corpus), "--json")
    values = json.loads(out)
    assert code == 0 and values["corpus_bytes"] > 100_000
    assert 100 < values["phases"][0]["mean_residues"] < 512 and not values["phases"][0]["mean_is_assumed"]


PLAN = ("plan", "tiny_prot_bert")
WRONG = [
    (("plan",), 64, "RECIPE"),
    (("plan", "prot_bert_bfq"), 64, "did you mean 'prot_bert_bfd'?"),
    ((*PLAN, "--machine", "sumit"), 64, "did you mean 'summit'?"),
    ((*PLAN, "--machine", "summit"), 64, "--racks R (1 to 256"),
    ((*PLAN, "--machine", "summit", "--nodes", "930"), 64, "51 racks = 918 nodes or 52 racks = 936 nodes"),
    ((*PLAN, "--machine", "summit", "--racks", "300"), 64, "1 to 256 racks"),
    ((*PLAN, "--machine", "summit", "--racks", "0"), 64, "--racks"),
    ((*PLAN, "--machine", "summit", "--racks", "1", "--nodes", "18"), 64, "--racks and --nodes"),
    ((*PLAN, "--machine", "summit", "--racks", "1", "--partial-rack"), 64, "contradicts"),
    ((*PLAN, "--machine", "summit", "--gpus", "7", "--partial-rack"), 64, "6 GPUs = 1 node or 12 GPUs = 2 nodes"),
    ((*PLAN, "--machine", "summit", "--racks", "51", "--walltime", "24:00"), 64, "52 racks = 936 nodes, the smallest size"),
    ((*PLAN, "--machine", "summit", "--racks", "51", "--walltime", "24:00:00"), 64, "hours:minutes"),
    ((*PLAN, "--machine", "summit", "--racks", "52", "--queue", "killable"), 64, "--queue batch"),
    ((*PLAN, "--machine", "summit", "--racks", "52", "--queue", "x"), 64, "it has batch, killable"),
    ((*PLAN, "--machine", "summit", "--racks", "54", "--set", "parallel.comm=horovod"), 64, "ends at 954 nodes (53 racks)"),
    ((*PLAN, "--machine", "summit", "--racks", "52", "--set", "precision=bf16"), 64, "only fp32, fp16"),
    (
        ("plan", "prot_bert_bfd", "--machine", "summit", "--racks", "3", "--set", "loading.bin_residues=16384"),
        64,
        "bin_residues=4096 is the",
    ),
    ((*PLAN, "--utilisation", "0"), 64, "--utilisation"),
    ((*PLAN, "--utilisation", "1.5"), 64, "--utilisation"),
    ((*PLAN, "--total-time", "long"), 64, "hours:minutes"),
    ((*PLAN, "--corpus", "nothing"), 66, "nothing is no corpus"),
    ((*PLAN, "--racks", "1"), 64, "has no racks"),
    ((*PLAN, "--gpus", "1"), 64, "has no GPUs"),
    ((*PLAN, "--walltime", "1:00"), 64, "is for batch systems"),
    (("machines", "show", "sumit"), 64, "did you mean 'summit'?"),
    (("machines", "sho"), 64, "show"),
    (("machines", "show", "none.toml"), 64, "is not a file"),
]


def test_micro_batches_that_nobody_chose_are_made_to_fit(tell: Told) -> None:
    ended, out, _ = tell("plan", "prot_bert_bfd", "--machine", "summit", "--racks", "3")
    assert ended == 0
    assert "at most 4,096 residues, not the recipe's 16,384" in " ".join(out.split())


@pytest.mark.parametrize(("arguments", "code", "words"), WRONG, ids=[" ".join(case[0]) for case in WRONG])
def test_a_wrong_command_line_is_answered_with_what_is_possible(arguments: tuple[str, ...], code: int, words: str, tell: Told) -> None:
    ended, out, err = tell(*arguments)
    assert (ended, out) == (code, "")
    assert words in err and err.splitlines()[-1].startswith("error: ") and "Traceback" not in err


def test_a_terminal_gets_a_table() -> None:
    """On a pseudo-terminal, as wide as a person's."""
    primary, secondary = pty.openpty()
    environment = os.environ | {"PYTHONPATH": str(Path(cli.__file__).parents[2]), "COLUMNS": "200", "TERM": "xterm"}
    argv = [sys.executable, "-m", "prottrans_hpc.launch.cli", "plan", "tiny_prot_bert", "--machine", "summit", "--racks", "52"]
    process = subprocess.Popen(argv, env=environment, stdout=secondary, stderr=subprocess.PIPE)
    os.close(secondary)
    said = b""
    try:
        while piece := os.read(primary, 65_536):
            said += piece
    except OSError:  # the other end is closed
        pass
    os.close(primary)
    assert process.wait(60) == 0, process.stderr.read() if process.stderr else ""
    assert process.stderr and process.stderr.read() == b""
    process.stderr.close()
    assert b"\x1b[1m" in said and b"52 racks = 936 nodes" in said and b"size:" not in said


def test_machines_are_listed(tell: Told) -> None:
    code, out, _ = tell("machines")
    assert code == 0 and [line.split()[0] for line in out.splitlines()] == config.shipped_names("hpc")
    assert tell("machines", "list")[1] == out
    listed = json.loads(tell("machines", "--json")[1])
    assert [profile["name"] for profile in listed] == config.shipped_names("hpc")
    assert json.loads(tell("machines", "list", "--json")[1]) == listed
    assert json.loads(tell("machines", "show", "summit", "--json")[1]) in listed


@pytest.mark.parametrize("name", config.shipped_names("hpc"))
def test_every_machine_is_shown(name: str, tell: Told) -> None:
    code, out, err = tell("machines", "show", name)
    assert (code, err) == (0, "")
    profile = json.loads(tell("machines", "show", name, "--json")[1])
    for queue in profile["queues"]:
        assert f"queue:    {queue['name']}" in out
    for text in (*profile["sources"], *profile["header_lines"], *profile["setup_lines"]):
        assert text in out


def test_a_machine_shows_its_limits(tell: Told) -> None:
    out = tell("machines", "show", "summit")[1]
    for text in ("256 racks of 18", "922 to  2,764 nodes: 24:00  (bin 2)", "killable (preemptable after 120 minutes)", "at most 954 nodes", "exists no more"):
        assert text in out
    assert "one resource set a rank" in out and "10 minutes before its walltime" in out and "stays for the next job" in out
    assert "jobs cannot ask for whole racks" in tell("machines", "show", "frontier")[1]
    assert "regular (partition chosen by the site, qos regular)" in tell("machines", "show", "perlmutter")[1]


def test_a_profile_shows_how_ranks_are_called(tell: Told, tmp_path: Path) -> None:
    text = config.find_file("hpc", "slurm_cluster").read_text().replace("# python =", "python =").replace("# launcher_prefix", "launcher_prefix")
    (tmp_path / "mine.toml").write_text(text)
    out = tell("machines", "show", str(tmp_path / "mine.toml"))[1]
    assert "python:   /shared/venv/bin/python\n" in out and "prefix:   apptainer exec --nv /shared/prottrans.sif\n" in out


def test_a_profile_of_ones_own_is_shown_and_planned_with(tell: Told, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(config.find_file("hpc", "slurm_cluster").read_text().replace('name = "slurm_cluster"', 'name = "mine"'))
    assert tell("machines", "show", str(path))[1].startswith("mine: ")
    values: dict[str, Any] = json.loads(tell("plan", "tiny_prot_bert", "--machine", str(path), "--nodes", "2", "--json")[1])
    assert values["allocation"]["num_ranks"] == 16
