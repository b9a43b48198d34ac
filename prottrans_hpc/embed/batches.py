"""From residues to packed batches: which proteins run together, and the tensors of one batch.

Proteins of a window are sorted by length and packed whole, end to end, up to a budget, so that nothing is
padded. The plan is a pure function of the lengths: a rerun makes the same batches, hence the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from ..architecture import Batch, Vocabulary

Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Encoder:
    """How residues become token ids: one byte translation for a whole batch."""

    table: bytes
    """256 bytes: residue letter -> token id; the first bytes stand for the special tokens."""
    head: bytes
    """Bytes in front of every protein that `table` maps to the prefix tokens."""
    tail: bytes
    """Bytes behind every protein that `table` maps to the suffix tokens."""

    @property
    def num_specials(self) -> int:
        """Special tokens that a protein gets."""
        return len(self.head) + len(self.tail)


def build_encoder(vocabulary: Vocabulary) -> Encoder:
    """The encoder of a vocabulary. Bytes below the letters are free, as cleaned residues are upper-case ASCII."""
    specials = (*vocabulary.prefix, *vocabulary.suffix)
    table = bytearray(vocabulary.residue_table())
    for place, token in enumerate(specials):
        table[place] = vocabulary.index(token)
    codes = bytes(range(len(specials)))
    return Encoder(table=bytes(table), head=codes[: len(vocabulary.prefix)], tail=codes[len(vocabulary.prefix) :])


def plan_bins(lengths: Int64s, bin_residues: int) -> list[Int64s]:
    """Indices into `lengths` for each batch, longest proteins first; ties keep their order.

    A batch is filled until the next protein would exceed `bin_residues`; a protein over the budget runs alone.
    """
    order = np.argsort(-lengths, kind="stable")
    bins, start, total = [], 0, 0
    for place, length in enumerate(lengths[order].tolist()):
        if place > start and total + length > bin_residues:
            bins.append(order[start:place])
            start, total = place, 0
        total += length
    if start < len(order):
        bins.append(order[start:])
    return bins


def build_batch(proteins: Sequence[bytes], encoder: Encoder) -> Batch:
    """Pack proteins, special tokens included, into one batch without targets (CPU tensors)."""
    joined = encoder.head + (encoder.tail + encoder.head).join(proteins) + encoder.tail
    lengths = np.fromiter((len(residues) for residues in proteins), np.int64, len(proteins)) + encoder.num_specials
    cu_seqlens = np.zeros(len(proteins) + 1, np.int64)
    np.cumsum(lengths, out=cu_seqlens[1:])
    tokens = np.frombuffer(joined.translate(encoder.table), np.uint8).astype(np.int64)
    positions = np.arange(len(tokens)) - np.repeat(cu_seqlens[:-1], lengths)
    nothing = torch.empty(0, dtype=torch.int64)
    return Batch(
        tokens=torch.from_numpy(tokens),
        positions=torch.from_numpy(positions),
        cu_seqlens=torch.from_numpy(cu_seqlens.astype(np.int32)),
        target_positions=nothing,
        targets=nothing,
        sample_ids=torch.arange(len(proteins)),
        max_length=int(lengths.max()),
        num_residues=len(tokens) - len(proteins) * encoder.num_specials,
    )
