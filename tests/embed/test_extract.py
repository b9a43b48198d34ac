"""One batch through the model: means, the back-off when memory runs out, numbers that are none."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from prottrans_hpc.embed import model
from prottrans_hpc.embed.extract import Extractor, segment_means


@pytest.fixture(scope="module")
def loaded(tiny_checkpoint):
    return model.load(model.find_source(tiny_checkpoint), device=torch.device("cpu"), precision="fp32")


def test_segment_means_are_the_means_also_of_long_segments():
    generator = torch.Generator().manual_seed(0)
    lengths = np.array([1, 255, 256, 257, 3, 30_000])
    hidden = torch.randn(int(lengths.sum()), 5, generator=generator) + 3.0
    expected = torch.stack([part.double().mean(0) for part in hidden.split(lengths.tolist())])
    assert torch.allclose(segment_means(hidden, lengths).double(), expected, rtol=1e-6, atol=1e-6)


class SmallMemory(torch.nn.Module):
    """The real model on a device that holds `limit` tokens; the error is the one that torch raises."""

    def __init__(self, module: torch.nn.Module, limit: int, error: Exception) -> None:
        super().__init__()
        self.module, self.limit, self.error = module, limit, error
        self.tried: list[int] = []

    def hidden(self, batch):
        self.tried.append(len(batch.tokens))
        if len(batch.tokens) > self.limit:
            raise self.error
        return self.module.hidden(batch)


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:132] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes. Error code 12"),
    MemoryError(),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["cuda", "cpu", "python"])
def test_out_of_memory_halves_the_batch_and_fails_only_the_protein_that_is_too_large_alone(loaded, proteins, error):
    sequences = [residues[: 40 + place].encode() for place, (_, residues) in enumerate(proteins[:9]) if len(residues) > 60]
    sequences[2] = b"MK" * 200
    rows = np.arange(100, 100 + len(sequences))
    whole = Extractor(loaded, "fp32", per_residue=True, mean=True).run(sequences, rows)
    small = SmallMemory(loaded.module, 150, error)
    assert loaded.width == 64
    extractor = Extractor(dataclasses.replace(loaded, module=small), "fp32", per_residue=True, mean=True)
    extract = extractor.run(sequences, rows)
    assert extract.failed == {102: "out of memory on cpu, even alone (400 residues)"}
    assert sorted(extract.rows.tolist()) == [row for row in rows.tolist() if row != 102]
    kept = [place for place, row in enumerate(whole.rows.tolist()) if row != 102]
    assert np.allclose(extract.mean, whole.mean[kept], atol=1e-5)
    assert len(extract.residues) == sum(len(residues) for residues in sequences) - 400
    # The next batch of this size is not tried whole again.
    small.tried.clear()
    extractor.run([b"MKV" * 20] * 5, np.arange(5))
    assert small.tried
    assert max(small.tried) <= 150


def test_an_error_that_is_not_about_memory_is_not_swallowed(loaded):
    broken = dataclasses.replace(loaded, module=SmallMemory(loaded.module, 0, RuntimeError("shapes cannot be multiplied")))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        Extractor(broken, "fp32", per_residue=False, mean=True).run([b"MKV"], np.arange(1))


class Overflowing(torch.nn.Module):
    """The real model, but one residue of each W gets a value that only fp32 holds, or none."""

    def __init__(self, loaded: model.Model, value: float) -> None:
        super().__init__()
        self.loaded, self.value = loaded, value

    def hidden(self, batch):
        hidden = self.loaded.module.hidden(batch).clone()
        hidden[batch.tokens == self.loaded.record.vocabulary.index("W")] = self.value
        return hidden


@pytest.mark.parametrize(
    ("value", "precision", "fails"), [(float("nan"), "fp32", True), (float("inf"), "fp16", True), (1e6, "fp16", True), (1e6, "fp32", False)]
)
@pytest.mark.parametrize("mean", [True, False])
def test_numbers_that_cannot_be_stored_fail_their_protein_alone(loaded, value, precision, fails, mean):
    changed = dataclasses.replace(loaded, module=Overflowing(loaded, value))
    # Long enough that the mean of the bad protein alone would still fit fp16.
    sequences = [b"MKV", b"MKVLAGGA" * 10 + b"W" + b"MKVLAGGA" * 10, b"AC"]
    extract = Extractor(changed, precision, per_residue=True, mean=mean).run(sequences, np.array([4, 7, 9]))
    assert list(extract.failed) == ([7] if fails else [])
    assert extract.rows.tolist() == ([4, 9] if fails else [4, 7, 9])
    assert len(extract.residues) == (5 if fails else 166)
    assert (extract.mean is None) == (not mean)
