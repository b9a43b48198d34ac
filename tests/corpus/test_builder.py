"""Corpora hold what went in, by the rules, whatever the number of workers."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prottrans_hpc import stage
from prottrans_hpc.corpus import assembly, duplicates, kernel, pieces, pool, scan
from prottrans_hpc.corpus.alphabet import Rules
from prottrans_hpc.corpus.builder import build
from prottrans_hpc.corpus.identity import BuildOptions
from prottrans_hpc.corpus.index import read_index
from prottrans_hpc.corpus.pool import ThisProcess
from prottrans_hpc.corpus.shard import map_shard
from prottrans_hpc.errors import ConfigError, DataError, IdentityError

from .conftest import Build, Records, contents, fasta_text, folder_bytes, preprocess_request


def write(path: Path, records: Records, **how: object) -> Path:
    path.write_bytes(fasta_text(records, **how))  # type: ignore[arg-type]
    return path


def held_out(residues: bytes, share: float) -> bool:
    digest = hashlib.blake2b(residues, digest_size=16, person=kernel.PERSON).digest()
    return int.from_bytes(digest[:8], "little") < share * 2**64


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranges, pieces and ranges of digests so small that a small input has many of each."""
    monkeypatch.setattr(scan, "MIN_RANGE_BYTES", 10_000)
    monkeypatch.setattr(pieces, "PIECE_BYTES", 30_000)
    monkeypatch.setattr(duplicates, "KEYS_PER_RANGE", 100)


def test_a_corpus_holds_the_proteins_in_order(tmp_path: Path, proteins: Records, build_corpus: Build, each_kernel: str) -> None:
    index = build_corpus(write(tmp_path / "a.fasta", proteins), validation=0.05, num_shards=3)
    found = contents(index)
    assert found["validation"] == [record for record in proteins if held_out(record[1], 0.05)]
    assert found["train"] == [record for record in proteins if not held_out(record[1], 0.05)]
    assert len(index.splits["train"].shards) == 3
    assert folder_bytes(index.path).keys() == {"index.json", "train-00000.h5", "train-00001.h5", "train-00002.h5", "validation-00000.h5"}


