"""Tasks and results as JSON: exact there and back, and nothing but the types of the table ever comes out of a file."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prottrans_hpc.corpus.alphabet import Rules
from prottrans_hpc.corpus.assembly import ShardPlan, Stretch
from prottrans_hpc.corpus.pieces import Piece, Totals
from prottrans_hpc.corpus.scan import ScanTask
from prottrans_hpc.corpus.sources import Source
from prottrans_hpc.corpus.splitting import Holdout
from prottrans_hpc.corpus.statistics import Tally
from prottrans_hpc.corpus.task_json import FUNCTIONS, decode, encode
from prottrans_hpc.errors import DataError


def there_and_back(value):
    return decode(json.loads(json.dumps(encode(value))))


def test_tasks_come_back_equal():
    source = Source(Path("/d/\udcff x.fasta"), 2**40, 10**18 + 1, 7, "gzip", False, 3)
    scan = ScanTask(1, source, 0, 0, None, True, Path("/w"), Rules("x", True), Holdout(0.1, None), True, False)
    piece = Piece("/w/000001", 2, (Totals(1, 2, 3), Totals()))
    shard = ShardPlan(Path("/o/train-00000.h5"), 0, (Stretch(piece, 0, 5),), Totals(5, 50, 9), True, Path("/r.json"), "abc")
    for task in (scan, piece, shard, (Path("/a"), [1, None, "x"])):
        assert there_and_back(task) == task


def test_a_tally_comes_back_equal():
    tally = Tally()
    tally.letters[65] = 2**40
    tally.long = Counter({5_000: np.int64(3)})
    tally.problems["empty"] = 4
    found = there_and_back(tally)
    assert (found.letters == tally.letters).all()
    assert found.letters.dtype == np.int64
    assert (found.long, found.problems) == (tally.long, tally.problems)
    found.problems["new"] += 1


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(), lambda one: st.lists(one) | st.tuples(one, one)))
def test_plain_values_come_back_equal(value):
    assert there_and_back(value) == value


@pytest.mark.parametrize(
    "value",
    [{"Popen": {"args": "x"}}, {"path": 5}, {"ScanTask": {"number": 1}}, {"Rules": {"invalid": "x", "more": 1}}, {}, {"a": 1, "b": 2}, {"int64": ["x"]}],
)
def test_anything_else_is_refused(value):
    with pytest.raises(DataError, match="this is no task"):
        decode(value)


def test_only_what_may_be_repeated_is_done_elsewhere():
    assert sorted(FUNCTIONS) == ["check_shard", "find_duplicates", "scan", "write_shard"]
    with pytest.raises(TypeError, match="object is not part of a task"):
        encode(object())
