"""The stacks of a rank's threads, and what is known of its process, for whoever has to find out why it hangs."""

from __future__ import annotations

import faulthandler
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from .. import timestamp
from ..run_dir import RunDir

_LAST_COLLECTIVES = 8


def stacks_file(run_dir: RunDir, node: int) -> Path:
    """The stacks of the ranks of a node that hung."""
    return run_dir.path / "logs" / f"stacks-node-{node:04d}.txt"


def append_stacks(path: Path, heading: str) -> None:
    """Add the stacks of all threads of this process, and the last collectives that torch started, to a file; with one write, for ranks share it."""
    text = f"=== {timestamp.now()} process {os.getpid()}: {heading}\n{_stacks()}{_collectives()}\n"
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.write(descriptor, text.encode("utf-8", "backslashreplace"))
    finally:
        os.close(descriptor)


def _stacks() -> str:
    """As faulthandler writes them, which needs a file of its own."""
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read().decode("utf-8", "backslashreplace")


def _collectives() -> str:
    """The newest entries of torch's flight recorder: NCCL's, and in newer versions gloo's; "" where it keeps none."""
    import torch._C._distributed_c10d as recorder

    dump = getattr(recorder, "_dump_fr_trace_json", None)  # torch 2.8 and later, where torch.distributed was built
    entries: list[dict[str, Any]] = json.loads(dump()).get("entries", []) if dump else []
    lines = [
        f"  {entry.get('collective_seq_id')} {entry.get('profiling_name')} {entry.get('input_sizes')} {entry.get('input_dtypes')}: {entry.get('state')}"
        for entry in entries[-_LAST_COLLECTIVES:]
    ]
    return "\n".join(["Last collectives that this rank started (torch's flight recorder):", *lines]) + "\n" if lines else ""


def process_state(pid: int) -> str:
    """What the kernel says of a process of this host: "T (stopped)", "D (disk sleep)"; "" when it is not to be seen."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("State:")), "unknown")
