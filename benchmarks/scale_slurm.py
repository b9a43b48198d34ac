"""A scaling study on the test cluster, a real Slurm of eight nodes in namespaces of this computer, over links of a chosen rate.

    python benchmarks/scale_slurm.py --comm torch
    python benchmarks/scale_slurm.py --comm horovod

Each makes results/scaling-slurm-COMM, a report with a projection, and writes results/scaling-slurm.md anew from what is there of both.
Run them on calm cores, one after the other. Needs what the tests of the cluster need (`scripts/cluster.sh`), and Horovod for the second.

All nodes share the cores of this computer, so with more nodes than cores each gets less of them, and the overhead holds
that: judged is the ledger's exposed communication of the rank that comes last in a step, which waits for no slower one, but for the
reduction alone. Target: at most 3 % of a step.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests" / "cluster")]

import conftest  # noqa: E402 - the test cluster's
import hardware  # noqa: E402

from prottrans_hpc.profile import measured_steps, scaling, scaling_collect  # noqa: E402

FASTA = REPOSITORY / "data" / "swissprot201401_sp50_sample10k.fasta.zst"
RECIPE = Path(__file__).with_suffix(".toml")
RESULTS = Path(__file__).parent / "results"
RACKS = {"rack0": ["n1", "n2", "n3", "n4"], "rack1": ["n5", "n6", "n7", "n8"]}
STARTERS = {"torch": "srun", "horovod": "mpirun"}
BACK_ENDS = {"torch": "torch (gloo)", "horovod": "Horovod (MPI)"}
KEPT = ("report.html", "scaling.csv", "scaling.json", "study.json", "projection.json", "overhead.png", "throughput.png", "ledger.png")
MOST_EXPOSED = 0.03
PROJECTED = "16"
"""Beyond, a computer of so few cores says nothing."""


def measure(options: argparse.Namespace, folder: Path) -> Path:
    """Bring the cluster up, run the study in one job, and take the cluster down."""
    with conftest.running(folder, RACKS, daemons=True) as cluster:
        for node in RACKS["rack0"] + RACKS["rack1"]:
            cluster.shape(node, options.mbit)
        # Where ranks wait for one another on shared cores, MPI must not spin: who waits would take the core of who is waited for.
        setup = json.dumps([f"export PYTHONPATH={REPOSITORY}", "export OMPI_MCA_mpi_yield_when_idle=1"])
        machine = cluster.profile(folder, starter=STARTERS[options.comm], name=f'"{options.mbit:g} Mbit/s test cluster"', setup_lines=setup)
        cluster.prottrans("preprocess", str(FASTA), "--out", str(folder / "corpus"), timeout_s=300)
        where = ("--corpus", str(folder / "corpus"), "--machine", str(machine), "--out", str(folder / "study"), "--one-job", "--nodes", options.nodes)
        amount = ("--steps", str(options.steps), "--warmup", str(options.warmup), "--repetitions", str(options.repetitions))
        done = cluster.prottrans("scale", str(RECIPE), *where, *amount, "--set", f"parallel.comm={options.comm}", "--follow", timeout_s=options.minutes * 60)
        print(done.stderr)
        finish(cluster, folder / "study")
    return folder / "study"


def finish(cluster: conftest.Cluster, study: Path) -> None:
    """Say that the nodes were one computer, which they cannot know; project where there are sizes enough; and draw the report anew."""
    measured, cores = scaling.read_scaling(study), len(os.sched_getaffinity(0))
    ranks = max(point.ranks for point in measured.points)
    if ranks > cores:
        scaling.write_scaling(study / "scaling.json", replace(measured, hardware=measured.hardware | scaling_collect.shared(ranks, cores)))
    shutil.rmtree(study / "points")  # what the report is made of is in scaling.json
    if len(measured.node_counts) > 3:
        print(cluster.prottrans("project-scaling", str(study), "--nodes", PROJECTED, timeout_s=300).stdout)
    cluster.prottrans("scale", "--report-only", "--out", str(study), timeout_s=300)


def rows(study: scaling.Scaling) -> Iterator[str]:
    """A line of the table for each size."""
    for size in measured_steps.sizes_of(study, measured_steps.all_steps(study)):
        points = study.at(size.nodes)
        waits_s = statistics.median(seconds for point in points for seconds in point.ledger.exposed_comm_s)
        share, passes_s = size.exposed_comm_s / size.step_s, size.work.forward_s + size.work.backward_s
        yield (
            f"| {BACK_ENDS[study.comm]} | {size.nodes} | {size.step_s:.3f} | {passes_s:.3f} | {waits_s:.4f} | {100 * waits_s / size.step_s:.2f} % | "
            f"{size.exposed_comm_s:.4f} | {100 * share:.2f} % | {'met' if share <= MOST_EXPOSED else 'missed'} |"
        )


def summary(folders: dict[str, Path]) -> list[str]:
    """The markdown: what was measured, how, and how it is judged."""
    studies = {name: scaling.read_scaling(folder) for name, folder in folders.items()}
    about: dict[str, dict[str, Any]] = {name: json.loads((folder / "conditions.json").read_text()) for name, folder in folders.items()}
    first = next(iter(studies.values()))
    lines = ["# Scaling on the test cluster", ""]
    lines += [
        "`prottrans scale` for real: Slurm's nodes in namespaces of one computer, every link held to a rate, all points in one job, in drawn order. Made by",
        "",
    ]
    lines += [f"    {about[name]['command']}" for name in studies]
    lines += [
        "",
        f"The model is the tiny ProtBert ({first.parameters / 1e3:,.0f} thousand parameters, {first.gradient_bytes / 1e6:.1f} MB of gradients in buckets of ",
    ]
    lines[-1] += f"{first.bucket_mib} MiB), {first.residues_per_node_step or 0:,.0f} residues a node and step, one rank a node and one thread a rank."
    lines += [
        "",
        "| back end | nodes | step, s | forward + backward, s | mean rank waits, s | of a step | last rank waits, s | of a step | target <= 3 % |",
    ]
    lines += ["|---|---|---|---|---|---|---|---|---|", *(line for study in studies.values() for line in rows(study)), ""]
    lines += [
        f"{BACK_ENDS[name]}: links of {entry['mbit']:g} Mbit/s; {entry['hardware']}; load average {entry['load']:.1f} at the start.  "
        for name, entry in about.items()
    ]
    lines += [
        "",
        "**What these numbers are, and are not.** All nodes share the cores of one computer, so the time of a step grows with every node that is added:",
        "that is the sharing, and a cluster has it not. What is judged is the ledger's exposed communication: waiting for other ranks that no backward pass",
        "hides. A mean rank waits for slower ones, too, which here wait for a core; the rank that comes last in a step waits for the reduction alone, and",
        "that is judged. A share of at most 3 % is a weak-scaling efficiency of 97 % where each rank has cores of its own. All numbers are medians over steps.",
        "",
        "The reports, with every measured step in `scaling.json` beside them: "
        + ", ".join(f"[{BACK_ENDS[name]}]({folder.name}/report.html)" for name, folder in folders.items()),
        "",
    ]
    return lines


def keep(study: Path, options: argparse.Namespace, out: Path, load: float) -> None:
    """The report, and under which conditions it was made."""
    out.mkdir(parents=True, exist_ok=True)
    for name in KEPT:
        if (study / name).exists():
            shutil.copy(study / name, out / name)
    command = f"python benchmarks/scale_slurm.py {' '.join(sys.argv[1:])}"
    about = {"command": command, "mbit": options.mbit, "load": load, "hardware": hardware.describe()["line"]}
    (out / "conditions.json").write_text(json.dumps(about, indent=1) + "\n")


def main() -> None:
    """Run the study, keep its report, and write the summary of all."""
    parser = argparse.ArgumentParser(description="A scaling study on the test cluster.")
    parser.add_argument("--comm", choices=STARTERS, default="torch")
    parser.add_argument("--nodes", default="1,2,4,8")
    parser.add_argument("--mbit", type=float, default=1000.0, help="rate of every node's link, Mbit/s")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--minutes", type=int, default=60, help="how long it may take")
    parser.add_argument("--out", type=Path, help="where the folders and scaling-slurm.md go (default: results)")
    options = parser.parse_args()
    results, load = options.out or RESULTS, os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        keep(measure(options, Path(folder)), options, results / f"scaling-slurm-{options.comm}", load)
    made = {name: results / f"scaling-slurm-{name}" for name in STARTERS}
    lines = summary({name: folder for name, folder in made.items() if (folder / "conditions.json").exists()})
    (results / "scaling-slurm.md").write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
