"""Reading: what comes out of the mapped shards is what the FASTA file holds, and a damaged shard is named."""

import dataclasses
import shutil

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prottrans_hpc.corpus import kernel
from prottrans_hpc.corpus.index import read_index
from prottrans_hpc.corpus.reader import Corpus
from prottrans_hpc.corpus.samples import Samples, concatenate, whole_sequences
from prottrans_hpc.errors import CheckpointError, DataError

TABLE = bytes(i ^ 0x55 for i in range(256))
"""Any table will do that tells all letters apart."""


@pytest.fixture(scope="module")
def corpus(small_corpus):
    return Corpus(read_index(small_corpus))


@pytest.fixture(scope="module")
def sequences(small_corpus):
    """The training sequences, read through h5py one by one."""
    found = []
    for path in sorted(small_corpus.glob("train-*.h5")):
        with h5py.File(path) as file:
            offsets, residues = file["offsets"][:], file["residues"][:]
            found += [residues[start:end].tobytes() for start, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)]
    return found


@pytest.fixture
def copy(small_corpus, tmp_path):
    """A corpus that a test may damage."""
    return shutil.copytree(small_corpus, tmp_path / "copy")


def gather(corpus, samples):
    out_starts = np.cumsum(samples.lengths) - samples.lengths
    out = np.full(int(samples.lengths.sum()), -1, np.int64)
    corpus.gather(samples, TABLE, out, out_starts)
    return [out[start : start + length] for start, length in zip(out_starts.tolist(), samples.lengths.tolist(), strict=True)]


def test_the_corpus_holds_the_proteins_of_the_fasta_file(corpus, sequences, small_corpus, small_fasta):
    validation = Corpus(read_index(small_corpus), "validation")
    assert corpus.num_sequences == len(sequences) and corpus.num_sequences + validation.num_sequences == 600
    assert len(corpus.index.splits["train"].shards) == 2, "the tests below need more than one shard"
    assert corpus.num_residues == sum(map(len, sequences))
    assert corpus.lengths.tolist() == [len(sequence) for sequence in sequences]
    proteins = {"".join(record.split("\n")[1:]).encode() for record in small_fasta.read_text().split(">")[1:]}
    assert sum(sequence in proteins for sequence in sequences) > 0.9 * len(sequences)  # B, Z, U and O became X in the others


@settings(max_examples=50)
@given(data=st.data(), loops=st.sampled_from(["best", "portable", "Python"]))
def test_any_stretches_in_any_order_across_shards(corpus, sequences, data, loops):
    ids = np.array(data.draw(st.lists(st.integers(0, len(sequences) - 1), min_size=1, max_size=60)), np.int64)
    assert corpus.lengths_of(ids).tolist() == [len(sequences[i]) for i in ids]
    starts = np.array([data.draw(st.integers(0, len(sequences[i]))) for i in ids], np.int64)
    lengths = np.array([data.draw(st.integers(0, len(sequences[i]) - start)) for i, start in zip(ids, starts, strict=True)], np.int64)
    samples = Samples(np.zeros(len(ids), np.int64), ids, starts, lengths)
    with pytest.MonkeyPatch.context() as patch:
        if loops == "Python":
            patch.setattr(kernel, "_c", None)
        elif kernel._c is not None:
            kernel._c.select_path(loops == "best")
        gathered = gather(corpus, samples)
    if kernel._c is not None:
        kernel._c.select_path(True)
    for i, start, length, tokens in zip(ids, starts, lengths, gathered, strict=True):
        assert tokens.astype(np.uint8).tobytes() == sequences[i][start : start + length].translate(TABLE)


def test_gaps_between_sequences_are_left_alone(corpus, sequences):
    ids = np.array([3, 500, 4])
    lengths = corpus.lengths_of(ids)
    out_starts = np.cumsum(lengths) - lengths + 2 * np.arange(1, 4)
    out = np.full(int(lengths.sum()) + 8, -7, np.int64)
    corpus.gather(whole_sequences(ids, lengths, epoch=0), TABLE, out, out_starts)
    assert np.count_nonzero(out == -7) == 8 and out[0] == out[1] == out[-1] == -7


