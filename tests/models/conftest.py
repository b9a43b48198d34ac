"""Packed batches of real proteins, and a tiny ProtBert with weights that are far from zero."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
from collections.abc import Callable
from typing import Any

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
def states_of() -> Callable[..., list[torch.Tensor]]:
    """`states_of(model, layers, batch)`: what each layer reads, and behind these the last hidden states, as `hidden` gives them."""

    def watch(model: Any, layers: Any, batch: Batch) -> list[torch.Tensor]:
        found: list[torch.Tensor] = []

        def keep(_layer: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
            first = arguments[0]
            found.append(first[0][0] if isinstance(first, list) else first)  # XLNet's layers read streams

        with contextlib.ExitStack() as stack:
            for layer in layers:
                stack.callback(layer.register_forward_pre_hook(keep).remove)
            last = model.hidden(batch)
        return [*found, last]

    return watch


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


@pytest.fixture(scope="session")
def corrupted(small_corpus) -> Callable[..., Batch]:
    """`corrupted(record, settings, ids, max_residues=...)`: real proteins as the objective of `settings` corrupts them, as tensors."""
    from prottrans_hpc import objectives
    from prottrans_hpc.corpus.index import read_index
    from prottrans_hpc.corpus.reader import Corpus
    from prottrans_hpc.corpus.samples import whole_sequences
    from prottrans_hpc.objectives.layout import lay_out

    corpus = Corpus(read_index(small_corpus), "train")

    def make(record: architecture.Architecture, settings: Any, ids: list[int], *, max_residues: int = 512) -> Batch:
        rows = np.array(ids, np.int64)
        samples = whole_sequences(rows, np.minimum(corpus.lengths_of(rows), max_residues), epoch=0)
        batch = objectives.get(settings.name)(lay_out(corpus, samples, record.vocabulary), settings, 5)
        arrays = {name: torch.from_numpy(value) for name, value in vars(batch).items() if isinstance(value, np.ndarray)}
        return dataclasses.replace(batch, **arrays)

    return make


@pytest.fixture(scope="session")
def strengthen() -> Callable[..., torch.nn.Module]:
    """Makes weights large and biases and norms differ from their start: a difference anywhere shows in the output."""

    def strong(model: Any) -> torch.nn.Module:
        model.initialise(7)
        generator = torch.Generator().manual_seed(8)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.mul_(5.0)
                else:
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
        return model

    return strong


@pytest.fixture(scope="session")
def saved_bytes() -> Callable[..., int]:
    """`saved_bytes(model, batch, precision)`: what a forward pass keeps for the backward pass; weights and their copies are not counted."""

    def measure(model: Any, batch: Batch, precision: str) -> int:
        weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        shapes = {tuple(sorted(parameter.shape)) for parameter in model.parameters()}
        saved: dict[int, torch.Tensor] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            cast_weight = tensor.dtype == torch.bfloat16 and tuple(sorted(tensor.shape)) in shapes
            if storage.data_ptr() not in weights and not cast_weight:
                saved.setdefault(storage.data_ptr(), tensor)
            return tensor

        narrow = torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), narrow:
            result = model(batch)
        assert result.loss.requires_grad
        return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())

    return measure


@pytest.fixture(scope="session")
def padded() -> Callable[[Batch], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """A batch as transformers takes it: tokens and mask of the real ones in rows of equal length, and labels (-100: none)."""

    def pad(batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        rows = batch.tokens.split(batch.cu_seqlens.diff().tolist())
        targets = torch.full_like(batch.tokens, -100)
        targets[batch.target_positions] = batch.targets
        labels = torch.nn.utils.rnn.pad_sequence(targets.split([len(row) for row in rows]), batch_first=True, padding_value=-100)
        real = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), real, labels

    return pad
