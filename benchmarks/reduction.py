"""Flat and hierarchical reductions over slow links: four nodes of two ranks of the namespaced Slurm cluster, each link shaped.

    python benchmarks/reduction.py --rate 100

Needs what the tests of the cluster need (`scripts/cluster.sh`). Within a node ranks talk over loopback; into each node
and out of it no more than the rate passes. Counts the bytes that cross each node's link, and times the steps of a model that computes
next to nothing. Writes reduction.json and reduction.md.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from hardware import describe

REPOSITORY = Path(__file__).resolve().parents[1]
NUM_NODES, RANKS_PER_NODE = 4, 2
HIERARCHICAL = {"reduction": "hierarchical"}
SETTINGS: dict[str, dict[str, Any]] = {
    "flat": {},
    "hierarchical": HIERARCHICAL,
    "bf16": {"compression": "bf16"},
    "fp16": {"compression": "fp16"},
    "powersgd, hierarchical": HIERARCHICAL | {"compression": "powersgd"},
}
PLACEMENTS = {"block": "ranks fill one node after the other", "cyclic": "ranks are dealt out in turn"}


def load_cluster() -> Any:
    """The test cluster's module."""
    spec = importlib.util.spec_from_file_location("cluster_conftest", REPOSITORY / "tests" / "cluster" / "conftest.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["cluster_conftest"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(rate_mbit: float) -> dict[str, Any]:
    """{placement: {setting: what the ranks measured}}."""
    conftest = load_cluster()
    if reason := conftest.obstacle():
        raise SystemExit(reason)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "cluster").mkdir()
        nodes = [f"n{number}" for number in range(1, NUM_NODES + 1)]
        with conftest.running(Path(folder) / "cluster", {"rack0": nodes}, daemons=True) as cluster:
            for node in nodes:
                cluster.shape(node, rate_mbit)
            for placement in PLACEMENTS:
                meeting = Path(folder) / placement
                meeting.mkdir()
                places = (f"--nodes={NUM_NODES}", f"--ntasks-per-node={RANKS_PER_NODE}", f"--distribution={placement}", "--kill-on-bad-exit=1")
                ranks = str(Path(__file__).with_name("reduction_ranks.py"))
                told = cluster.run("srun", *places, sys.executable, ranks, str(meeting), json.dumps(SETTINGS), timeout_s=900).stdout
                found[placement] = json.loads(told.splitlines()[-1])
    return found


def report(found: dict[str, Any], out: Path, *, rate_mbit: float) -> None:
    """Numbers as JSON, a table as Markdown."""
    hardware = describe()
    values = {"hardware": hardware, "rate_mbit": rate_mbit, "nodes": NUM_NODES, "ranks_per_node": RANKS_PER_NODE, "found": found}
    (out / "reduction.json").write_text(json.dumps(values, indent=1) + "\n")
    size = found["block"]["flat"]["gradient_bytes"]
    lines = [
        f"# Reductions over slow links: {NUM_NODES} nodes of {RANKS_PER_NODE} ranks, {rate_mbit:g} Mbit/s into and out of each node",
        "",
        f"{size / 2**20:g} MiB of gradients; the median of five steps, in which next to nothing is computed.",
        "",
        "| placement | gradients | into a node, in sizes of the gradient | least time on the link, s | step, s | of flat |",
        "|---|---|---|---|---|---|",
    ]
    for placement, rows in found.items():
        flat = statistics.median(rows["flat"]["step_s"])
        for name, row in rows.items():
            step, least = statistics.median(row["step_s"]), row["bytes_in"] * 8 / rate_mbit / 1e6
            lines.append(f"| {PLACEMENTS[placement]} | {name} | {row['bytes_in'] / size:.2f} | {least:.2f} | {step:.2f} | {step / flat:.2f} |")
    ring, tree = 2 * (NUM_NODES * RANKS_PER_NODE - 1) / (NUM_NODES * RANKS_PER_NODE), 2 * (NUM_NODES - 1) / NUM_NODES
    lines += [
        "",
        f"Expected: a ring over all ranks brings {ring:.2f} sizes into a node, or {RANKS_PER_NODE * ring:.2f} when neighbours in it are never on one node;",
        f"a hierarchy {tree:.2f} wherever the ranks are, and half of that in a 16-bit type.",
        "The bytes are counted; the times also hold what the ranks and everything else here wait for cores",
        f"(load over the last 15 minutes: {os.getloadavg()[2]:.0f}).",
        "",
        str(hardware["line"]),
    ]
    (out / "reduction.md").write_text("\n".join(lines) + "\n")


def main() -> None:
    """Parse, run, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=100.0, help="Mbit/s of every link, in each direction.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    report(run(options.rate), options.out, rate_mbit=options.rate)


if __name__ == "__main__":
    main()
