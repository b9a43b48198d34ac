"""What a person sees of corpora: a table, a picture like Figure 1 of the paper, or the same as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .. import durable
from ..errors import missing_package
from ..terminal import printable
from .index import Index
from .statistics import unigram_entropy

_GIB = 2**30


def summary(index: Index) -> dict[str, Any]:
    """The index of one corpus with its path, its identity, and what follows from its counts."""
    content = {key: value for key, value in index.content.items() if key != "sha256"}
    derived = {"bytes_per_residue": round(index.num_bytes / index.num_residues, 4), "unigram_entropy": round(unigram_entropy(content["residue_counts"]), 6)}
    head = {"corpus": str(index.path), "sha256": index.sha256, "sequences": index.num_sequences, "residues": index.num_residues, "bytes": index.num_bytes}
    return head | derived | content


def print_table(indexes: Sequence[Index]) -> None:
    """Print a column a corpus to standard output."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=None)
    table.add_column("")
    for index in indexes:
        table.add_column(Text(_label(index)), justify="right")
    for section in (_sizes, _lengths, _residues, _changes):
        for label, *cells in section(indexes):
            table.add_row(label, *cells)
        table.add_section()
    console = Console()
    # A pipe has no width: give every column what it needs, so that nothing is cut.
    (console if console.is_terminal else Console(width=40 + 30 * len(indexes))).print(table)


def _label(index: Index) -> str:
    return printable(index.path.name or str(index.path), 40)


def _sizes(indexes: Sequence[Index]) -> Iterable[tuple[str, ...]]:
    yield "proteins", *(f"{index.num_sequences:,}" for index in indexes)
    yield "residues", *(f"{index.num_residues:,}" for index in indexes)
    for name in ("train", "validation"):
        yield f"  {name}", *(f"{index.splits[name].num_sequences:,}" for index in indexes)
        yield f"  {name} shards", *(f"{len(index.splits[name].shards):,}" for index in indexes)
    yield "on disk", *(_disk(index.num_bytes) for index in indexes)
    yield "bytes a residue", *(f"{index.num_bytes / index.num_residues:.3f}" for index in indexes)


def _disk(num_bytes: int) -> str:
    return f"{num_bytes / _GIB:.2f} GiB" if num_bytes >= _GIB else f"{num_bytes / 2**20:.2f} MiB"


def _lengths(indexes: Sequence[Index]) -> Iterable[tuple[str, ...]]:
    for key in indexes[0].content["lengths"]:
        label = {"shortest": "shortest", "mean": "mean length", "longest": "longest"}.get(key, f"length, {key[1:]} % up to")
        yield label, *(f"{index.content['lengths'][key]:,}" for index in indexes)


def _residues(indexes: Sequence[Index]) -> Iterable[tuple[str, ...]]:
    for letter in _letters(indexes):
        shares = [index.content["residue_counts"].get(letter, 0) / index.num_residues for index in indexes]
        yield letter, *(f"{100 * share:.3f} %" for share in shares)
    yield "entropy (nats)", *(f"{unigram_entropy(index.content['residue_counts']):.4f}" for index in indexes)


def _letters(indexes: Sequence[Index]) -> list[str]:
    """Every residue of any of them, the most frequent of the first one first."""
    counts = indexes[0].content["residue_counts"]
    return sorted({letter for index in indexes for letter in index.content["residue_counts"]}, key=lambda letter: (-counts.get(letter, 0), letter))


def _changes(indexes: Sequence[Index]) -> Iterable[tuple[str, ...]]:
    """What was changed or left out on the way in; only kinds that occur."""
    for key, label in (
        ("replaced", "replaced"),
        ("removed", "removed"),
        ("invalid", "invalid"),
        ("records_with_problems", "records"),
        ("duplicates", "duplicate"),
    ):
        for kind in sorted({kind for index in indexes for kind, num in index.content[key].items() if num}):
            yield f"{label} {kind.replace('_', ' ')}", *(f"{index.content[key].get(kind, 0):,}" for index in indexes)


def draw(indexes: Sequence[Index], path: Path) -> None:
    """Write a PNG: sequences by length on the left, residue frequencies on the right, all corpora in both."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise missing_package("matplotlib", "plots", "--plot") from error
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    by_length, by_residue = figure.subplots(1, 2)
    letters = _letters(indexes)
    width = 0.8 / len(indexes)
    for k, index in enumerate(indexes):
        bins = index.content["length_histogram"]
        shares = [100 * part["sequences"] / index.num_sequences for part in bins]
        by_length.stairs(shares, [bins[0]["from"], *(part["to"] for part in bins)], fill=True, alpha=0.5, label=_label(index))
        frequencies = [100 * index.content["residue_counts"].get(letter, 0) / index.num_residues for letter in letters]
        by_residue.bar([i + (k + 0.5) * width - 0.4 for i in range(len(letters))], frequencies, width, label=_label(index))
    by_length.set(xscale="log", xlabel="length (residues)", ylabel="share of the sequences in a quarter octave (%)")
    by_residue.set(xlabel="residue", ylabel="frequency (%)", xticks=range(len(letters)), xticklabels=letters)
    by_residue.legend()
    with durable.new_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120, metadata={"Software": None})
