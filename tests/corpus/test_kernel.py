"""The C extension, on both of its paths, and the Python loops give the same bytes; and those of a plain parser."""

from __future__ import annotations

import hashlib
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prottrans_hpc.corpus import kernel, kernel_python
from prottrans_hpc.corpus.alphabet import Rules
from prottrans_hpc.corpus.kernel import BlockParser, Parsed

from .conftest import Records, fasta_text, naive_parse

needs_c = pytest.mark.skipif(kernel._c is None, reason="the C extension is not built here")

_TABLES = [Rules().table(), Rules(keep_rare=True).table()]
# Letters, everything that has a rule of its own, and a few bytes that have none.
_LINE = st.text(alphabet="ACDEFGHIKLMNPQRSTVWYXacdxBZOUbj*-. \tJ1>\r\x00\xe9\x80", max_size=150).map(lambda text: text.encode("latin-1"))
_HEADER = st.text(alphabet="ab|. \t\r>\x01\xe9", max_size=12).map(lambda text: b">" + text.encode("latin-1"))
_FASTA = st.lists(st.tuples(_HEADER, st.lists(_LINE, max_size=4)), min_size=1, max_size=8).map(
    lambda records: b"\n".join(b"\n".join([header, *lines]) for header, lines in records)
)


def test_asking_which_loops_are_in_use_changes_nothing(each_kernel: str) -> None:
    said = kernel.implementation()
    assert kernel.implementation() == said
    assert each_kernel == "C best" or said == {"C portable": "C (portable)", "Python": "Python"}[each_kernel]


def everything(text: bytes, table: bytes, *, lines: bool, best: bool | None) -> tuple[list[list[int]], list[int]]:
    """All that a parser says of a text, block by block as it is used."""
    if best is not None:
        assert kernel._c is not None
        kernel._c.select_path(best)
    parser = BlockParser(table, lines=lines)
    if best is None:
        parsed: Parsed = kernel_python.parse_block(memoryview(text), table, lines, parser.counted, Parsed)
    else:
        parsed, used = parser.parse(memoryview(text))
        assert used == len(text)
    fields = (parsed.residues, parsed.offsets, parsed.names, parsed.name_offsets, parsed.starts, parsed.invalid)
    return [field.tolist() for field in fields], parser.counted.tolist()


def assert_all_equal(text: bytes, table: bytes, *, lines: bool) -> None:
    expected = everything(text, table, lines=lines, best=None)
    if kernel._c is not None:
        assert everything(text, table, lines=lines, best=False) == expected
        assert everything(text, table, lines=lines, best=True) == expected


@given(text=_FASTA, table=st.sampled_from(_TABLES))
@settings(max_examples=400, deadline=None)
def test_fasta_parses_equally_on_every_path(text: bytes, table: bytes) -> None:
    assert_all_equal(text, table, lines=False)


@given(text=st.lists(_LINE, max_size=12).map(b"\n".join), table=st.sampled_from(_TABLES))
@settings(max_examples=300, deadline=None)
def test_lines_parse_equally_on_every_path(text: bytes, table: bytes) -> None:
    assert_all_equal(text, table, lines=True)


@given(text=st.binary(max_size=400).map(lambda data: b">" + data))
@settings(max_examples=300, deadline=None)
def test_any_bytes_parse_equally_on_every_path(text: bytes) -> None:
    assert_all_equal(text, _TABLES[0], lines=False)


@given(text=st.lists(st.text("ACDWYacBUZOX*- \t", max_size=200), min_size=1, max_size=9), end=st.sampled_from(["\n", "\r\n"]), keep=st.booleans())
@settings(max_examples=200, deadline=None)
def test_the_naive_parser_agrees(text: list[str], end: str, keep: bool) -> None:
    fasta = "".join(f">n{i} d{end}{line[:70]}{end}{line[70:]}{end}" for i, line in enumerate(text)).encode()
    fields, counted = everything(fasta, _TABLES[keep], lines=False, best=None)
    residues, offsets, names, name_offsets = (np.array(field, np.int64) for field in fields[:4])
    found = [
        (names[a:b].astype("u1").tobytes(), residues[c:d].astype("u1").tobytes())
        for (a, b), (c, d) in zip(pairwise(name_offsets), pairwise(offsets), strict=True)
    ]
    assert found == naive_parse(fasta, keep_rare=keep)
    rare = sum(line.upper().count(letter) for line in text for letter in "BOUZ")
    assert sum(counted[ord(letter)] + counted[ord(letter.lower())] for letter in "BOUZ") == (0 if keep else rare)
    assert_all_equal(fasta, _TABLES[keep], lines=False)


