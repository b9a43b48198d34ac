"""An extraction that is killed anywhere and run again gives the bytes of one that was left alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


def sweep(tmp_path: Path, repository: Path, checkpoint: Path, fasta: Path, num_random: int, *also: str) -> dict[str, float]:
    program = Path(__file__).with_name("kill_sweep.py")
    environment = os.environ | {"PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, program, tmp_path, checkpoint, fasta, str(num_random), *also], env=environment, capture_output=True, text=True, timeout=1500
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_killed_before_each_touch_of_the_file_system_and_at_random_moments(tmp_path, repository, tiny_checkpoint, fasta, proteins):
    fasta.write_text("".join(f">{name}\n{residues}\n" for name, residues in proteins[:12]))
    told = sweep(tmp_path, repository, tiny_checkpoint, fasta, 2)
    assert told["kills"] >= 30
    assert told["kills_with_parts"] >= 10


@pytest.mark.slow
def test_killed_at_many_more_moments(tmp_path, repository, tiny_checkpoint, fasta):
    assert sweep(tmp_path, repository, tiny_checkpoint, fasta, 60)["kills"] >= 100


@pytest.mark.slow
def test_killed_while_two_models_read(tmp_path, repository, tiny_checkpoint, fasta, proteins):
    from prottrans_hpc import architecture
    from prottrans_hpc.models.prot_txl import build
    from prottrans_hpc.train import checkpoint

    record = architecture.get("prot_txl")
    module = build(record.size("tiny").shape)
    module.initialise(1)
    checkpoint.write_model_checkpoint(tmp_path / "second", record=record, shape=module.shape, weights=module.state_dict(), origin={})
    fasta.write_text("".join(f">{name}\n{residues}\n" for name, residues in proteins[:12]))
    assert sweep(tmp_path, repository, tiny_checkpoint, fasta, 2, str(tmp_path / "second"))["kills"] >= 30
