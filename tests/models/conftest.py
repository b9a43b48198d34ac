"""Packed batches of real proteins, and a tiny ProtBert with weights that are far from zero."""

from __future__ import annotations

import dataclasses
import gzip
from collections.abc import Callable

import numpy as np
import pytest
import torch

from prottrans_hpc import architecture
from prottrans_hpc.architecture import Batch
from prottrans_hpc.models.prot_bert import ProtBert, build

RECORD = architecture.get("prot_bert")


@pytest.fixture(scope="session")
def proteins(small_fasta) -> list[str]:
    """600 real proteins of 50 to 512 residues."""
    return ["".join(record.splitlines()[1:]) for record in small_fasta.read_text().split(">")[1:]]


@pytest.fixture(scope="session")
def tokens_of() -> Callable[[str], torch.Tensor]:
    """A protein as token ids, special tokens included."""
    table = np.frombuffer(RECORD.vocabulary.residue_table(), np.uint8)

    def encode(protein: str) -> torch.Tensor:
        return torch.tensor([2, *table[np.frombuffer(protein.encode(), np.uint8)].tolist(), 3])

    return encode


@pytest.fixture(scope="session")
def pack(tokens_of) -> Callable[..., Batch]:
    """`pack(proteins)` makes one packed batch; every 7th residue of a protein is masked, hence equal in any company."""

    def make(proteins: list[str], *, masked: bool = True) -> Batch:
        rows = [tokens_of(protein) for protein in proteins]
        lengths = [len(row) for row in rows]
        positions = torch.cat([torch.arange(length) for length in lengths]) if rows else torch.empty(0, dtype=torch.long)
        clean = torch.cat(rows) if rows else torch.empty(0, dtype=torch.long)
        chosen = (positions % 7 == 3) & (clean > 4) if masked else torch.zeros(len(clean), dtype=torch.bool)
        return Batch(
            tokens=torch.where(chosen, torch.tensor(4), clean),
            positions=positions,
            cu_seqlens=torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32),
            target_positions=chosen.nonzero().flatten(),
            targets=clean[chosen],
            sample_ids=torch.arange(len(rows)),
            max_length=max(lengths, default=0),
            num_residues=sum(lengths) - 2 * len(rows),
        )

    return make


def strong_model(size: str = "tiny", **changes: object) -> ProtBert:
    """Weights ten times the usual, biases and norms not at their start: a difference anywhere shows in the output."""
    model = build(dataclasses.replace(RECORD.size(size).shape, **changes))
    model.initialise(7)
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5.0)
            else:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


@pytest.fixture
def model() -> ProtBert:
    """A tiny ProtBert whose output depends strongly on everything."""
    return strong_model()


@pytest.fixture
def make_model() -> Callable[..., ProtBert]:
    """`make_model(size, **changes of the shape)`."""
    return strong_model


@pytest.fixture(scope="session")
def query_proteins(repository) -> list[str]:
    """The 500 shipped example proteins."""
    with gzip.open(repository / "data" / "mmseqs2_example_QUERY.fasta.gz", "rt") as file:
        return ["".join(record.splitlines()[1:]) for record in file.read().split(">")[1:]]