def test_every_implementation_gives_the_same_bytes(tmp_path: Path, proteins: Records, build_corpus: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    if kernel._c is None:
        pytest.skip("the C extension is not built here")
    path = write(tmp_path / "a.fasta", [*proteins, (b"rare", b"MBOUZbX-*."), *proteins[:200]])
    options = {"validation": 0.1, "dedup": True, "num_shards": 4}
    expected = folder_bytes(build_corpus(path, name="c", **options).path)
    monkeypatch.setattr(kernel, "_c", None)
    assert folder_bytes(build_corpus(path, name="python", **options).path) == expected


def test_the_index_counts_what_is_there(tmp_path: Path, proteins: Records, build_corpus: Build) -> None:
    text = fasta_text(proteins) + b">rare\nmbBouz*\n>gaps\nM-.K\n"
    path = tmp_path / "a.fasta"
    path.write_bytes(text)
    index = build_corpus(path, validation=0.1, num_shards=2, release="Swiss-Prot 2014_01")
    content = index.content
    records = [record for split in contents(index).values() for record in split]
    letters = Counter(letter for _, residues in records for letter in residues.decode())
    assert content["residue_counts"] == dict(letters)
    assert content["sequences"] == len(records) == len(proteins) + 2
    assert content["residues"] == sum(letters.values())
    assert content["bytes"] == sum(path.stat().st_size for path in index.path.glob("*.h5"))
    assert content["replaced"] == {"B": 2, "O": 1, "U": 1, "Z": 1}
    assert content["removed"] == {"*": 1, "-": 1, ".": 1}
    assert content["sources"] == [{"path": "a.fasta", "bytes": len(text), "sha256": hashlib.sha256(text).hexdigest(), "release": "Swiss-Prot 2014_01"}]
    lengths = sorted(len(residues) for _, residues in records)
    assert content["lengths"]["shortest"] == lengths[0]
    assert content["lengths"]["longest"] == lengths[-1]
    assert content["lengths"]["p50"] == lengths[-(-len(lengths) // 2) - 1]
    assert content["lengths"]["mean"] == pytest.approx(sum(lengths) / len(lengths), abs=1e-3)
    for part in content["length_histogram"]:
        assert part["sequences"] == sum(part["from"] <= length < part["to"] for length in lengths)
    assert sum(part["sequences"] for part in content["length_histogram"]) == len(lengths)
    for split in index.splits.values():
        for shard in split.shards:
            data = index.shard_path(shard).read_bytes()
            assert (len(data), hashlib.sha256(data).hexdigest()) == (shard.num_bytes, shard.sha256)


@pytest.mark.parametrize("num", [1, 2, 7, 50])
def test_shards_are_balanced_by_residues(tmp_path: Path, proteins: Records, build_corpus: Build, num: int, small_parts: None) -> None:
    index = build_corpus(write(tmp_path / "a.fasta", proteins), num_shards=num)
    sizes = [shard.num_residues for shard in index.splits["train"].shards]
    longest = max(len(residues) for _, residues in proteins)
    assert len(sizes) == num
    # The borders nearest to equal shares are off by half a sequence at most.
    assert max(abs(size - sum(sizes) / num) for size in sizes) <= longest
    assert contents(index)["train"] == proteins


def test_a_giant_among_dwarfs_leaves_no_shard_empty(tmp_path: Path, build_corpus: Build) -> None:
    records = [(f"n{i}".encode(), b"M" * (1_000_000 if i == 3 else 2)) for i in range(9)]
    index = build_corpus(write(tmp_path / "a.fasta", records), num_shards=8)
    assert all(shard.num_sequences >= 1 for shard in index.splits["train"].shards)
    assert contents(index)["train"] == records
    with pytest.raises(ConfigError, match="only 9 sequences"):
        build_corpus(tmp_path / "a.fasta", name="more", num_shards=10)


@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=40), data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_lengths_any_shards(tmp_path_factory: pytest.TempPathFactory, lengths: list[int], data: st.DataObject) -> None:
    num = data.draw(st.integers(1, len(lengths)))
    folder = tmp_path_factory.mktemp("any")
    records = [(f"n{i}".encode(), b"ACDEFGHIKLMNPQRSTVWY"[i % 20 : i % 20 + 1] * length) for i, length in enumerate(lengths)]
    path = write(folder / "a.fasta", records)
    index = build(BuildOptions((str(path),), folder / "corpus", Rules(), num_shards=num), ThisProcess())
    assert contents(index)["train"] == records
    assert len(index.splits["train"].shards) == num


def test_shards_of_the_default_size(tmp_path: Path, proteins: Records, build_corpus: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assembly, "TARGET_RESIDUES", 100_000)
    index = build_corpus(write(tmp_path / "a.fasta", proteins))
    assert len(index.splits["train"].shards) == round(sum(len(residues) for _, residues in proteins) / 100_000) > 2


def test_about_a_byte_a_residue(tmp_path: Path, proteins: Records, build_corpus: Build) -> None:
    index = build_corpus(write(tmp_path / "a.fasta", proteins * 1))
    assert index.num_bytes / index.num_residues < 1.1


def test_without_names(tmp_path: Path, proteins: Records, build_corpus: Build) -> None:
    index = build_corpus(write(tmp_path / "a.fasta", proteins + proteins), names=False)
    shard = map_shard(index.shard_path(index.splits["train"].shards[0]))
    assert shard.names is None
    assert contents(index)["train"] == [(b"", residues) for _, residues in proteins + proteins]


def test_several_files_folders_and_kinds_of_text(tmp_path: Path, proteins: Records, build_corpus: Build) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "b.fasta.gz").write_bytes(gzip.compress(fasta_text(proteins[100:200])))
    write(folder / "a.fasta", proteins[:100], end="\r\n")
    (tmp_path / "c.txt").write_bytes(b"\n".join(residues for _, residues in proteins[200:250]))
    index = build_corpus([folder, tmp_path / "c.txt"])
    assert contents(index)["train"] == proteins[:200] + [(b"", residues) for _, residues in proteins[200:250]]
    assert [source["path"] for source in index.content["sources"]] == ["a.fasta", "b.fasta.gz", "c.txt"]


def test_growing_the_corpus_moves_no_sequence_between_splits(tmp_path: Path, proteins: Records, build_corpus: Build) -> None:
    small = contents(build_corpus(write(tmp_path / "a.fasta", proteins[:700]), name="small", validation=0.1))
    large = contents(build_corpus(write(tmp_path / "b.fasta", proteins[::-1]), name="large", validation=0.1))
    assert set(small["train"]) <= set(large["train"])
    assert set(small["validation"]) <= set(large["validation"])


# ---- any number of workers ----


@pytest.mark.parametrize("dedup", [False, True])
def test_the_number_of_workers_does_not_change_a_byte(
    tmp_path: Path, proteins_fasta: Path, proteins: Records, dedup: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "SMALL", 0.0)
    monkeypatch.setattr(scan, "MIN_RANGE_BYTES", 50_000)
    plain = write(tmp_path / "a.fasta", [(b"again-" + name, residues) for name, residues in proteins])
    packed = tmp_path / "b.fasta.gz"
    packed.write_bytes(gzip.compress(fasta_text([(b"more-" + name, residues) for name, residues in proteins[:300]])))
    results = []
    for workers in (1, 2, 3):
        out = tmp_path / f"corpus-{workers}"
        request = preprocess_request(plain, proteins_fasta, packed, out=out, workers=workers, dedup=dedup, validation=0.02, shards=5)
        stage.run_stage("preprocess", request)
        results.append(folder_bytes(out))
    assert results[0] == results[1] == results[2]
    duplicates_found = read_index(tmp_path / "corpus-1").content["duplicates"].get("sequences_dropped", 0)
    assert duplicates_found >= 1800 if dedup else duplicates_found == 0


@pytest.mark.parametrize("num_workers", [1, 2, 5, 16])
def test_ranges_cover_a_file_for_any_number_of_workers(tmp_path: Path, proteins: Records, num_workers: int, small_parts: None) -> None:
    class Pretended(ThisProcess):
        pass

    path = write(tmp_path / "a.fasta", proteins)
    expected = folder_bytes(build(BuildOptions((str(path),), tmp_path / "one", Rules(), validation=0.1), ThisProcess()).path)
    Pretended.num_workers = num_workers
    assert folder_bytes(build(BuildOptions((str(path),), tmp_path / "many", Rules(), validation=0.1), Pretended()).path) == expected


# ---- duplicates ----


def test_dedup_keeps_the_first_of_equal_sequences(tmp_path: Path, proteins: Records, build_corpus: Build, small_parts: None, each_kernel: str) -> None:
    files = [
        write(tmp_path / "a.fasta", [*proteins[:300], (b"again", proteins[5][1])]),
        write(tmp_path / "b.fasta", [(b"b-" + name, residues.lower()) for name, residues in proteins[200:400]]),
    ]
    index = build_corpus(files, dedup=True, validation=0.1, num_shards=2)
    everything = proteins[:300] + [(b"again", proteins[5][1])] + [(b"b-" + name, residues) for name, residues in proteins[200:400]]
    first: dict[bytes, tuple[bytes, bytes]] = {}
    for record in everything:
        first.setdefault(record[1], record)
    found = contents(index)
    assert found["train"] == [record for record in first.values() if not held_out(record[1], 0.1)]
    assert found["validation"] == [record for record in first.values() if held_out(record[1], 0.1)]
    assert index.content["duplicates"] == {"sequences_dropped": len(everything) - len(first), "names_kept": 0}
    letters = Counter(letter for _, residues in first.values() for letter in residues.decode())
    assert index.content["residue_counts"] == dict(letters)


@given(names=st.lists(st.sampled_from([b"a", b"b", b"c", b"dd"]), min_size=1, max_size=25), data=st.data())
@settings(max_examples=80, deadline=None)
def test_dedup_agrees_with_a_dictionary(tmp_path_factory: pytest.TempPathFactory, names: list[bytes], data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("dedup")
    records = [(name, data.draw(st.sampled_from([b"M", b"MK", b"MKV", b"W", b"WW"]))) for name in names]
    index = build(BuildOptions((str(write(folder / "a.fasta", records)),), folder / "corpus", Rules("skip"), dedup=True), ThisProcess())
    sequences, kept_names, expected = set(), set(), []
    for name, residues in records:
        if residues not in sequences:
            sequences.add(residues)
            if name not in kept_names:
                kept_names.add(name)
                expected.append((name, residues))
    assert contents(index)["train"] == expected


def test_a_name_that_occurs_twice_is_an_error_that_names_both_places(tmp_path: Path, proteins: Records, build_corpus: Build, small_parts: None) -> None:
    files = [write(tmp_path / "a.fasta", proteins[:900]), write(tmp_path / "b.fasta", [(b"new", b"MKV"), (proteins[700][0], b"MMM")])]
    line = fasta_text(proteins[:900]).split(b"\n").index(b">" + proteins[700][0] + b" a protein | OX=9606") + 1
    with pytest.raises(DataError) as caught:
        build_corpus(files)
    assert f"{tmp_path}/b.fasta, line 3, record {proteins[700][0].decode()!r}" in str(caught.value)
    assert f"{tmp_path}/a.fasta, line {line}" in str(caught.value)
    assert not (tmp_path / "corpus").exists()
    with pytest.raises(DataError, match=r"line 3, record 'x': the name occurred before \(.*line 1\), and 1 more like it"):
        build_corpus(write(tmp_path / "c.fasta", [(b"x", b"M"), (b"x", b"K"), (b"x", b"V")]))


@pytest.mark.parametrize("dedup", [False, True])
def test_the_advice_for_equal_names_helps(tmp_path: Path, build_corpus: Build, dedup: bool) -> None:
    path = write(tmp_path / "a.fasta", [(b"x", b"M"), (b"x", b"K")])
    with pytest.raises(DataError, match=r"--invalid skip leaves out .*, --invalid x keeps them, --no-names does without") as caught:
        build_corpus(path, dedup=dedup)
    assert ("--dedup helps only where the sequences are equal" in str(caught.value)) is not dedup
    assert str(caught.value).count("--dedup") == (0 if dedup else 1)


def test_names_that_occur_twice_under_the_other_rules(tmp_path: Path, build_corpus: Build) -> None:
    path = write(tmp_path / "a.fasta", [(b"x", b"M"), (b"y", b"K"), (b"x", b"V"), (b"x", b"V")])
    skipped = build_corpus(path, name="skip", invalid="skip")
    assert contents(skipped)["train"] == [(b"x", b"M"), (b"y", b"K")]
    assert skipped.content["duplicates"] == {"names_dropped": 2}
    kept = build_corpus(path, name="x", invalid="x")
    assert len(contents(kept)["train"]) == 4
    assert kept.content["duplicates"] == {"names_kept": 2}


# ---- records with problems ----


def test_problems_are_counted(tmp_path: Path, build_corpus: Build, each_kernel: str) -> None:
    path = tmp_path / "a.fasta"
    path.write_bytes(b">a\nMKV\n>b\nMJ1V\n>c\n\n>\nWW\n>e\nACJ\n>f\nDD\n")
    skipped = build_corpus(path, name="skip", invalid="skip")
    assert contents(skipped)["train"] == [(b"a", b"MKV"), (b"f", b"DD")]
    assert skipped.content["records_with_problems"] == {"empty": 1, "invalid": 2, "left_out": 4, "nameless": 1}
    assert skipped.content["invalid"] == {"1": 1, "J": 2}
    assert skipped.content["residue_counts"] == {"D": 2, "K": 1, "M": 1, "V": 1}
    replaced = build_corpus(path, name="x", invalid="x")
    assert contents(replaced)["train"] == [(b"a", b"MKV"), (b"b", b"MXXV"), (b"", b"WW"), (b"e", b"ACX"), (b"f", b"DD")]
    assert replaced.content["records_with_problems"] == {"empty": 1, "invalid": 2, "left_out": 1, "nameless": 1}


def test_nothing_left_is_an_error(tmp_path: Path, build_corpus: Build) -> None:
    path = tmp_path / "a.fasta"
    path.write_bytes(b">a\nJJ\n>b\n")
    with pytest.raises(DataError, match="no sequence is left"):
        build_corpus(path, invalid="skip")
    assert not (tmp_path / "corpus").exists()


# ---- the folder ----


def test_the_same_command_again_verifies_and_does_nothing(tmp_path: Path, proteins: Records, build_corpus: Build, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "a.fasta", proteins)
    index = build_corpus(path, validation=0.1)
    before = {path.name: path.stat().st_mtime_ns for path in index.path.iterdir()}
    assert build_corpus(path, validation=0.1).sha256 == index.sha256
    assert "complete and verified" in capsys.readouterr().err
    assert {path.name: path.stat().st_mtime_ns for path in index.path.iterdir()} == before


@pytest.mark.parametrize(
    "change", [{"num_shards": 2}, {"validation": 0.2}, {"dedup": True}, {"names": False}, {"keep_rare": True}, {"invalid": "x"}, {"release": "r"}]
)
def test_another_corpus_is_never_overwritten(tmp_path: Path, proteins: Records, build_corpus: Build, change: dict[str, object]) -> None:
    path = write(tmp_path / "a.fasta", proteins[:50])
    before = folder_bytes(build_corpus(path, validation=0.1).path)
    with pytest.raises(IdentityError, match="another corpus"):
        build_corpus(path, **({"validation": 0.1} | change))
    assert folder_bytes(tmp_path / "corpus") == before


def test_other_input_is_another_corpus(tmp_path: Path, proteins: Records, build_corpus: Build) -> None:
    path = write(tmp_path / "a.fasta", proteins[:50])
    build_corpus(path)
    write(path, proteins[:51])
    with pytest.raises(IdentityError, match=r"content or the release note of a\.fasta"):
        build_corpus(path)


@pytest.mark.parametrize("damage", ["flip", "cut", "missing"])
def test_a_rerun_makes_only_damaged_shards_again(tmp_path: Path, proteins: Records, build_corpus: Build, damage: str) -> None:
    path = write(tmp_path / "a.fasta", proteins)
    index = build_corpus(path, validation=0.1, num_shards=3)
    before = folder_bytes(index.path)
    shard, other = index.path / "train-00001.h5", index.path / "train-00002.h5"
    kept = other.stat().st_mtime_ns
    data = bytearray(shard.read_bytes())
    if damage == "missing":
        shard.unlink()
    else:
        data[5000] ^= 1
        shard.write_bytes(data if damage == "flip" else data[:-1])
    build_corpus(path, validation=0.1, num_shards=3)
    assert folder_bytes(index.path) == before
    assert other.stat().st_mtime_ns == kept


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path, proteins: Records, build_corpus: Build) -> None:
    path = write(tmp_path / "a.fasta", proteins[:9])
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "thesis.tex").write_text("five years")
    with pytest.raises(ConfigError, match=r"thesis\.tex"):
        build_corpus(path)
    assert folder_bytes(tmp_path / "corpus") == {"thesis.tex": b"five years"}
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        build_corpus(path, name="file")


