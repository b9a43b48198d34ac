"""Real proteins in many spellings, a parser too plain to be wrong, and corpora built from both."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from prottrans_hpc.corpus import kernel
from prottrans_hpc.corpus.alphabet import Rules
from prottrans_hpc.corpus.builder import build
from prottrans_hpc.corpus.fasta import read_records
from prottrans_hpc.corpus.identity import BuildOptions
from prottrans_hpc.corpus.index import Index
from prottrans_hpc.corpus.pool import ThisProcess
from prottrans_hpc.corpus.shard import Shard, map_shard

Records = list[tuple[bytes, bytes]]


@pytest.fixture(scope="session")
def proteins(proteins_fasta: Path) -> Records:
    """(name, residues) of 1,500 real proteins."""
    found = [(record.name, record.residues) for record in read_records([proteins_fasta], rules=Rules())][:1500]
    assert len(found) == 1500
    return found


@pytest.fixture(params=["C best", "C portable", "Python"])
def each_kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Run the test with each implementation of the loops."""
    if request.param == "Python":
        monkeypatch.setattr(kernel, "_c", None)
    elif kernel._c is None:
        pytest.skip("the C extension is not built here")
    else:
        kernel._c.select_path(request.param == "C best")
    yield request.param
    if kernel._c is not None:
        kernel._c.select_path(True)


def fasta_text(records: Records, *, width: int = 60, end: str = "\n") -> bytes:
    """Multi-line FASTA with a description behind each name."""
    lines = []
    for name, residues in records:
        lines.append(">" + name.decode() + " a protein | OX=9606")
        text = residues.decode()
        lines += [text[i : i + width] for i in range(0, len(text), width)]
    return (end.join(lines) + end).encode()


def naive_parse(text: bytes, *, keep_rare: bool = False) -> Records:
    """What the rules say, in the plainest Python: only for text whose characters are all allowed."""
    records: list[tuple[bytes, list[bytes]]] = []
    for line in text.split(b"\n"):
        if line.startswith(b">"):
            match = re.match(rb"[ \t]*([^\x00-\x20]*)", line[1:])
            assert match
            records.append((match[1], []))
        else:
            kept = bytes(b for b in line.upper() if b not in b" \t\r\v\f*-.")
            if kept:
                records[-1][1].append(kept if keep_rare else re.sub(rb"[BOUZ]", b"X", kept))
    return [(name, b"".join(parts)) for name, parts in records]


def contents(index: Index) -> dict[str, Records]:
    """All records of a corpus, by split, in order."""
    found: dict[str, Records] = {}
    for name, split in index.splits.items():
        shards = [map_shard(index.shard_path(entry)) for entry in split.shards]
        found[name] = [(shard.name(i), _sequence(shard, i)) for shard in shards for i in range(len(shard.offsets) - 1)]
    return found


def _sequence(shard: Shard, i: int) -> bytes:
    return shard.residues[int(shard.offsets[i]) : int(shard.offsets[i + 1])].tobytes()


def folder_bytes(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


Build = Callable[..., Index]


@pytest.fixture
def build_corpus(tmp_path: Path) -> Build:
    """`build_corpus(inputs, name="corpus", invalid="error", ...)` builds in this process."""

    def make(inputs: Path | list[Path], *, name: str = "corpus", invalid: str = "error", keep_rare: bool = False, **options: object) -> Index:
        paths = tuple(str(path) for path in (inputs if isinstance(inputs, list) else [inputs]))
        return build(BuildOptions(paths, tmp_path / name, Rules(invalid, keep_rare), **options), ThisProcess())  # type: ignore[arg-type]

    return make


def preprocess_request(*inputs: Path, out: Path, **changes: object) -> dict[str, object]:
    """The request of the stage, as the command line would make it."""
    defaults: dict[str, object] = {
        "workers": 1,
        "mpi": False,
        "shards": None,
        "dedup": False,
        "validation": 0.01,
        "clusters": None,
        "invalid": "error",
        "keep_rare": False,
        "names": True,
        "release": None,
        "json": True,
    }
    return defaults | {"inputs": [str(path) for path in inputs], "out": str(out)} | changes
