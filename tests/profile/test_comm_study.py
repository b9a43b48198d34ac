"""`prottrans comm` by real ranks on this computer, through the command line, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from prottrans_hpc import errors
from prottrans_hpc.launch.cli import main
from prottrans_hpc.launch.comm_job import default_backends
from prottrans_hpc.machine import read_machine

QUICK = ("--max-mib", "1", "--repetitions", "2")


def machine(folder: Path, starter: str = "processes", ranks_per_node: int = 2) -> str:
    path = folder / "pairs.toml"
    path.write_text(
        f'name = "pairs"\ndescription = "two ranks a node"\nscheduler = "local"\nstarter = "{starter}"\nranks_per_node = {ranks_per_node}\nmax_nodes = 4\n'
        "[node]\nnum_cpu_cores = 0\n"
    )
    return str(path)


def check(found: dict, *, backends: set[str], scopes: set[str]) -> None:
    """What holds of every comm.json."""
    assert {fit["backend"] for fit in found["fits"]} == backends
    assert {fit["scope"] for fit in found["fits"]} == scopes
    assert {fit["collective"] for fit in found["fits"]} == {"all_reduce", "reduce_scatter", "all_gather"}
    for sample in found["samples"]:
        assert len(sample["seconds"]) == 2
        assert min(sample["seconds"]) > 0
    sizes = {sample["bytes"] for sample in found["samples"]}
    assert sizes == {1024 * 4**power for power in range(6)}
    for fit in found["fits"]:
        assert fit["latency_s"] >= 0
    for collectives in found["fastest"].values():
        for rows in collectives.values():
            assert [row["bytes"] for row in rows] == sorted(sizes)


# A job on this computer runs in a process of its own: whoever waits for one in the foreground holds signals until it ends.
def test_four_ranks_on_two_nodes(tmp_path: Path, prottrans) -> None:
    out = tmp_path / "study"
    shown = prottrans("comm", "--machine", machine(tmp_path), "--nodes", "2", "--backends", "gloo,mpi,nccl", "--out", str(out), *QUICK, "--json")
    found = json.loads((out / "comm.json").read_text())
    assert json.loads(shown.stdout) == found
    check(found, backends={"gloo"}, scopes={"world", "node", "between"})
    assert (found["machine"], found["nodes"], found["ranks"], found["ranks_per_node"]) == ("pairs", 2, 4, 2)
    assert len(found["hosts"]) == 2
    assert set(found["left_out"]) == {"mpi", "nccl"}
    assert "laptop_mpi" in found["left_out"]["mpi"]
    assert {what: len(seconds) for what, seconds in found["node_seconds"].items() if what != "bytes"} == {"link": 2, "within": 2, "compute": 2}
    report = (out / "comm.txt").read_text()
    assert report.count("\ngloo    ") == 9
    assert "mpi was left out" in report


def test_the_default_is_every_back_end_that_the_machine_can_have() -> None:
    expected = {"laptop": ("gloo",), "laptop_mpi": ("gloo", "mpi", "horovod"), "summit": ("gloo", "mpi", "horovod", "nccl"), "perlmutter": ("gloo", "nccl")}
    assert {name: default_backends(read_machine(name)) for name in expected} == expected


@pytest.mark.horovod
@pytest.mark.mpi
def test_mpi_and_horovod_beside_gloo(tmp_path: Path, prottrans) -> None:
    out = tmp_path / "study"
    where = ("--machine", machine(tmp_path, "mpirun", 1), "--nodes", "2", "--out", str(out))
    prottrans("comm", *where, "--backends", "horovod,mpi,gloo", *QUICK)
    check(json.loads((out / "comm.json").read_text()), backends={"gloo", "mpi", "horovod"}, scopes={"world"})


def test_no_back_end_at_all_is_an_error(tmp_path: Path, prottrans) -> None:
    where = ("--machine", machine(tmp_path), "--nodes", "1", "--out", str(tmp_path / "study"))
    assert "none of the back ends is to be had here" in prottrans("comm", *where, "--backends", "mpi", *QUICK, code=errors.NO_RESOURCES).stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--nodes", "1"), "one rank has nobody to talk to"),
        (("--nodes", "2", "--backends", "gloo,smoke"), "no back end is called 'smoke'"),
        (("--nodes", "2", "--gate", "1"), "--gate"),
        (("--nodes", "2", "--out", "."), "holds no communication study"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_what_cannot_be_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options, message) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "precious").touch()
    assert main(["comm", "--machine", machine(tmp_path, ranks_per_node=1), "--out", "study", *options]) == errors.USAGE
    assert message in capsys.readouterr().err
    assert not (tmp_path / "study").exists()


def test_a_dry_run_prints_the_script_and_writes_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    where = ("--machine", "slurm_cluster", "--nodes", "4", "--walltime", "1:00", "--out", str(tmp_path / "preflight"))
    assert main(["comm", *where, "--gate", "3", "--dry-run"]) == errors.DONE
    script = capfd.readouterr().out
    assert script.startswith("#!/bin/bash\n#SBATCH --job-name=preflight\n")
    assert "#SBATCH --nodes=4\n" in script
    assert " -m prottrans_hpc comm " in script
    assert not (tmp_path / "preflight").exists()
