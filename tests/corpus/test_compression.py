"""Compressed files: every format, every library, and no damage that goes unseen."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import lzma
from collections.abc import Callable
from pathlib import Path

import pytest

from prottrans_hpc.corpus import compression
from prottrans_hpc.corpus.alphabet import Rules
from prottrans_hpc.corpus.compression import Stream
from prottrans_hpc.corpus.fasta import read_records
from prottrans_hpc.corpus.sources import inspect
from prottrans_hpc.errors import DataError, ResourceError

from .conftest import Records, fasta_text


def _zstd(data: bytes) -> bytes:
    return pytest.importorskip("zstandard").ZstdCompressor().compress(data)  # type: ignore[no-any-return]


COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": _zstd}


@pytest.fixture(params=[*COMPRESSORS, "gz without isal"])
def compressed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Callable[[bytes], bytes]]:
    """A suffix and its compressor; once with the standard library instead of isal."""
    suffix, _, without = request.param.partition(" ")
    if without:
        monkeypatch.setitem(compression.DECODERS, "gzip", compression._Zlib)
    return suffix, COMPRESSORS[suffix]


Compressed = tuple[str, Callable[[bytes], bytes]]


def read(path: Path) -> Records:
    return [(record.name, record.residues) for record in read_records([path], rules=Rules())]


def write(folder: Path, content: bytes, suffix: str) -> Path:
    path = folder / f"a.fasta.{suffix}"
    path.write_bytes(content)
    return path


def test_every_format_reads_the_same(tmp_path: Path, proteins: Records, compressed: Compressed) -> None:
    suffix, compress = compressed
    assert read(write(tmp_path, compress(fasta_text(proteins)), suffix)) == proteins


def test_the_format_is_told_by_content_not_name(tmp_path: Path, proteins: Records, compressed: Compressed) -> None:
    assert read(write(tmp_path, compressed[1](fasta_text(proteins[:9])), "txt")) == proteins[:9]


def test_several_members_are_one_stream(tmp_path: Path, proteins: Records, compressed: Compressed) -> None:
    suffix, compress = compressed
    text = fasta_text(proteins[:100])
    parts = [text[:5000], text[5000 : len(text) // 2], b"", text[len(text) // 2 :]]
    assert read(write(tmp_path, b"".join(map(compress, parts)), suffix)) == proteins[:100]


def test_zero_padding_behind_the_end_is_allowed(tmp_path: Path, proteins: Records, compressed: Compressed) -> None:
    suffix, compress = compressed
    assert read(write(tmp_path, compress(fasta_text(proteins[:9])) + bytes(1024), suffix)) == proteins[:9]


def test_the_hash_is_that_of_the_file(tmp_path: Path, proteins: Records, compressed: Compressed) -> None:
    suffix, compress = compressed
    path = write(tmp_path, compress(fasta_text(proteins)) + bytes(3), suffix)
    with inspect(path).open(hashing=True) as stream:
        buffer = bytearray(1000)
        while stream.read_into(memoryview(buffer)):
            pass
    assert stream.sha256.hexdigest() == hashlib.sha256(path.read_bytes()).hexdigest()
    assert stream.num_bytes == path.stat().st_size


def test_a_file_cut_anywhere_is_an_error(tmp_path: Path, proteins: Records, compressed: Compressed) -> None:
    suffix, compress = compressed
    whole = compress(fasta_text(proteins[:150]))
    for cut in [*range(6, 40), *range(40, len(whole), 997), *range(len(whole) - 20, len(whole))]:
        path = write(tmp_path, whole[:cut], suffix)
        with pytest.raises(DataError) as caught:
            read(path)
        assert str(path) in str(caught.value), cut


def test_other_data_behind_the_end_are_an_error(tmp_path: Path, proteins: Records, compressed: Compressed) -> None:
    suffix, compress = compressed
    text = fasta_text(proteins[:9])
    for junk in (b"?", b">more\nMKV\n", b"\x1fjunk", b"junk" * 100_000):
        with pytest.raises(DataError, match=rf"{len(junk)} bytes that are no (gzip|zstd|bzip2|xz) data follow their end, after {len(text)} good bytes"):
            read(write(tmp_path, compress(text) + bytes(8) + junk, suffix))


def test_a_member_without_data_may_come_first(tmp_path: Path, proteins: Records, compressed: Compressed) -> None:
    suffix, compress = compressed
    assert read(write(tmp_path, compress(b"") + bytes(8) + compress(fasta_text(proteins[:9])), suffix)) == proteins[:9]


def test_skippable_zstd_frames_are_skipped(tmp_path: Path, proteins: Records) -> None:
    zstandard = pytest.importorskip("zstandard")
    skipped = b"\x52\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"hello"
    parts = [zstandard.compress(fasta_text(part)) for part in (proteins[:5], proteins[5:9])]
    assert read(write(tmp_path, parts[0] + skipped + parts[1] + skipped, "zst")) == proteins[:9]


def test_flipped_bytes_never_pass(tmp_path: Path, proteins: Records, compressed: Compressed) -> None:
    suffix, compress = compressed
    whole = compress(fasta_text(proteins[:60]))
    if suffix == "zst":
        whole = pytest.importorskip("zstandard").ZstdCompressor(write_checksum=True).compress(fasta_text(proteins[:60]))
    for at in range(len(whole) // 7, len(whole), 211):
        damaged = bytearray(whole)
        damaged[at] ^= 0x10
        path = write(tmp_path, bytes(damaged), suffix)
        try:
            assert read(path) == proteins[:60], at  # only an unused header bit may change nothing
        except DataError as error:
            assert str(path) in str(error)


def test_a_bomb_is_not_read_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compressed: Compressed) -> None:
    suffix, compress = compressed
    monkeypatch.setattr(compression, "_BOMB_BYTES", 1 << 20)
    monkeypatch.setattr(compression, "MAX_RATIO", 200)
    path = write(tmp_path, compress(b">a\n" + b"M" * (1 << 24)), suffix)
    with pytest.raises(DataError, match="200-fold"):
        read(path)


def test_no_call_gives_more_than_was_asked_for(tmp_path: Path, compressed: Compressed) -> None:
    suffix, compress = compressed
    path = write(tmp_path, compress(b">a\n" + b"MKV" * 100_000), suffix)
    with path.open("rb", buffering=0) as file:
        stream = Stream(path, inspect(path).compression, file)
        buffer, total = bytearray(777), 0
        while num := stream.read_into(memoryview(buffer)):
            assert num <= 777
            total += num
    assert total == 300_003


@pytest.mark.parametrize("magic", sorted(compression._FOREIGN))
def test_formats_that_are_not_read_are_named(tmp_path: Path, magic: bytes) -> None:
    with pytest.raises(DataError, match="unpack it first"):
        inspect(write(tmp_path, magic + bytes(100), "fasta"))


def test_zstd_without_its_package_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compression.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ResourceError, match=r"prottrans-hpc\[fast\]"):
        inspect(write(tmp_path, b"\x28\xb5\x2f\xfd" + bytes(20), "zst"))
