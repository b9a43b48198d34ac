from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from prottrans_hpc import json_lines
from prottrans_hpc.run_dir import RunDir
from prottrans_hpc.train.records import EventFile, JsonLines, Records


def _records(folder: Path) -> Records:
    return Records(RunDir(folder))


def _steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_a_resume_leaves_one_line_a_step(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    records = _records(tmp_path)
    for step in range(1, 8):
        records.step({"step": step, "loss": 1.0 / step})
    records.validation({"step": 4, "loss": 1.0})
    records.event("start", step=0)
    records.close()
    with run.metrics.open("ab") as file:
        file.write(b'{"step": 8, "lo')  # a kill in the middle of a line
    records = _records(tmp_path)
    records.begin_at(3)
    records.step({"step": 4, "loss": 2.0})
    records.event("start", step=3)
    assert records.last_validated == 0
    records.close()
    assert _steps(run.metrics) == [1, 2, 3, 4]
    assert json.loads(run.metrics.read_text().splitlines()[3])["loss"] == 2.0
    assert _steps(run.validation) == []
    assert _steps(run.history) == [0, 3]


def test_a_resume_finds_what_was_done_in_vain(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    records = _records(tmp_path)
    records.begin_at(0)
    assert records.taken_again == {"steps_lost": 0, "lost_s": 0.0, "last_step_at": None}
    for step in range(1, 8):
        records.step({"step": step, "step_s": step / 4})
    records.close()
    with run.metrics.open("ab") as file:
        file.write(b'{"step": 8, "step_s": 2')
    os.utime(run.metrics, (1_000_000_000, 1_000_000_000))
    records = _records(tmp_path)
    records.begin_at(5)
    assert records.taken_again == {"steps_lost": 2, "lost_s": 6 / 4 + 7 / 4, "last_step_at": "2001-09-09T01:46:40.000Z"}
    records.close()


def test_cutting_where_nothing_is_behind_changes_no_byte(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    file = JsonLines(path)
    file.append({"step": 1})
    before = path.stat()
    assert file.cut_back(1) == 0
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert file.last_step() == 1
    file.close()


def test_the_event_behind_half_a_line_is_in_the_history(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.history.write_bytes(b'{"time": "2026-01-01T00:0')
    records = _records(tmp_path)
    records.event("start", step=3)
    records.close()
    assert [(event["event"], event["step"]) for event in json_lines.read(run.history)] == [("start", 3)]


def test_a_full_disk_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "full"
    path.symlink_to("/dev/full")
    file = JsonLines(path)
    with pytest.raises(OSError, match="No space left") as caught:
        file.append({"step": 1})
    assert caught.value.filename == str(path)
    file.close()


def test_tensorboard_forgets_the_steps_that_are_taken_again(tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for first, value in ((1, 1.0), (4, 2.0)):
        events = EventFile(tmp_path, first)
        for step in range(first, 7):
            events.add(step, {"train/loss": value})
        events.close()
    accumulator = event_accumulator.EventAccumulator(str(tmp_path))
    accumulator.Reload()
    scalars = accumulator.Scalars("train/loss")
    assert [(scalar.step, scalar.value) for scalar in scalars] == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0), (5, 2.0), (6, 2.0)]


def test_without_tensorboard_the_run_goes_on_and_says_so_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto", None)
    monkeypatch.setitem(sys.modules, "tensorboard.summary.writer.event_file_writer", None)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with caplog.at_level("INFO"):
        records = _records(tmp_path)
        records.begin_at(0)
        records.step({"step": 1, "loss": 1.0})
        records.step({"step": 2, "loss": 1.0})
        records.close()
    assert caplog.text.count("tensorboard is not installed") == 1
    assert not RunDir(tmp_path).tensorboard.exists()
    assert _steps(RunDir(tmp_path).metrics) == [1, 2]
