"""`make demo` in small: the same script with fewer steps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from prottrans_hpc import run_dir

STEPS = 24


@pytest.mark.timeout(2400)
def test_the_demo_preempts_resumes_and_embeds(repository, tmp_path):
    demo = tmp_path / "demo"
    venv = Path(sys.executable).parent.parent
    done = subprocess.run(
        [repository / "scripts" / "demo.sh", "--steps", str(STEPS)],
        env=os.environ | {"DEMO": str(demo), "VENV": str(venv)},
        capture_output=True,
        text=True,
        timeout=2000,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    metrics = [json.loads(line) for line in (demo / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in metrics] == list(range(1, STEPS + 1))
    history = [json.loads(line) for line in (demo / "run" / "history.jsonl").read_text().splitlines()]
    assert [event["exit_code"] for event in history if event["event"] == "stop"] == [75, 0]
    assert (demo / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (demo / "embeddings.h5").is_file()
    folder = run_dir.RunDir(demo / "run")
    for path in (folder.run_json, folder.metrics, folder.checkpoint(STEPS), demo / "loss.png"):
        assert path.exists()
        assert path.name in done.stdout


def test_the_demo_never_deletes_a_folder_that_it_did_not_make(repository, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    done = subprocess.run([repository / "scripts" / "demo.sh"], env=os.environ | {"DEMO": str(tmp_path)}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 73
    assert "was not made by this demo" in done.stderr
    assert (tmp_path / "thesis.txt").exists()
