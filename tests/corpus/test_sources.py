"""Which files are input, and which are refused before any work."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from prottrans_hpc.corpus.alphabet import Rules
from prottrans_hpc.corpus.fasta import read_records
from prottrans_hpc.corpus.sources import find_sources, inspect
from prottrans_hpc.errors import CheckpointError, DataError


def names(*inputs: Path) -> list[str]:
    return [source.path.name for source in find_sources(inputs)]


def write(path: Path, content: bytes = b">a\nMKV\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def test_folders_give_their_sequence_files_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("b.fasta", "a.fa.gz", "sub/c.FAA", "readme.md", "d.txt.xz", ".hidden.fasta", "sub/e.json.gz"):
        write(tmp_path / "in" / name)
    assert names(tmp_path / "in") == ["a.fa.gz", "b.fasta", "d.txt.xz", "c.FAA"]
    assert "2 others left (readme.md, e.json.gz)" in capsys.readouterr().err


def test_files_keep_the_order_given(tmp_path: Path) -> None:
    paths = [write(tmp_path / name) for name in ("z", "a", "m.anything")]
    assert names(*paths) == ["z", "a", "m.anything"]


def test_a_file_given_twice_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.fasta")
    link = tmp_path / "b.fasta"
    link.symlink_to(path)
    with pytest.raises(DataError, match="given twice"):
        find_sources([path, tmp_path / "." / "a.fasta"])
    with pytest.raises(DataError, match="given twice"):
        find_sources([path, link])


def test_what_is_not_there_is_no_input(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no input"):
        find_sources([tmp_path / "nothing.fasta"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="holds no sequence file"):
        find_sources([tmp_path / "empty"])


@pytest.mark.timeout(120)
def test_pipes_and_devices_are_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.fasta")
    for path in (tmp_path / "pipe.fasta", Path("/dev/zero"), Path("/dev/null")):
        with pytest.raises(DataError, match="pipe, socket or device"):
            find_sources([path])


@pytest.mark.timeout(120)
def test_a_pipe_that_takes_the_place_of_a_file_is_refused(tmp_path: Path) -> None:
    source = inspect(write(tmp_path / "a.fasta"))
    source.path.unlink()
    os.mkfifo(source.path)
    with pytest.raises(DataError, match="pipe"), source.open():
        pass


@pytest.mark.parametrize("content", [b"", b"\n\n", b" \r\n\t", b"\xef\xbb\xbf\n"])
def test_empty_files_are_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(DataError, match="is empty"):
        inspect(write(tmp_path / "a.fasta", content))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf_16_is_told_how_to_convert(tmp_path: Path, encoding: str) -> None:
    with pytest.raises(DataError, match="iconv"):
        inspect(write(tmp_path / "a.fasta", ">a\nMKV\n".encode(encoding)))


@pytest.mark.parametrize("content", [b"name,sequence\na,MKV\n", b'{"a": 1}\n', b"\n\n1 MKV\n", b"\x89PNG\r\n", b"@read\nACGT\n+\nIIII\n"])
def test_other_files_are_no_sequences(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(DataError, match="neither FASTA nor a sequence"):
        inspect(write(tmp_path / "a.csv", content))


def test_a_file_that_changes_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "a.fasta", b">a\nMKV\n>b\nMM\n")
    records = read_records([path], rules=Rules())
    next(records)
    with path.open("ab") as file:
        file.write(b">c\nWW\n")
    with pytest.raises(DataError, match="changed while it was read"):
        list(records)
