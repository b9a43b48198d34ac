"""What turns FASTA into residues beside us: the limit, the fastest library, and what users of the published models do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from prottrans_hpc.architectures.prot_bert import ARCHITECTURE
from prottrans_hpc.corpus import kernel
from prottrans_hpc.corpus.alphabet import Rules
from prottrans_hpc.corpus.fasta import parse_source
from prottrans_hpc.corpus.kernel import BlockParser
from prottrans_hpc.corpus.sources import inspect

TABLE = bytes(ord("X") if chr(b) in "BOUZbouz" else ord(chr(b).upper()) if b < 128 else ord("X") for b in range(256))
"""Upper case and X, for contenders that bring no rules of their own."""


@dataclass(frozen=True)
class Contender:
    """One way to read a file."""

    name: str
    run: Callable[[Path], int]
    """`(file)` -> residues seen."""
    share: float = 1.0
    """Of the file, for the slow ones; their rate does not depend on it."""


def read_limit(path: Path) -> int:
    """Only read, into a buffer that is used again."""
    buffer, total = bytearray(1 << 22), 0
    with path.open("rb", buffering=0) as file:
        while num := file.readinto(buffer):
            total += num
    return total


def ours(which: str) -> Callable[[Path], int]:
    """Our parser with one implementation of its loops."""

    def run(path: Path) -> int:
        extension = kernel._c
        if which == "Python":
            kernel._c = None
        elif extension is not None:
            extension.select_path(which == "best")
        try:
            parser = BlockParser(Rules().table(), lines=False)
            return sum(len(parsed.residues) for parsed, _ in parse_source(inspect(path), parser))
        finally:
            kernel._c = extension
            if extension is not None:
                extension.select_path(True)

    return run


def pyfastx_translate(path: Path) -> int:
    """pyfastx.Fastx, one bytes.translate a record, borders in a list."""
    import pyfastx

    parts, offsets, total = [], [0], 0
    for _, sequence in pyfastx.Fastx(str(path)):
        residues = sequence.encode().translate(TABLE)
        parts.append(residues)
        total += len(residues)
        offsets.append(total)
        if total - offsets[0] > 1 << 22:
            b"".join(parts)
            parts, offsets = [], [total]
    return total


def biopython_translate(path: Path) -> int:
    """Biopython's fastest parser, one translate a record."""
    from Bio.SeqIO.FastaIO import SimpleFastaParser

    with path.open() as file:
        return sum(len(sequence.encode().translate(TABLE)) for _, sequence in SimpleFastaParser(file))


def huggingface(vocabulary: Path) -> Callable[[Path], int]:
    """What users of the published models do: Biopython, a space between residues, BertTokenizerFast."""
    from Bio import SeqIO
    from transformers import BertTokenizerFast

    tokenizer = BertTokenizerFast(vocab_file=str(vocabulary), do_lower_case=False)

    def run(path: Path) -> int:
        total, batch = 0, []
        for record in SeqIO.parse(path, "fasta"):
            batch.append(" ".join(str(record.seq)))
            if len(batch) == 256:
                total, batch = total + tokens(batch), []
        return total + tokens(batch)

    def tokens(batch: list[str]) -> int:
        return sum(len(ids) - 2 for ids in tokenizer(batch)["input_ids"]) if batch else 0

    return run


def contenders(scratch: Path) -> list[Contender]:
    """All that are installed; ours and the limit always."""
    vocabulary = scratch / "vocab.txt"
    vocabulary.write_text("".join(f"{token}\n" for token in ARCHITECTURE.vocabulary.tokens))
    found = [
        Contender("read() alone, the limit", read_limit),
        Contender("ours, C (best path)", ours("best")),
        Contender("ours, C (portable path)", ours("portable")),
    ]
    found += [
        Contender("ours, Python", ours("Python")),
        Contender("pyfastx + translate", pyfastx_translate),
        Contender("Biopython + translate", biopython_translate),
    ]
    return [*found, Contender("Biopython + BertTokenizerFast", huggingface(vocabulary), share=0.02)]