@pytest.mark.parametrize("width", [1, 59, 60, 63, 64, 65, 128, 10_000_000])
def test_real_proteins_at_any_line_width(proteins: Records, width: int, each_kernel: str) -> None:
    text = fasta_text(proteins[:200], width=width)
    parsed, used = BlockParser(Rules().table(), lines=False).parse(memoryview(text))
    assert used == len(text)
    assert parsed.residues.tobytes() == b"".join(residues for _, residues in proteins[:200])
    assert parsed.names.tobytes() == b"".join(name for name, _ in proteins[:200])


@needs_c
def test_more_records_than_fit_in_one_go_are_taken_in_several() -> None:
    text = b">a\nM\n" * ((1 << 16) + 5)
    parser = BlockParser(Rules().table(), lines=False)
    parsed, used = parser.parse(memoryview(text))
    assert len(parsed) == 1 << 16
    rest, rest_used = parser.parse(memoryview(text)[used:])
    assert (len(rest), used + rest_used) == (5, len(text))


@needs_c
def test_a_parser_uses_its_buffers_again() -> None:
    parser = BlockParser(Rules().table(), lines=False)
    first, _ = parser.parse(memoryview(b">a\nMKV\n"))
    address = first.residues.ctypes.data
    second, _ = parser.parse(memoryview(b">b\nWW\n"))
    assert second.residues.ctypes.data == address
    assert second.residues.tobytes() == b"WW"


def test_a_block_of_fasta_begins_with_a_header(each_kernel: str) -> None:
    with pytest.raises(ValueError, match="must begin with '>'"):
        BlockParser(Rules().table(), lines=False).parse(memoryview(b"MKV\n"))


@needs_c
def test_small_buffers_are_refused_and_never_overrun() -> None:
    assert kernel._c is not None
    table, longs = Rules().table(), [np.zeros(3, np.int64) for _ in range(4)]
    with pytest.raises(ValueError, match="too small"):
        kernel._c.parse_block(b">a\nMKV\n", table, False, bytearray(8), longs[0], bytearray(8), longs[1], longs[2][:2], longs[3], np.zeros(256, np.int64))


# ---- digest and count ----


@given(messages=st.lists(st.binary(max_size=700), max_size=30))
@settings(max_examples=150, deadline=None)
def test_digests_are_those_of_hashlib_on_every_path(messages: list[bytes]) -> None:
    data = np.frombuffer(b"".join(messages), np.uint8)
    offsets = np.cumsum([0, *map(len, messages)])
    expected = b"".join(hashlib.blake2b(message, digest_size=16, person=kernel.PERSON).digest() for message in messages)
    for best in (False, True) if kernel._c is not None else (True,):
        if kernel._c is not None:
            kernel._c.select_path(best)
        assert kernel.digest(data, offsets).tobytes() == expected
    out = np.empty((len(messages), 2), "<u8")
    kernel_python.digest(data, offsets, kernel.PERSON, out)
    assert out.tobytes() == expected


@pytest.mark.parametrize("length", [0, 1, 127, 128, 129, 255, 256, 257, 100_000])
def test_digests_at_the_borders_of_blocks(length: int, each_kernel: str) -> None:
    data = np.arange(length, dtype=np.int64).astype(np.uint8)
    assert kernel.digest(data, np.array([0, length])).tobytes() == hashlib.blake2b(data.tobytes(), digest_size=16, person=kernel.PERSON).digest()


@needs_c
@pytest.mark.parametrize("offsets", [[0, 5, 3, 6], [0, 7], [-1, 3]])
def test_digest_refuses_offsets_outside_the_data(offsets: list[int]) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        kernel.digest(np.zeros(6, np.uint8), np.array(offsets))


@given(data=st.binary(max_size=300))
def test_count_counts(data: bytes) -> None:
    expected = np.bincount(np.frombuffer(data, np.uint8), minlength=256)
    assert (kernel.count(np.frombuffer(data, np.uint8)) == expected).all()


# ---- gather ----


