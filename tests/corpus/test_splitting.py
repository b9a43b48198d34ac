"""Validation by cluster: no cluster is in both splits, and every line of the file is understood or named."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from prottrans_hpc.corpus import sorted_runs, splitting
from prottrans_hpc.errors import ConfigError, DataError

from .conftest import Build, Records, contents, fasta_text


@pytest.fixture
def fasta(tmp_path: Path, proteins: Records) -> Path:
    path = tmp_path / "a.fasta"
    path.write_bytes(fasta_text(proteins))
    return path


def table(path: Path, proteins: Records, size: int = 5, end: bytes = b"\n") -> dict[bytes, bytes]:
    """Clusters of consecutive proteins, the first one the representative; {member: representative}."""
    clusters = {name: proteins[i - i % size][0] for i, (name, _) in enumerate(proteins)}
    path.write_bytes(b"".join(representative + b"\t" + member + end for member, representative in clusters.items()))
    return clusters


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("block", [50, 1 << 22])
def test_clusters_stay_together(
    tmp_path: Path, proteins: Records, fasta: Path, build_corpus: Build, end: bytes, block: int, monkeypatch: pytest.MonkeyPatch, each_kernel: str
) -> None:
    monkeypatch.setattr(splitting, "_BLOCK", block)
    clusters = table(tmp_path / "clusters.tsv", proteins, end=end)
    index = build_corpus(fasta, validation=0.2, clusters=tmp_path / "clusters.tsv")
    found = contents(index)
    train, validation = ({clusters[name] for name, _ in found[split]} for split in ("train", "validation"))
    assert not train & validation
    assert 0.1 < len(validation) / len(train | validation) < 0.3
    assert len(found["train"]) + len(found["validation"]) == len(proteins)
    assert index.content["split"]["by"] == "cluster"
    assert index.content["split"]["not_in_clusters"] == 0
    assert index.content["split"]["clusters"]["path"] == "clusters.tsv"


def test_a_table_that_memory_does_not_hold_gives_the_same_split(
    tmp_path: Path, proteins: Records, fasta: Path, build_corpus: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "clusters.tsv"
    table(path, proteins)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines + lines[::7]))  # a line may be given twice
    tables, found = [], []
    for rows in (1 << 22, 100):
        monkeypatch.setattr(sorted_runs, "ROWS_PER_RUN", rows)
        monkeypatch.setattr(splitting, "_BLOCK", 300)
        stem = tmp_path / f"table-{rows}"
        splitting.build_clusters(path, stem, 0.2)
        tables.append([stem.with_name(f"{stem.name}.{column}").read_bytes() for column in ("key", "low", "held_out")])
        found.append(contents(build_corpus(fasta, name=f"corpus-{rows}", validation=0.2, clusters=path)))
    assert tables[0] == tables[1] and found[0] == found[1]
    assert len(tables[0][2]) == len(proteins)


def test_a_member_of_two_clusters_is_found_whatever_run_it_is_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sorted_runs, "ROWS_PER_RUN", 10)
    monkeypatch.setattr(splitting, "_BLOCK", 60)
    path = tmp_path / "clusters.tsv"
    path.write_bytes(b"".join(b"r%d\tm%d\n" % (k, k % 100) for k in range(200)))
    with pytest.raises(DataError, match="puts 100 members into more than one cluster"):
        splitting.build_clusters(path, tmp_path / "table", 0.5)


def test_a_compressed_table_gives_the_same_split(tmp_path: Path, proteins: Records, fasta: Path, build_corpus: Build) -> None:
    plain, packed = tmp_path / "clusters.tsv", tmp_path / "clusters.tsv.gz"
    table(plain, proteins)
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    corpora = [contents(build_corpus(fasta, name=f"corpus-{path.suffix}", validation=0.2, clusters=path)) for path in (plain, packed)]
    assert corpora[0] == corpora[1]


def test_uniprot_headers_match_bare_accessions(tmp_path: Path, proteins: Records, fasta: Path, build_corpus: Build) -> None:
    table(tmp_path / "clusters.tsv", proteins)
    (tmp_path / "b.fasta").write_bytes(fasta_text([(b"sp|" + name + b"|X_HUMAN", residues) for name, residues in proteins]))
    bare = contents(build_corpus(fasta, name="bare", validation=0.2, clusters=tmp_path / "clusters.tsv"))
    long = build_corpus(tmp_path / "b.fasta", name="long", validation=0.2, clusters=tmp_path / "clusters.tsv")
    assert [residues for _, residues in contents(long)["validation"]] == [residues for _, residues in bare["validation"]]
    assert long.content["split"]["not_in_clusters"] == 0


def test_sequences_in_no_cluster_are_counted_and_said(
    tmp_path: Path, proteins: Records, fasta: Path, build_corpus: Build, capsys: pytest.CaptureFixture[str]
) -> None:
    table(tmp_path / "clusters.tsv", proteins[:1000])
    index = build_corpus(fasta, validation=0.2, clusters=tmp_path / "clusters.tsv")
    assert index.content["split"]["not_in_clusters"] == len(proteins) - 1000
    assert "500 sequences are not in" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"a\tb\nc\n", "line 2"),
        (b"a\tb\nc\td\te\n", "line 2"),
        (b"a\tb\n\tc\n", "line 2"),
        (b"a\tb\n\nc\td\n", "line 2"),
        (b"a b\n", "line 1"),
        (b"a\n\tb\n", "line 1"),
        (b"", "is empty"),
    ],
)
def test_lines_that_are_no_pair_are_named(tmp_path: Path, fasta: Path, build_corpus: Build, text: bytes, message: str) -> None:
    path = tmp_path / "clusters.tsv"
    path.write_bytes(text)
    with pytest.raises(DataError, match=message) as caught:
        build_corpus(fasta, validation=0.2, clusters=path)
    assert str(path) in str(caught.value)
    assert not (tmp_path / "corpus").exists()


def test_a_member_of_two_clusters_that_part_is_an_error(tmp_path: Path, fasta: Path, build_corpus: Build) -> None:
    path = tmp_path / "clusters.tsv"
    path.write_bytes(b"".join(b"r%d\tm\n" % k for k in range(64)))
    with pytest.raises(DataError, match="more than one cluster"):
        build_corpus(fasta, validation=0.5, clusters=path)


def test_clusters_without_validation_are_a_usage_error(tmp_path: Path, proteins: Records, fasta: Path, build_corpus: Build) -> None:
    table(tmp_path / "clusters.tsv", proteins)
    with pytest.raises(ConfigError, match="nothing is to be held out"):
        build_corpus(fasta, clusters=tmp_path / "clusters.tsv")


def test_a_missing_table_is_a_usage_error(tmp_path: Path, fasta: Path, build_corpus: Build) -> None:
    with pytest.raises(ConfigError, match="no cluster file"):
        build_corpus(fasta, validation=0.2, clusters=tmp_path / "nothing.tsv")
