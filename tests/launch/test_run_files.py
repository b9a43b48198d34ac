"""Reading files that others write at the same time."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prottrans_hpc.launch import run_files
from prottrans_hpc.launch.run_files import GrowingFile, last_lines, last_records, read_records, tail


@given(
    st.lists(st.binary(max_size=12).map(lambda line: line.replace(b"\n", b" "))), st.integers(0, 30), st.sampled_from([b"", b"unfinished"]), st.integers(1, 40)
)
def test_the_tail_is_the_end_of_the_file(tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], count: int, rest: bytes, block: int) -> None:
    path = tmp_path_factory.mktemp("tail") / "log"
    content = b"".join(line + b"\n" for line in lines)
    path.write_bytes(content + rest)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_files, "_BLOCK", block)
        assert tail(path, count) == (lines[-count:] if count else [], rest, len(content))
        every = [*lines, rest] if rest else lines
        assert last_lines(path, count) == (every[-count:] if count else [])


def test_records_of_a_file_that_is_missing_or_cut(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    assert (read_records(path), last_records(path, 5), tail(path / "x", 3)) == ([], [], ([], b"", 0))
    path.write_text('{"step": 1}\n[2]\n{"step": 3}\n{"ste')
    assert read_records(path) == [{"step": 1}, {"step": 3}]
    assert last_records(path, 2) == [{"step": 3}]


def test_a_file_is_followed_from_before_it_exists_through_truncation_and_replacement(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log = GrowingFile(path)
    assert log.new_lines() == []
    path.write_bytes(b"one\ntw")
    assert log.new_lines() == [b"one"]
    with path.open("ab") as file:
        file.write(b"o\nthree")
    assert log.new_lines() == [b"two"]
    with path.open("r+b") as file:  # as copytruncate does
        file.truncate(0)
    assert log.new_lines() == []
    with path.open("ab") as file:
        file.write(b"after\n")
    assert log.new_lines() == [b"after"]
    with path.open("ab") as file:
        file.write(b"last of the old\nunfin")
    path.rename(tmp_path / "log.1")
    assert log.new_lines() == [b"last of the old"]
    path.write_bytes(b"new\n")
    assert log.new_lines() == [b"unfin", b"new"]
    with path.open("ab") as file:
        file.write(b"end")
    assert (log.new_lines(), log.unfinished_line(), log.unfinished_line()) == ([], [b"end"], [])
    log.close()


def test_following_begins_where_it_is_told(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"old\nnew\n")
    for start, expected in ((None, []), (0, [b"old", b"new"]), (4, [b"new"])):
        log = GrowingFile(path, start=start)
        assert log.new_lines() == expected
        log.close()