@given(data=st.data(), residues=st.binary(min_size=1, max_size=500))
@settings(max_examples=150, deadline=None)
def test_gather_is_a_look_up_of_every_span(data: st.DataObject, residues: bytes) -> None:
    table = bytes(data.draw(st.permutations(range(256))))
    spans = data.draw(st.lists(st.tuples(st.integers(0, len(residues)), st.integers(0, len(residues))).map(sorted), max_size=10))
    starts, lengths = np.array([a for a, _ in spans], np.int64), np.array([b - a for a, b in spans], np.int64)
    out_starts = np.cumsum([2, *(lengths[:-1] + 1)])[: len(spans)].astype(np.int64)
    size = int(out_starts[-1] + lengths[-1]) + 3 if spans else 3
    expected = np.full(size, -7)
    for start, length, to in zip(starts, lengths, out_starts, strict=True):
        expected[to : to + length] = [table[byte] for byte in residues[start : start + length]]
    flat = np.frombuffer(residues, np.uint8)
    implementations = [kernel_python.gather]
    for best in (False, True) if kernel._c is not None else ():
        kernel._c.select_path(best)  # type: ignore[union-attr]
        out = np.full(size, -7)
        kernel.gather(flat, starts, lengths, table, out, out_starts)
        assert (out == expected).all()
    out = np.full(size, -7)
    implementations[0](flat, starts, lengths, table, out, out_starts)
    assert (out == expected).all()


@pytest.mark.parametrize(
    ("start", "length", "to"),
    [(0, 11, 0), (5, 6, 0), (-1, 2, 0), (0, 2, 7), (0, 2, -1), (0, -1, 0), (2**62, 2**62, 0), (11, 0, 0), (0, 9, 0)],
)
def test_gather_refuses_spans_outside_their_arrays(start: int, length: int, to: int, each_kernel: str) -> None:
    spans = [np.array([value], np.int64) for value in (start, length, to)]
    with pytest.raises(ValueError, match="gather"):
        kernel.gather(np.zeros(10, np.uint8), spans[0], spans[1], bytes(256), np.zeros(8, np.int64), spans[2])


def test_gather_refuses_other_types(each_kernel: str) -> None:
    one = np.zeros(1, np.int64)
    with pytest.raises(ValueError, match="int64"):
        kernel.gather(np.zeros(4, np.uint8), one.astype(np.int32), one, bytes(256), one, one)
    with pytest.raises(ValueError, match="gather"):
        kernel.gather(np.zeros(4, np.uint8), one, np.zeros(2, np.int64), bytes(256), one, one)


def test_gather_reads_a_mapped_file(tmp_path: object, each_kernel: str) -> None:
    from pathlib import Path

    path = Path(str(tmp_path)) / "residues"
    path.write_bytes(b"MKVLAW" * 1000)
    out = np.zeros(600, np.int64)
    table = bytes(255 - byte for byte in range(256))
    kernel.gather(np.memmap(path, np.uint8, "r"), np.array([6]), np.array([600]), table, out, np.array([0]))
    assert out.tolist() == [255 - byte for byte in b"MKVLAW" * 100]


# ---- collect ----


@given(data=st.binary(max_size=100), cuts=st.lists(st.tuples(st.integers(0, 100), st.integers(0, 100)), max_size=12))
def test_collect_joins_spans_on_every_path(data: bytes, cuts: list[tuple[int, int]]) -> None:
    spans = [(min(a, b, len(data)), min(max(a, b), len(data))) for a, b in cuts]
    firsts, lasts = np.array([a for a, _ in spans], np.int64), np.array([b for _, b in spans], np.int64)
    expected = b"".join(data[a:b] for a, b in spans)
    for function in (kernel.collect, kernel_python.collect):
        out = np.zeros(len(expected) + 3, np.uint8)
        function(np.frombuffer(data, np.uint8), firsts, lasts, out)
        assert out.tobytes() == expected + bytes(3)


@pytest.mark.parametrize(("first", "last", "room"), [(0, 11, 20), (-1, 3, 20), (5, 4, 20), (0, 5, 4), (2**62, 2**62 + 1, 20)])
def test_collect_refuses_spans_outside(first: int, last: int, room: int, each_kernel: str) -> None:
    with pytest.raises(ValueError, match="collect"):
        kernel.collect(np.zeros(10, np.uint8), np.array([first]), np.array([last]), np.zeros(room, np.uint8))
