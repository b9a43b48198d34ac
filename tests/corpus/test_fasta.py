"""Files as records: any spelling of the same proteins reads the same, any division of a file sees each record once."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prottrans_hpc.corpus import fasta
from prottrans_hpc.corpus.alphabet import Rules
from prottrans_hpc.corpus.fasta import Record, lines_of_name, parse_source, read_blocks, read_records
from prottrans_hpc.corpus.kernel import BlockParser
from prottrans_hpc.corpus.sources import inspect
from prottrans_hpc.errors import DataError

from .conftest import Records, fasta_text, naive_parse


def write(folder: Path, content: bytes, name: str = "a.fasta") -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def read(path: Path, rules: Rules | None = None) -> Records:
    return [(record.name, record.residues) for record in read_records([path], rules=rules or Rules())]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("width", [60, 1_000_000])
def test_real_proteins_in_multi_line_and_crlf_files(tmp_path: Path, proteins: Records, end: str, width: int, each_kernel: str) -> None:
    assert read(write(tmp_path, fasta_text(proteins, width=width, end=end))) == proteins


def test_lower_case_blank_lines_stops_gaps_and_spaces(tmp_path: Path, each_kernel: str) -> None:
    text = b"\n  \n>one  first\n\nmkv lA*\n\n-.W\n> two\tx\nACD*\n\n\n>three"
    assert read(write(tmp_path, text + b"\nMM")) == [(b"one", b"MKVLAW"), (b"two", b"ACD"), (b"three", b"MM")]


def test_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    assert read(write(tmp_path, b"\xef\xbb\xbf>a\nMKV\n")) == [(b"a", b"MKV")]
    assert read(write(tmp_path, b"\xef\xbb\xbfMKV\nWWW\n", "b.txt")) == [(b"b.txt:1", b"MKV"), (b"b.txt:2", b"WWW")]


def test_rare_residues_become_x_unless_kept(tmp_path: Path, each_kernel: str) -> None:
    path = write(tmp_path, b">a\nMBOUZXbouzx\n")
    assert read(path) == [(b"a", b"MXXXXXXXXXX")]
    assert read(path, Rules(keep_rare=True)) == [(b"a", b"MBOUZXBOUZX")]


def test_one_sequence_a_line(tmp_path: Path, each_kernel: str) -> None:
    path = write(tmp_path, b"MKV\r\n\r\n  \nM K T A\nacd*\n", "b.txt")
    assert read(path) == [(b"b.txt:1", b"MKV"), (b"b.txt:4", b"MKTA"), (b"b.txt:5", b"ACD")]


def test_records_tell_their_line(tmp_path: Path) -> None:
    path = write(tmp_path, b"\n>a\nMK\nMK\n\n>b\nMM\n>c\nW\n")
    assert [(record.name, record.line, record.source) for record in read_records([path], rules=Rules())] == [
        (b"a", 2, str(path)),
        (b"b", 6, str(path)),
        (b"c", 8, str(path)),
    ]


def test_lines_go_on_over_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, proteins: Records) -> None:
    monkeypatch.setattr(fasta, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(fasta.read_blocks, "__kwdefaults__", {"block_bytes": 1000})
    text = fasta_text(proteins[:300])
    path = write(tmp_path, text)
    lines = [number for number, line in enumerate(text.split(b"\n"), 1) if line.startswith(b">")]
    assert [record.line for record in read_records([path], rules=Rules())] == lines
    assert lines_of_name(inspect(path), proteins[250][0]) == [lines[250]]


_PIECES = st.lists(st.sampled_from([b">a", b">bb x", b"\n", b"\r\n", b"M", b"MKVLAW", b" ", b">c\nMKV\n", b"\n>", b"*"]), min_size=1, max_size=25).map(
    lambda pieces: b">first\n" + b"".join(pieces)
)


@given(text=_PIECES, size=st.integers(1, 40), block=st.integers(2, 40), lines=st.booleans())
@settings(max_examples=400, deadline=None)
def test_ranges_of_a_file_see_every_record_once(tmp_path_factory: pytest.TempPathFactory, text: bytes, size: int, block: int, lines: bool) -> None:
    if lines:
        text = text.replace(b">", b"M")
    path = write(tmp_path_factory.mktemp("ranges"), text)
    source = inspect(path)
    assert source.lines == lines

    def raw(start: int, end: int | None) -> list[bytes]:
        with source.open() as stream:
            return [bytes(found.data) for found in read_blocks(stream, source, start=start, end=end, block_bytes=block)]

    assert b"".join(raw(0, None)) == text
    parts = [part for start in range(0, len(text), size) for part in raw(start, start + size)]
    assert b"".join(parts) == text
    if not lines:
        assert all(part.startswith(b">") for part in parts)


@pytest.mark.parametrize("head", [b"", b"\n\n \n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\n"])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 50])
def test_ranges_behind_blank_lines_and_a_byte_order_mark(tmp_path: Path, head: bytes, size: int) -> None:
    text = head + b">a\nMKV\n>b\nWW\n>c\nA"
    source = inspect(write(tmp_path, text))
    found: list[bytes] = []
    for start in range(0, len(text), size):
        for parsed, _ in parse_source(source, BlockParser(Rules().table(), lines=False), start=start, end=start + size):
            found += [parsed.residues[a:b].tobytes() for a, b in zip(parsed.offsets, parsed.offsets[1:], strict=False)]
    assert found == [b"MKV", b"WW", b"A"]


@given(text=_PIECES.filter(lambda text: b"\r\r" not in text), block=st.integers(2, 60))
@settings(max_examples=200, deadline=None)
def test_blocks_of_any_size_give_what_the_naive_parser_gives(tmp_path_factory: pytest.TempPathFactory, text: bytes, block: int) -> None:
    text = text.replace(b"M>", b"M\n>").replace(b"*>", b"*\n>").replace(b" >", b"\n>").replace(b"W>", b"W\n>").replace(b"\r\n", b"\n")
    source = inspect(write(tmp_path_factory.mktemp("blocks"), text))
    parser = BlockParser(Rules().table(), lines=False)
    found: Records = []
    with source.open() as stream:
        for part in read_blocks(stream, source, start=0, end=None, block_bytes=block):
            parsed, used = parser.parse(part.data)
            assert used == len(part.data)
            names, residues = parsed.names.tobytes(), parsed.residues.tobytes()
            for i in range(len(parsed)):
                found.append((names[parsed.name_offsets[i] : parsed.name_offsets[i + 1]], residues[parsed.offsets[i] : parsed.offsets[i + 1]]))
    naive = naive_parse(text)
    assert [name for name, _ in found] == [name for name, _ in naive]
    # The naive parser refuses nothing, so a '>' within a line is a letter to neither.
    assert [residues for _, residues in found if b">" not in text[1:]] == [residues for _, residues in naive if b">" not in text[1:]]


# ---- rules ----


def test_records_left_out_are_told_with_the_reason(tmp_path: Path, each_kernel: str) -> None:
    path = write(tmp_path, b">a\nMKV\n>b\nMJV\n>c\n\n>\nWW\n>e\nAC\n")
    skipped: list[tuple[Record, str]] = []
    kept = list(read_records([path], rules=Rules("skip"), on_skip=lambda record, reason: skipped.append((record, reason))))
    assert [record.name for record in kept] == [b"a", b"e"]
    assert [(record.line, reason) for record, reason in skipped] == [
        (3, "the character 'J' is no residue"),
        (5, "the record has no residues"),
        (7, "the record has no name"),
    ]
    kept = list(read_records([path], rules=Rules("x"), on_skip=lambda record, reason: skipped.append((record, reason))))
    assert [(record.name, record.residues) for record in kept] == [(b"a", b"MKV"), (b"b", b"MXV"), (b"a.fasta:7", b"WW"), (b"e", b"AC")]
    assert skipped[-1][0].name == b"c"


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        (b">a\nMKV\n>b x\nMK\nMJ\n", 5, "record 'b': the character 'J' is no residue"),
        (b">a\nMK1V\n", 2, "'1'"),
        (b">a\nMK\xe9V\n", 2, "byte 0xE9"),
        (b">a\nMK\x1bV\n", 2, "byte 0x1B"),
        (b">a\nMKV\n>b\n>c\nMM\n", 3, "record 'b': the record has no residues"),
        (b">a\nMKV\n>q", 3, "record 'q': the record has no residues"),
        (b">a\nMKV\n>\nMM\n", 3, "no name"),
        (b">a\nMKV\n> \x1b[2J\nMM\n", 3, "no name"),
        (b">a\nMK\x00V\n", 2, "NUL"),
        (b">a\nMKV>b\nMM\n", 2, "'>' stands within the sequence"),
        (b">a\rMKV\r>b\rMM\r", 1, "carriage return"),
        (b">" + b"M" * 10_001 + b"\nMM\n", 1, "newline behind the header missing"),
        (b"MKV\nMM>x\n", 2, "'>' stands within the sequence"),
        (b"MKV\n>x\nMM\n", 2, "'>' stands within the sequence"),
    ],
)
def test_what_is_wrong_is_named_with_file_line_and_record(tmp_path: Path, text: bytes, line: int, message: str, each_kernel: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(DataError) as caught:
        read(path)
    assert f"{path}, line {line}" in str(caught.value)
    assert message in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("text", [b">a\nMK\x00V\n", b">a\nMKV>b\nMM\n", b">a\rMKV\r", b">" + b"M" * 10_001 + b"\nM\n"])
@pytest.mark.parametrize("rule", ["x", "skip"])
def test_garbage_is_an_error_under_every_rule(tmp_path: Path, text: bytes, rule: str, each_kernel: str) -> None:
    with pytest.raises(DataError):
        read(write(tmp_path, text), Rules(rule))


@pytest.mark.parametrize("text", [b"  >a\nMK\n", b" \n  x>a\nMK\n"])
def test_text_before_the_first_header_names_line_and_byte(tmp_path: Path, text: bytes) -> None:
    with pytest.raises(DataError, match=r"line [12]"):
        read(write(tmp_path, text))


def test_a_record_too_long_to_be_a_protein_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fasta, "MAX_RECORD_BYTES", 1 << 22)
    with pytest.raises(DataError, match="is this a file of proteins"):
        read(write(tmp_path, b">a\n" + b"M" * (1 << 23)))


def test_titin_and_longer_are_fine(tmp_path: Path, each_kernel: str) -> None:
    giant = b"MKVLAWSTND" * 1_000_000
    assert read(write(tmp_path, b">giant\n" + giant + b"\n>b\nMM\n")) == [(b"giant", giant), (b"b", b"MM")]


@given(content=st.binary(max_size=300))
@settings(max_examples=300, deadline=None)
def test_any_bytes_are_records_or_a_data_error(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = write(tmp_path_factory.mktemp("any"), content)
    try:
        for record in read_records([path], rules=Rules("x")):
            assert record.residues.isalpha() and record.residues.isupper()
    except DataError as error:
        assert str(path) in str(error)
        assert str(error).isprintable()