def test_an_empty_folder_is_used_and_kept(tmp_path: Path, proteins: Records, build_corpus: Build) -> None:
    (tmp_path / "corpus").mkdir()
    bad = tmp_path / "bad.fasta"
    bad.write_bytes(b">a\nJ\n")
    with pytest.raises(DataError):
        build_corpus(bad)
    assert folder_bytes(tmp_path / "corpus") == {}
    build_corpus(write(tmp_path / "a.fasta", proteins[:9]))


def test_a_missing_parent_folder_is_made(tmp_path: Path, proteins: Records, build_corpus: Build) -> None:
    assert build_corpus(write(tmp_path / "a.fasta", proteins[:9]), name="some/where/corpus").num_sequences == 9


def test_the_stage_prints_the_summary(tmp_path: Path, proteins: Records, capsys: pytest.CaptureFixture[str]) -> None:
    stage.run_stage("preprocess", preprocess_request(write(tmp_path / "a.fasta", proteins[:40]), out=tmp_path / "corpus"))
    printed = json.loads(capsys.readouterr().out)
    assert printed["sequences"] == 40
    assert printed["corpus"] == str(tmp_path / "corpus")


def test_the_python_loops_are_announced(tmp_path: Path, proteins: Records, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(kernel, "_c", None)
    stage.run_stage("preprocess", preprocess_request(write(tmp_path / "a.fasta", proteins[:40]), out=tmp_path / "corpus"))
    assert "using the Python loops" in capsys.readouterr().err
