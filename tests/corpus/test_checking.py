"""Every changed byte of a corpus is found, and the damaged file named."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest

from prottrans_hpc import stage
from prottrans_hpc.corpus.index import INDEX, Index, read_index
from prottrans_hpc.corpus.shard import ShardSizes, create_shard, map_shard
from prottrans_hpc.errors import CheckpointError, DataError, ProttransError, exit_code

from .conftest import Build, Records, fasta_text


@pytest.fixture
def corpus(tmp_path: Path, proteins: Records, build_corpus: Build) -> Index:
    (tmp_path / "a.fasta").write_bytes(fasta_text(proteins[:120]))
    return build_corpus(tmp_path / "a.fasta", validation=0.1, num_shards=2)


def check(*paths: Path, as_json: bool = False) -> None:
    stage.run_stage("corpus-check", {"corpora": [str(path) for path in paths], "json": as_json})


def test_a_whole_corpus_is_whole(corpus: Index, capsys: pytest.CaptureFixture[str]) -> None:
    check(corpus.path)
    assert "whole, 120 sequences" in capsys.readouterr().out
    check(corpus.path, as_json=True)
    assert json.loads(capsys.readouterr().out)["whole"] is True


@pytest.mark.parametrize("file", ["train-00000.h5", "train-00001.h5", "validation-00000.h5", INDEX])
def test_a_flipped_bit_anywhere_is_found(corpus: Index, file: str) -> None:
    path = corpus.path / file
    original = path.read_bytes()
    generator = random.Random(file)
    places = [0, 1, len(original) - 2, len(original) - 1, *(generator.randrange(len(original)) for _ in range(60))]
    for at in places:
        damaged = bytearray(original)
        damaged[at] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(DataError) as caught:
            check(corpus.path)
        assert str(path) in str(caught.value), at
        assert exit_code(caught.value) == 65
    path.write_bytes(original)
    check(corpus.path)


def test_a_cut_missing_or_exchanged_shard_is_found(corpus: Index) -> None:
    first, second = corpus.path / "train-00000.h5", corpus.path / "train-00001.h5"
    data = first.read_bytes()
    first.write_bytes(data[:-1])
    with pytest.raises(DataError, match=rf"{first} has {len(data) - 1} bytes, {len(data)} were written"):
        check(corpus.path)
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)
    with pytest.raises(DataError) as caught:
        check(corpus.path)
    assert str(first) in str(caught.value) and str(second) in str(caught.value)
    first.unlink()
    with pytest.raises(DataError, match=f"{first} is missing"):
        check(corpus.path)


def test_damage_is_listed_as_json_too(corpus: Index, capsys: pytest.CaptureFixture[str]) -> None:
    (corpus.path / "train-00000.h5").unlink()
    with pytest.raises(DataError):
        check(corpus.path, as_json=True)
    printed = json.loads(capsys.readouterr().out)
    assert printed["whole"] is False
    assert printed["problems"] == [f"{corpus.path}/train-00000.h5 is missing"]


def test_every_corpus_gets_its_verdict_whatever_the_others_are(tmp_path: Path, corpus: Index, capsys: pytest.CaptureFixture[str]) -> None:
    whole, damaged, none = tmp_path / "whole", corpus.path, tmp_path / "nothing"
    shutil.copytree(corpus.path, whole)
    for file in ("train-00000.h5", "validation-00000.h5"):
        (damaged / file).unlink()
    for order in ([damaged, none, whole], [none, whole, damaged]):
        with pytest.raises(ProttransError) as caught:
            check(*order)
        assert exit_code(caught.value) == 65
        for said in (f"{damaged}/train-00000.h5 is missing", f"{damaged}/validation-00000.h5 is missing", f"{none} is no corpus"):
            assert said in str(caught.value)
        told = capsys.readouterr().out
        assert told.startswith(f"{whole}: whole, 120 sequences") and len(told.splitlines()) == 1
    with pytest.raises(CheckpointError, match="is no corpus") as missing:
        check(none, whole)
    assert exit_code(missing.value) == 66
    assert "whole, 120 sequences" in capsys.readouterr().out
    with pytest.raises(ProttransError):
        check(none, whole, damaged, as_json=True)
    verdicts = json.loads(capsys.readouterr().out)
    assert [(verdict["corpus"], verdict["whole"], len(verdict["problems"])) for verdict in verdicts] == [
        (str(none), False, 1),
        (str(whole), True, 0),
        (str(damaged), False, 2),
    ]


def test_no_corpus_is_no_input(tmp_path: Path, corpus: Index) -> None:
    for path in (tmp_path / "nothing", tmp_path, tmp_path / "a.fasta"):
        with pytest.raises(CheckpointError, match="is no corpus") as caught:
            check(path)
        assert exit_code(caught.value) == 66


def test_an_unfinished_corpus_says_so(tmp_path: Path) -> None:
    (tmp_path / "corpus" / ".work").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="run the same command again"):
        read_index(tmp_path / "corpus")


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.update(sequences=1),
        lambda content: content["splits"]["train"].update(residues=1),
        lambda content: content["splits"]["train"]["shards"][0].update(file="../../etc/passwd"),
        lambda content: content["splits"]["train"]["shards"][0].update(sequences="many"),
        lambda content: content["splits"].pop("validation"),
        lambda content: content.pop("sha256"),
        lambda content: content.update(format=2),
    ],
)
def test_an_index_that_was_edited_is_damaged(corpus: Index, change: object) -> None:
    path = corpus.path / INDEX
    content = json.loads(path.read_text())
    change(content)  # type: ignore[operator]
    path.write_text(json.dumps(content, indent=1) + "\n")
    with pytest.raises(DataError, match=INDEX):
        read_index(corpus.path)


def test_a_sealed_index_with_a_foreign_file_name_is_refused(corpus: Index) -> None:
    from prottrans_hpc.corpus.index import render_index

    content = json.loads((corpus.path / INDEX).read_text())
    content["splits"]["train"]["shards"][0]["file"] = "../secret"
    (corpus.path / INDEX).write_bytes(render_index(content))
    with pytest.raises(DataError, match="is called"):
        read_index(corpus.path)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b"[" * 100_000, b"\xff\xfe"])
def test_an_index_that_is_no_index_is_damaged(corpus: Index, text: bytes) -> None:
    (corpus.path / INDEX).write_bytes(text)
    with pytest.raises(DataError, match="is damaged"):
        read_index(corpus.path)


# ---- shards by themselves ----


def test_a_shard_is_mapped_where_hdf5_put_it(corpus: Index) -> None:
    path = corpus.shard_path(corpus.splits["train"].shards[0])
    shard = map_shard(path)
    with h5py.File(path) as file:
        assert dict(file.attrs) == {"format": 1}
        for name in ("residues", "offsets", "names", "name_offsets"):
            assert (file[name][:] == getattr(shard, name)).all()
            assert file[name].chunks is None and file[name].compression is None
            assert file[name].id.get_offset() % 64 == 0


def test_equal_shards_have_equal_bytes_at_any_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = []
    for k in range(2):
        path = tmp_path / f"{k}.h5"
        create_shard(path, ShardSizes(3, 1000, 20))
        files.append(path.read_bytes())
        monkeypatch.setattr("time.time", lambda: 2e9)
    assert files[0] == files[1]


@pytest.mark.parametrize("keep", [0, 100, 2000, 3000])
def test_a_cut_shard_is_a_data_error(tmp_path: Path, corpus: Index, keep: int) -> None:
    path = tmp_path / "cut.h5"
    path.write_bytes(corpus.shard_path(corpus.splits["train"].shards[0]).read_bytes()[:keep])
    with pytest.raises(DataError, match=r"cut\.h5"):
        map_shard(path)


def test_other_hdf5_files_are_no_shards(tmp_path: Path) -> None:
    path = tmp_path / "other.h5"
    with h5py.File(path, "w") as file:
        file["residues"] = np.zeros(3, np.float32)
        file.attrs["format"] = 1
    with pytest.raises(DataError, match="is damaged"):
        map_shard(path)
    with h5py.File(path, "w") as file:
        file.attrs["format"] = 9
    with pytest.raises(DataError, match="format 9"):
        map_shard(path)
    with pytest.raises(DataError, match="is missing"):
        map_shard(tmp_path / "nothing.h5")


def test_a_copied_corpus_is_still_whole(tmp_path: Path, corpus: Index) -> None:
    shutil.copytree(corpus.path, tmp_path / "copy")
    check(tmp_path / "copy")
    assert read_index(tmp_path / "copy").sha256 == corpus.sha256