def test_nothing_is_read_before_it_is_needed(small_corpus):
    corpus = Corpus(read_index(small_corpus))
    assert corpus._mapped == {}
    corpus.lengths_of(np.array([corpus.num_sequences - 1]))
    assert list(corpus._mapped) == [1]
    assert corpus.lengths_of(np.zeros(0, np.int64)).shape == (0,)


def test_samples_are_taken_and_joined_in_order(corpus):
    samples = whole_sequences(np.arange(10), corpus.lengths_of(np.arange(10)), epoch=4)
    parts = [samples.take(slice(0, 3)), samples.take(np.arange(3, 10))]
    joined = concatenate(parts)
    for field in dataclasses.fields(samples):
        assert np.array_equal(getattr(joined, field.name), getattr(samples, field.name))
    assert len(joined) == 10 and set(joined.epochs.tolist()) == {4}


def test_an_unknown_split_lists_the_known_ones(small_corpus):
    with pytest.raises(CheckpointError, match="train, validation"):
        Corpus(read_index(small_corpus), "test")


def test_a_missing_shard_is_named_at_once(copy):
    (copy / "train-00001.h5").unlink()
    with pytest.raises(DataError, match=r"train-00001\.h5 is missing"):
        Corpus(read_index(copy))


@pytest.mark.parametrize("change", [-1, 1, -5000])
def test_a_shard_of_another_size_is_named_at_once(copy, change):
    shard = copy / "train-00000.h5"
    size = shard.stat().st_size
    with shard.open("r+b") as file:
        file.truncate(size + change)
    with pytest.raises(DataError, match=rf"train-00000\.h5 has {size + change} bytes, the index says {size}"):
        Corpus(read_index(copy))


def test_swapped_shards_are_named(copy):
    """Two files of one size: the size says nothing, the counts inside do."""
    one, other = copy / "train-00000.h5", copy / "train-00001.h5"
    index = read_index(copy)
    one.rename(copy / "aside")
    other.rename(one)
    (copy / "aside").rename(other)
    shards = index.splits["train"].shards
    same_sizes = tuple(dataclasses.replace(shard, num_bytes=(copy / shard.file).stat().st_size) for shard in shards)
    index = dataclasses.replace(index, splits={"train": dataclasses.replace(index.splits["train"], shards=same_sizes)})
    with pytest.raises(DataError, match=r"train-00000\.h5 is not the shard of the index"):
        Corpus(index).lengths_of(np.arange(5))


def test_a_file_that_is_no_shard_is_named(copy):
    shard = copy / "train-00000.h5"
    shard.write_bytes(b"\0" * shard.stat().st_size)
    with pytest.raises(DataError, match=r"train-00000\.h5"):
        Corpus(read_index(copy)).lengths_of(np.array([0]))


@pytest.mark.parametrize("value", [2**63 + 5, 2**40, 0])
@pytest.mark.parametrize("loops", ["C", "Python"])
def test_damaged_offsets_end_in_an_error_not_in_foreign_memory(copy, monkeypatch, value, loops):
    with h5py.File(copy / "train-00000.h5") as file:
        place, num = file["offsets"].id.get_offset(), len(file["offsets"])
    with (copy / "train-00000.h5").open("r+b") as file:
        file.seek(place + 8 * (num // 2))
        file.write(int(value).to_bytes(8, "little"))
    if loops == "Python":
        monkeypatch.setattr(kernel, "_c", None)
    corpus = Corpus(read_index(copy))
    ids = np.array([num // 2, num // 2 - 1])
    with pytest.raises(DataError, match=r"train-00000\.h5 is damaged"):
        corpus.lengths_of(ids)
    if value > corpus.num_residues:
        whole = Samples(np.zeros(2, np.int64), ids, np.zeros(2, np.int64), np.array([400, 400]))
        with pytest.raises(DataError, match=r"train-00000\.h5 is damaged"):
            corpus.gather(whole, TABLE, np.zeros(800, np.int64), np.array([0, 400]))
