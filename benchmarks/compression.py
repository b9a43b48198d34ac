"""How the loss falls when gradients are summed in two levels or made smaller: ProtBert `tiny`, four ranks in two nodes, real proteins.

    python benchmarks/compression.py --proteins data/swissprot201401_sp50_sample10k.fasta.zst --steps 120 --work DIR

Every run has the same seed, batches and held-out proteins; what differs is `parallel.reduction` and `parallel.compression`. Writes
compression.json, compression.md and compression.png. A run that DIR has already is not trained again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from hardware import describe

from prottrans_hpc.recipe import read_recipe

RUNS: dict[str, tuple[str, ...]] = {
    "flat": (),
    "hierarchical": ("parallel.reduction=hierarchical",),
    "bf16": ("parallel.compression=bf16",),
    "fp16": ("parallel.compression=fp16",),
    "powersgd, rank 4": ("parallel.compression=powersgd", "parallel.powersgd_rank=4"),
    "powersgd, rank 1": ("parallel.compression=powersgd", "parallel.powersgd_rank=1"),
}
EVERY = 10
MACHINE = """
name = "pairs"
description = "two nodes of two ranks, as processes of this computer"
scheduler = "local"
starter = "processes"
ranks_per_node = 2
max_nodes = 2
[node]
num_cpu_cores = 0
"""


def prottrans(*words: str) -> None:
    """The command line."""
    subprocess.run([sys.executable, "-m", "prottrans_hpc.launch.cli", *words, "-q"], check=True)


def train(work: Path, name: str, *, steps: int) -> dict[int, float]:
    """Validation loss by step."""
    folder = work / name.replace(", ", "-").replace(" ", "-")
    settings = (
        f"phases.0.steps={steps}",
        "phases.0.global_batch_size=32",
        "phases.0.max_residues=128",
        f"validation.every_steps={EVERY}",
        f"checkpoint.every_steps={steps}",
        *RUNS[name],
    )
    words = [word for setting in settings for word in ("--set", setting)]
    where = ("--corpus", str(work / "corpus"), "--machine", str(work / "pairs.toml"), "--nodes", "2", "--run-dir", str(folder))
    prottrans("pretrain", "tiny_prot_bert", *where, *words)
    lines = [json.loads(line) for line in (folder / "validation.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines}


def report(curves: dict[str, dict[int, float]], out: Path, *, steps: int) -> None:
    """Numbers as JSON, a table as Markdown, curves as PNG."""
    hardware = describe()
    flat = curves["flat"]
    rows = {}
    for name, curve in curves.items():
        worst = max(abs(curve[step] - flat[step]) for step in flat)
        rows[name] = {"final_loss": curve[steps], "above_flat": curve[steps] - flat[steps], "largest_difference": worst}
    values: dict[str, Any] = {"hardware": hardware, "steps": steps, "seed": read_recipe("tiny_prot_bert").seed, "rows": rows, "curves": curves}
    (out / "compression.json").write_text(json.dumps(values, indent=1) + "\n")
    lines = [
        f"# Loss with smaller gradients: ProtBert `tiny`, {steps} steps on Swiss-Prot (50 % identity), four ranks in two nodes",
        "",
        "| gradients | validation loss at the end | above flat | largest difference from flat on the way |",
        "|---|---|---|---|",
        *(f"| {name} | {row['final_loss']:.4f} | {row['above_flat']:+.1e} | {row['largest_difference']:.1e} |" for name, row in rows.items()),
        "",
        "One seed each, the same batches and held-out proteins. Hierarchical sums in another order and is otherwise exact; bf16 and fp16 round twice;",
        "powersgd sends two factors of each matrix, and what it leaves out with later steps. A difference says what compression costs on this model and at",
        "this length only: larger models have matrices of which a low rank leaves out more, or less.",
        "",
        str(hardware["line"]),
    ]
    (out / "compression.md").write_text("\n".join(lines) + "\n")
    draw(curves, out / "compression.png")


def draw(curves: dict[str, dict[int, float]], path: Path) -> None:
    """Validation loss over steps, and its difference from flat."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for name, curve in curves.items():
        left.plot(list(curve), list(curve.values()), label=name, linewidth=1.2)
        right.plot(list(curve), [loss - curves["flat"][step] for step, loss in curve.items()], label=name, linewidth=1.2)
    left.set(xlabel="step", ylabel="validation loss, nats")
    right.set(xlabel="step", ylabel="above flat, nats")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Parse, train what is missing, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--proteins", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    (options.work / "pairs.toml").write_text(MACHINE)
    if not (options.work / "corpus" / "index.json").exists():
        prottrans("preprocess", str(options.proteins), "--out", str(options.work / "corpus"), "--validation", "0.05")
    steps = options.steps // EVERY * EVERY
    report({name: train(options.work, name, steps=steps) for name in RUNS}, options.out, steps=steps)


if __name__ == "__main__":
    main()
