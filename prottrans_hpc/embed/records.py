"""FASTA records as proteins: what the corpus reader yields and what it leaves out, both, in the order of the input."""

from __future__ import annotations

from collections.abc import Iterator

from ..corpus.alphabet import Rules
from ..corpus.fasta import Record, read_records
from ..corpus.sources import find_sources
from .options import Options
from .proteins import Protein, Reader

_RULE = {"error": "skip", "skip": "skip", "x": "x"}
"""--invalid -> the corpus's rule. One odd protein does not end an extraction: it is listed as failed."""


def open_input(options: Options, max_residues: int | None) -> Reader:
    """The reader of the FASTA files, in which proteins of more than `max_residues` have a problem too.

    Raises CheckpointError for a missing file and DataError for one that is no FASTA; reading raises DataError for
    a damaged one.
    """
    paths = [source.path for source in find_sources(options.fasta)]
    rules = Rules(invalid=_RULE[options.invalid])

    def read() -> Iterator[Protein]:
        left_out: list[Protein] = []

        def leave_out(record: Record, reason: str) -> None:
            left_out.append(Protein(record.name, record.residues, reason))

        for record in read_records(paths, rules=rules, on_skip=leave_out):
            if left_out:
                yield from left_out
                left_out.clear()
            yield Protein(record.name, record.residues, _too_long(record, max_residues))
        yield from left_out

    return read


def _too_long(record: Record, max_residues: int | None) -> str | None:
    if max_residues is None or len(record.residues) <= max_residues:
        return None
    return f"{len(record.residues):,} residues, but the model's position table holds {max_residues:,} at most"
