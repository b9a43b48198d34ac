"""The same corpus from real MPI ranks, and no rank that waits for the dead."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from prottrans_hpc import stage
from prottrans_hpc.corpus.index import INDEX

from .conftest import Records, fasta_text, folder_bytes, preprocess_request

pytestmark = [pytest.mark.mpi, pytest.mark.timeout(400)]

_PROGRAM = """
import json, os, sys, time
from prottrans_hpc import errors, stage
from prottrans_hpc.corpus import builder, scan
scan.MIN_RANGE_BYTES = 50_000
if len(sys.argv) > 2:
    real = builder.scan
    def slow(task):
        time.sleep(0.3)
        return scan.scan(task)
    builder.scan = slow
try:
    stage.run_stage("preprocess", json.loads(sys.argv[1]))
except Exception as error:
    print("error:", errors.explain(error), file=sys.stderr)
    sys.exit(errors.exit_code(error))
"""


def mpirun(tmp_path: Path, arguments: dict[str, object], *extra: str, ranks: int = 4) -> subprocess.Popen[str]:
    pytest.importorskip("mpi4py")
    program = tmp_path / "program.py"
    program.write_text(_PROGRAM)
    found = shutil.which("mpirun", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    assert found
    environment = os.environ | {
        "PYTHONPATH": str(Path(stage.__file__).parents[1]),
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    }
    argv = [found, "--map-by", ":OVERSUBSCRIBE", "-np", str(ranks), sys.executable, str(program), json.dumps(arguments), *extra]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True)


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    try:
        stdout, stderr = process.communicate(timeout=240)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, stdout, stderr


@pytest.fixture
def fasta(tmp_path: Path, proteins: Records) -> Path:
    path = tmp_path / "in.fasta"
    path.write_bytes(b"".join(fasta_text([(b"%d-%s" % (k, name), residues) for name, residues in proteins]) for k in range(3)))
    return path


def request(*inputs: Path, out: Path, mpi: bool) -> dict[str, object]:
    return preprocess_request(*inputs, out=out, mpi=mpi, shards=5, validation=0.03, dedup=True)


@pytest.mark.parametrize("ranks", [1, 4])
def test_ranks_give_the_bytes_of_one_process(tmp_path: Path, fasta: Path, proteins_fasta: Path, ranks: int) -> None:
    stage.run_stage("preprocess", request(fasta, proteins_fasta, out=tmp_path / "one", mpi=False))
    code, stdout, stderr = finish(mpirun(tmp_path, request(fasta, proteins_fasta, out=tmp_path / "ranks", mpi=True), ranks=ranks))
    assert code == 0, stderr
    assert folder_bytes(tmp_path / "ranks") == folder_bytes(tmp_path / "one")
    assert json.loads(stdout)["sequences"] == 10_000, "rank 0 alone prints"


def test_an_error_on_any_rank_ends_all_with_its_code(tmp_path: Path, fasta: Path) -> None:
    bad = tmp_path / "bad.fasta"
    bad.write_bytes(fasta.read_bytes() + b">wrong\nMKJ\n")
    code, _, stderr = finish(mpirun(tmp_path, request(bad, out=tmp_path / "out", mpi=True)))
    assert code == 65, stderr
    assert stderr.count("record 'wrong': the character 'J' is no residue") == 1
    assert not (tmp_path / "out").exists()


def test_an_error_before_the_work_ends_all(tmp_path: Path) -> None:
    code, _, stderr = finish(mpirun(tmp_path, request(tmp_path / "nothing.fasta", out=tmp_path / "out", mpi=True)))
    assert code == 66, stderr


def test_a_killed_rank_ends_the_job(tmp_path: Path, fasta: Path) -> None:
    process = mpirun(tmp_path, request(fasta, out=tmp_path / "out", mpi=True), "slow")
    end = time.monotonic() + 120
    while not list(tmp_path.glob("out/.work/pieces/*")) and time.monotonic() < end:
        time.sleep(0.02)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    ranks = [pid for pid in children if "program.py" in Path(f"/proc/{pid}/cmdline").read_text()]
    assert ranks
    os.kill(int(ranks[-1]), signal.SIGKILL)
    code, _, _ = finish(process)
    assert code not in (0, None)
    assert not (tmp_path / "out" / INDEX).exists()
