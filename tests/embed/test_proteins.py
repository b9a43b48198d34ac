"""The input in windows: nothing lost, memory bounded, a change noticed."""

from __future__ import annotations

import random
import tracemalloc
from collections import Counter

import pytest

from prottrans_hpc.corpus import sorted_runs
from prottrans_hpc.embed import proteins
from prottrans_hpc.embed.options import Options
from prottrans_hpc.embed.proteins import Protein, read_windows, take_census
from prottrans_hpc.embed.records import open_input
from prottrans_hpc.errors import CheckpointError, DataError


def some(num, *, length=10, name="p"):
    return [Protein(f"{name}{i}".encode(), b"A" * length, None) for i in range(num)]


def options(path, tmp_path, invalid="error"):
    return Options(tmp_path, (path,), tmp_path / "o.h5", False, True, "fp32", 100, "cpu", invalid, False)


@pytest.mark.parametrize(("residues", "count"), [(35, 100), (1_000, 3), (10, 1)])
def test_windows_hold_every_protein_once_in_order(monkeypatch, residues, count, tmp_path):
    monkeypatch.setattr(proteins, "WINDOW_RESIDUES", residues)
    monkeypatch.setattr(proteins, "WINDOW_PROTEINS", count)
    wanted = some(20)
    census = take_census(lambda: wanted, tmp_path)
    windows = list(read_windows(lambda: wanted, census))
    assert [name for window in windows for name in window.names] == [protein.name for protein in wanted]
    assert [window.index for window in windows] == list(range(len(windows)))
    assert max(len(window.names) for window in windows) == min(count, -(-residues // 10))
    assert (census.num_proteins, census.num_residues, census.num_sound) == (20, 200, 20)


def test_an_input_that_changes_between_two_readings_is_an_error(tmp_path):
    census = take_census(lambda: some(5), tmp_path)
    for changed in (some(4), some(6), some(5, name="q"), [*some(4), Protein(b"p4", b"A" * 9 + b"C", None)], [*some(4), Protein(b"p4", b"A" * 10, "odd")]):
        with pytest.raises(DataError, match="changed while it was read"):
            list(read_windows(lambda changed=changed: changed, census))


def test_the_digest_cannot_be_fooled_by_moving_a_border(tmp_path):
    assert take_census(lambda: [Protein(b"ab", b"C", None)], tmp_path).sha256 != take_census(lambda: [Protein(b"a", b"bC", None)], tmp_path).sha256


def test_names_that_occur_twice_are_warned_of_and_escaped(capsys, tmp_path):
    twice = Protein("x\u202ey".encode(), b"A", None)
    take_census(lambda: [*some(3), twice, *some(1, name="z"), twice], tmp_path)
    said = capsys.readouterr().err
    assert "1 name occurs more than once, the first is x\\u202ey" in said
    take_census(lambda: some(3), tmp_path)
    assert "more than once" not in capsys.readouterr().err


@pytest.mark.parametrize("seed", range(5))
def test_equal_names_are_found_among_more_than_memory_holds(monkeypatch, capsys, tmp_path, seed):
    monkeypatch.setattr(sorted_runs, "ROWS_PER_RUN", 100)
    monkeypatch.setattr(proteins, "WINDOW_PROTEINS", 30)
    generator = random.Random(seed)
    names = [b"%d" % generator.randrange(5000) for _ in range(1000)]
    take_census(lambda: (Protein(name, b"A", None) for name in names), tmp_path)
    counts = Counter(names)
    first = next(name for name in names if counts[name] > 1).decode()
    said = f"{sum(num > 1 for num in counts.values())} names occur more than once, the first is {first};"
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_memory_does_not_grow_with_the_proteins(monkeypatch, tmp_path):
    monkeypatch.setattr(sorted_runs, "ROWS_PER_RUN", 4096)
    peaks = []
    for num in (20_000, 80_000):
        tracemalloc.start()
        take_census(lambda num=num: (Protein(b"%d" % i, b"A", None) for i in range(num)), tmp_path)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # The borders of a run are 32 KiB; the hashes alone would be 40 bytes a protein.
    assert peaks[1] - peaks[0] < 60_000 / 4096 * 50_000


FASTA = ">good one\nMKV*\n>empty\n\n>odd\nMKJV\n>long\nMKVMKVMKVMKV\n>rare\nmkub\n>\nMK\n>last\n\n"
REASONS = {
    b"empty": "the record has no residues",
    b"odd": "the character 'J' is no residue",
    b"long": "12 residues, but the model's position table holds 10 at most",
    b"last": "the record has no residues",
}


@pytest.mark.parametrize("invalid", ["error", "skip", "x"])
def test_odd_records_stay_in_their_place_with_a_reason(tmp_path, invalid):
    path = tmp_path / "in.fasta"
    path.write_text(FASTA)
    found = list(open_input(options(path, tmp_path, invalid), 10)())
    assert [protein.name for protein in found] == [b"good", b"empty", b"odd", b"long", b"rare", b"in.fasta:11", b"last"]
    expected = [None, *(REASONS[name] for name in (b"empty", b"odd", b"long")), None, "the record has no name", REASONS[b"last"]]
    if invalid == "x":
        expected[2] = expected[5] = None
    assert [protein.problem for protein in found] == expected
    assert (found[0].residues, found[4].residues) == (b"MKV", b"MKXX")


def test_a_missing_or_damaged_file_is_an_error_of_the_whole(tmp_path):
    with pytest.raises(CheckpointError, match=r"missing\.fasta"):
        open_input(options(tmp_path / "missing.fasta", tmp_path), 10)
    for content in (b"", b"\x00\x01\x02", b">a\nMK\x00V\n", b">a\nMK>b\nMV\n", b"\x1f\x8b\x08broken"):
        path = tmp_path / "bad.fasta"
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"bad\.fasta"):
            list(open_input(options(path, tmp_path), 10)())
