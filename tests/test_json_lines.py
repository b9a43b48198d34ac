"""Files of JSON lines: what a kill left half written costs nothing but itself, whoever writes next and whoever reads."""

from __future__ import annotations

import errno
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prottrans_hpc import errors, json_lines, scaling_study
from prottrans_hpc.launch import job_events, lr_range
from prottrans_hpc.run_dir import RunDir

HALF = b'{"event": "sta'


@given(st.dictionaries(st.text(), st.floats() | st.integers() | st.none() | st.text()))
def test_every_line_is_json_that_any_reader_takes(record):
    content = json_lines.encode(record)
    assert content.endswith(b"\n")
    assert content.count(b"\n") == 1

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    found = json.loads(content, parse_constant=refuse)
    expected = {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in record.items()}
    assert found == expected


@pytest.mark.parametrize("append", [json_lines.append, json_lines.append_durably])
def test_the_line_behind_half_a_line_is_read(tmp_path: Path, append) -> None:
    path = tmp_path / "a.jsonl"
    append(path, {"n": 1})
    for number in range(len(HALF)):
        path.write_bytes(b'{"n": 1}\n' + HALF[: number + 1])
        append(path, {"n": 2}, {"n": 3})
        assert json_lines.read(path) == [{"n": 1}, {"n": 2}, {"n": 3}]


def test_no_half_of_a_line_is_taken_for_a_whole_one(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    line = json_lines.encode({"step": 12, "host": "n1", "more": {"a": [1, 2]}, "at": 1.5})
    for length in range(len(line) - 1):
        path.write_bytes(line[:length])
        assert json_lines.read(path) == []


def test_what_is_no_object_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xff\xfe\n\n12\n"text"\n[1]\n' + b"[" * 100_000 + b'\n{"n": 1}\n')
    assert json_lines.read(path) == [{"n": 1}]
    assert json_lines.read(tmp_path / "none") == json_lines.read(path / "none") == []


def test_a_full_disk_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "full"
    path.symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left") as caught:
        json_lines.append(path, {"n": 1})
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(path))
    assert errors.exit_code(caught.value) == errors.CANNOT_WRITE


def test_half_a_line_misleads_nobody_before_the_start(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    for path in (run.history, run.jobs_log, run.metrics):
        path.write_bytes(HALF)
    assert not lr_range.is_over(SimpleNamespace(run_dir=run))
    json_lines.append(run.history, {"event": "stop", "exit_code": 0})
    assert lr_range.is_over(SimpleNamespace(run_dir=run))
    job_events.record(run, "begun", job_id="1", restart=0)
    assert [event["event"] for event in job_events.read_events(run)] == ["begun"]
    json_lines.append(run.metrics, {"step": 7})
    assert scaling_study.num_steps(run) == 7
