"""The work folder: parts come back as written, damage and strangers are found, one process at a time."""

from __future__ import annotations

import json
import multiprocessing
import os

import numpy as np
import pytest

from prottrans_hpc.embed.parts import Extract, joined, open_folder, read_part
from prottrans_hpc.errors import IdentityError, ResourceError

IDENTITY = {"format": 1, "checkpoint": {"step": 20}, "options": {"precision": "fp32"}}


def an_extract(first=0, dtype="float32"):
    rows = np.array([first + 2, first], np.int64)
    mean = np.arange(8, dtype=dtype).reshape(2, 4) + first
    return Extract(rows, mean, np.arange(20, dtype=dtype).reshape(5, 4), {first + 1: "too odd: \x1b"})


def same(one, other):
    arrays = zip((one.rows, one.mean, one.residues), (other.rows, other.mean, other.residues), strict=True)
    return all((a is None and b is None) or (a.dtype == b.dtype and np.array_equal(a, b)) for a, b in arrays) and one.failed == other.failed


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_parts_come_back_as_written_after_reopening(tmp_path, dtype):
    path = tmp_path / "o.h5.parts"
    with open_folder(path, IDENTITY) as folder:
        folder.write(an_extract(dtype=dtype), window=3, first=0, last=1)
        folder.write(an_extract(10, dtype), window=3, first=4, last=4)
    with open_folder(path, IDENTITY) as folder:
        assert folder.finished_batches(3) == {0, 1, 4}
        assert folder.finished_batches(0) == set()
        first, second = (read_part(part) for part in sorted(folder.parts[3], key=lambda part: part.first))
        assert same(first, an_extract(dtype=dtype))
        assert same(second, an_extract(10, dtype))


@pytest.mark.parametrize("missing", ["mean", "residues", "both"])
def test_a_part_may_lack_what_was_not_asked_for_or_hold_failures_only(tmp_path, missing):
    empty = np.empty((0, 4), np.float32)
    extract = Extract(np.empty(0, np.int64), None if missing == "mean" else empty, None if missing == "residues" else empty, {0: "no"})
    with open_folder(tmp_path / "o.h5.parts", IDENTITY) as folder:
        folder.write(extract, window=0, first=0, last=0)
        assert same(read_part(folder.parts[0][0]), extract)


def test_joining_keeps_the_order():
    whole = joined([an_extract(), an_extract(10)])
    assert whole.rows.tolist() == [2, 0, 12, 10]
    assert whole.mean.shape == (4, 4)
    assert whole.residues.shape == (10, 4)
    assert set(whole.failed) == {1, 11}


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty"])
def test_a_damaged_part_is_named_removed_and_computed_again(tmp_path, capsys, damage):
    path = tmp_path / "o.h5.parts"
    with open_folder(path, IDENTITY) as folder:
        folder.write(an_extract(), window=0, first=0, last=0)
        folder.write(an_extract(10), window=0, first=1, last=1)
        victim = folder.parts[0][0].path
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 4
    victim.write_bytes({"flip": bytes(content), "truncate": bytes(content[:50]), "empty": b""}[damage])
    with open_folder(path, IDENTITY) as folder:
        assert folder.finished_batches(0) == {1}
    assert f"{victim} is damaged" in capsys.readouterr().err
    assert not victim.exists()


def test_another_identity_is_refused_with_every_difference(tmp_path):
    path = tmp_path / "o.h5.parts"
    with open_folder(path, IDENTITY):
        pass
    other = json.loads(json.dumps(IDENTITY))
    other["checkpoint"]["step"], other["options"]["precision"] = 40, "fp16"
    with pytest.raises(IdentityError) as caught, open_folder(path, other):
        pass
    assert "checkpoint.step: 20 -> 40" in str(caught.value)
    assert "options.precision: 'fp32' -> 'fp16'" in str(caught.value)
    assert f"remove the folder {path}" in str(caught.value)


def test_a_folder_of_somebody_else_is_left_alone(tmp_path):
    path = tmp_path / "o.h5.parts"
    path.mkdir()
    (path / "thesis.tex").write_text("years")
    with pytest.raises(IdentityError, match=r"thesis\.tex"), open_folder(path, IDENTITY):
        pass
    assert sorted(os.listdir(path)) == ["lock", "thesis.tex"]


def _try_to_open(path, answer):
    try:
        with open_folder(path, IDENTITY):
            answer.put("opened")
    except ResourceError as error:
        answer.put(str(error))


def test_a_second_process_is_refused_while_the_first_is_at_work(tmp_path):
    path = tmp_path / "o.h5.parts"
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    with open_folder(path, IDENTITY):
        process = context.Process(target=_try_to_open, args=(path, answer))
        process.start()
        assert "another process is writing" in answer.get(timeout=60)
        process.join()
    process = context.Process(target=_try_to_open, args=(path, answer))
    process.start()
    assert answer.get(timeout=60) == "opened"
    process.join()


def test_leftovers_of_killed_processes_are_removed_and_nothing_else(tmp_path):
    path = tmp_path / "o.h5.parts"
    for name in (".o.h5.tmp-0123456789ab", ".other.h5.tmp-0123456789ab", "o.h5.tmp-1"):
        (tmp_path / name).write_text("half")
    (tmp_path / ".o.h5.parts.tmp-0123456789ab").mkdir()
    with open_folder(path, IDENTITY):
        (path / ".window.tmp-0123456789ab").write_text("half")
    with open_folder(path, IDENTITY):
        assert sorted(os.listdir(path)) == ["identity.json", "lock"]
    assert sorted(os.listdir(tmp_path)) == [".other.h5.tmp-0123456789ab", "o.h5.parts", "o.h5.tmp-1"]
