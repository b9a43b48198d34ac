"""A tiny model with fixed random weights, real proteins, and the stage called in this process."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

NUM_PROTEINS = 60


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the size `tiny`, as `prottrans import` writes one. Tests must not change it."""
    from prottrans_hpc import architecture
    from prottrans_hpc.models.prot_bert import build
    from prottrans_hpc.train import checkpoint

    record = architecture.get("prot_bert")
    shape = record.size("tiny").shape
    module = build(shape)
    module.initialise(3)
    path = tmp_path_factory.mktemp("model") / "tiny"
    checkpoint.write_model_checkpoint(path, record=record, shape=shape, weights=module.state_dict(), origin={})
    return path


@pytest.fixture(scope="session")
def proteins(repository: Path) -> list[tuple[str, str]]:
    """(name, residues) of real proteins, of many lengths and in no order."""
    text = gzip.decompress((repository / "data" / "mmseqs2_example_QUERY.fasta.gz").read_bytes()).decode()
    records = [record.partition("\n") for record in text.split(">")[1:]]
    return [(header.split()[0], "".join(body.split())) for header, _, body in records][:NUM_PROTEINS]


@pytest.fixture
def fasta(tmp_path: Path, proteins: list[tuple[str, str]]) -> Path:
    """The proteins as a FASTA file that a test may change."""
    path = tmp_path / "proteins.fasta"
    path.write_text("".join(f">{name} a header\n{residues}\n" for name, residues in proteins))
    return path


Embed = Callable[..., Path]


@pytest.fixture
def embed(tmp_path: Path, tiny_checkpoint: Path, fasta: Path) -> Embed:
    """`embed(per_residue=True, ...)` runs the stage in this process and gives the path of the file."""
    from prottrans_hpc.stage import run_stage

    def run(**choices: Any) -> Path:
        request = {
            "source": str(tiny_checkpoint),
            "fasta": [str(fasta)],
            "out": str(tmp_path / "out.h5"),
            "per_residue": False,
            "pool": "mean",
            "precision": "fp32",
            "bin_residues": 16_384,
            "device": "cpu",
            "invalid": "error",
            "json": False,
        } | choices
        run_stage("embed", request)
        return Path(request["out"])

    return run


@pytest.fixture(scope="session")
def one_by_one(tiny_checkpoint: Path) -> Callable[[str], np.ndarray]:
    """The residues' vectors of one protein, from the module alone, with tokens made by hand: [CLS] residues [SEP]."""
    import torch

    from prottrans_hpc.architecture import Batch
    from prottrans_hpc.models.prot_bert import build
    from prottrans_hpc.train import checkpoint

    record, shape, weights = checkpoint.load_model(tiny_checkpoint)
    module = build(shape)
    module.load_state_dict(weights)
    module.eval()
    vocabulary = record.vocabulary

    def vectors(residues: str) -> np.ndarray:
        letters = ["X" if letter in "BOUZ" else letter for letter in residues.upper()]
        ids = [vocabulary.index(token) for token in ("[CLS]", *letters, "[SEP]")]
        none = torch.empty(0, dtype=torch.int64)
        batch = Batch(
            tokens=torch.tensor(ids),
            positions=torch.arange(len(ids)),
            cu_seqlens=torch.tensor([0, len(ids)], dtype=torch.int32),
            target_positions=none,
            targets=none,
            sample_ids=torch.zeros(1, dtype=torch.int64),
            max_length=len(ids),
            num_residues=len(letters),
        )
        with torch.no_grad():
            return module.hidden(batch)[1:-1].numpy()

    return vectors
