"""A scaling study on the test cluster, a real Slurm of eight nodes in namespaces of this computer, over links of a chosen rate.

    python benchmarks/scale_slurm.py --comm torch --nodes 1,2,4,8 --mbit 1000 --out benchmarks/results/scaling-torch

All nodes share the cores of this computer, so with more nodes than cores each gets less of them, and the overhead holds
that: read the exposed communication. Needs what the tests of the cluster need (`scripts/cluster.sh`).
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests" / "cluster")]

import conftest  # noqa: E402 - the test cluster's

FASTA = REPOSITORY / "data" / "swissprot201401_sp50_sample10k.fasta.zst"
RECIPE = Path(__file__).with_suffix(".toml")
RACKS = {"rack0": ["n1", "n2", "n3", "n4"], "rack1": ["n5", "n6", "n7", "n8"]}
STARTERS = {"torch": "srun", "horovod": "mpirun"}
KEPT = ("report.html", "scaling.csv", "scaling.json", "study.json", "overhead.png", "throughput.png", "ledger.png")


def measure(options: argparse.Namespace, folder: Path) -> Path:
    """Bring the cluster up, run the study in one job, and take the cluster down."""
    with conftest.running(folder, RACKS, daemons=True) as cluster:
        for node in RACKS["rack0"] + RACKS["rack1"]:
            cluster.shape(node, options.mbit)
        machine = cluster.profile(folder, starter=STARTERS[options.comm], name=f'"{options.mbit:g} Mbit/s test cluster"')
        cluster.prottrans("preprocess", str(FASTA), "--out", str(folder / "corpus"), timeout_s=300)
        where = ("--corpus", str(folder / "corpus"), "--machine", str(machine), "--out", str(folder / "study"), "--one-job", "--nodes", options.nodes)
        amount = ("--steps", str(options.steps), "--warmup", str(options.warmup), "--repetitions", str(options.repetitions))
        done = cluster.prottrans("scale", str(RECIPE), *where, *amount, "--set", f"parallel.comm={options.comm}", "--follow", timeout_s=options.minutes * 60)
        print(done.stderr)
    return folder / "study"


def main() -> None:
    """Run the study and keep its report."""
    parser = argparse.ArgumentParser(description="A scaling study on the test cluster.")
    parser.add_argument("--comm", choices=STARTERS, default="torch")
    parser.add_argument("--nodes", default="1,2,4,8")
    parser.add_argument("--mbit", type=float, default=1000.0, help="rate of every node's link, Mbit/s")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--minutes", type=int, default=60, help="how long it may take")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        study = measure(options, Path(folder))
        options.out.mkdir(parents=True, exist_ok=True)
        for name in KEPT:
            shutil.copy(study / name, options.out / name)


if __name__ == "__main__":
    main()
