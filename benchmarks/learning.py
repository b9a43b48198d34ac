"""It learns: ProtBert `small` here and in transformers' Trainer with its default padding, on the same proteins.

Both train the same number of parameters with the same optimizer, learning rates, batch of sequences and masks of
15 %, on both cores, until the same number of residues was seen. Validation is ours for both: the same held-out
proteins with the same masks, outside the timed part. Writes learning.json, learning.md and learning.png.

    python benchmarks/learning.py --data DATA --residues 800000

DATA holds pretrain/swissprot201401_sp50.fasta.zst: 141,140 proteins of Swiss-Prot 2014_01 at 50 % identity.

With --work DIR each curve is kept there as soon as it is measured, and a later start measures only what is missing.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from hardware import describe
from learning_trainer import BATCH, LEARNING_RATE, MAX_RESIDUES, Point, run_trainer

from prottrans_hpc import durable
from prottrans_hpc.corpus.index import read_index
from prottrans_hpc.corpus.reader import Corpus
from prottrans_hpc.recipe import read_recipe

VALIDATION_SEQUENCES = 512


def settings_of(steps: int, precision: str) -> tuple[str, ...]:
    """The recipe's changes: AdamW, which the Trainer has too, and a budget in steps."""
    return (
        f"phases.0.steps={steps}",
        f"phases.0.global_batch_size={BATCH}",
        f"phases.0.max_residues={MAX_RESIDUES}",
        f"phases.0.warmup_steps={steps // 20}",
        "optimizer.name=adamw",
        f"optimizer.learning_rate={LEARNING_RATE}",
        "optimizer.epsilon=1e-8",
        f"validation.every_steps={max(1, steps // 12)}",
        f"validation.max_sequences={VALIDATION_SEQUENCES}",
        f"checkpoint.every_steps={steps}",
        f"precision={precision}",
        "loading.bin_residues=8192",
    )


def run_ours(corpus: Path, run_dir: Path, *, steps: int, precision: str) -> list[Point]:
    """Two ranks with one core each through the command line; seconds are the sum of the steps."""
    words = [word for setting in settings_of(steps, precision) for word in ("--set", setting)]
    command = [
        sys.executable,
        "-m",
        "prottrans_hpc.launch.cli",
        "pretrain",
        "small_prot_bert",
        "--corpus",
        str(corpus),
        "--run-dir",
        str(run_dir),
        "--nodes",
        "2",
        "-q",
        *words,
    ]
    subprocess.run(command, check=True)
    residues, seconds, points = 0.0, 0.0, []
    losses = {line["step"]: line["loss"] for line in read_lines(run_dir / "validation.jsonl")}
    for line in read_lines(run_dir / "metrics.jsonl"):
        residues += line["residues_per_s"] * line["step_s"]
        seconds += line["step_s"]
        if line["step"] in losses:
            points.append(Point(round(residues), seconds, losses[line["step"]]))
    return points


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


@dataclass(frozen=True)
class Baselines:
    """Validation losses that need no learning from context, nats."""

    unigram: float
    """Entropy of the residue frequencies: the loss of a model that knows nothing else."""
    copying: float
    """The same, but where a target's position shows a residue (20 % of them) the model weighs that it may be the right one."""


def baselines(corpus: Path) -> Baselines:
    """Both from the residue frequencies, exactly; a shown residue is the true one or a random one of 20, equally likely."""
    counts = np.array([count for count in durable.read_json(corpus / "index.json")["residue_counts"].values() if count], float)
    share = counts / counts.sum()
    standard = np.sort(share)[-20:]
    joint = np.diag(0.5 * share)
    joint[:, np.argsort(share)[-20:]] += 0.5 / len(standard) * share[:, None]
    conditional = joint / joint.sum(axis=0, keepdims=True)
    shown = -np.where(joint > 0, joint * np.log(np.where(conditional > 0, conditional, 1)), 0).sum()
    unigram = float(-(share * np.log(share)).sum())
    return Baselines(unigram, float(0.8 * unigram + 0.2 * shown))


def rate(points: list[Point]) -> float:
    """Residues a second between the first and the last measurement: start-up is left out for both."""
    return (points[-1].residues - points[0].residues) / (points[-1].seconds - points[0].seconds)


def report(curves: dict[str, list[Point]], baseline: Baselines, out: Path, residues: int) -> None:
    """Numbers as JSON, a table as Markdown, two panels as PNG."""
    hardware = describe()
    base = rate(curves["transformers fp32"])
    rows = {name: {"residues_per_s": rate(points), "ratio": rate(points) / base, "final_loss": points[-1].loss} for name, points in curves.items()}
    plain = {name: [vars(point) for point in points] for name, points in curves.items()}
    values = {"hardware": hardware, "residues": residues, "baselines": vars(baseline), "rows": rows, "curves": plain}
    (out / "learning.json").write_text(json.dumps(values, indent=1) + "\n")
    lines = [f"# Learning: `small` ProtBert, {residues:,} residues of Swiss-Prot (50 % identity), two cores", ""]
    lines += ["| trainer | residues/s | ratio | final validation loss | below unigram entropy | below copying |", "|---|---|---|---|---|---|"]
    for name, row in rows.items():
        loss = row["final_loss"]
        below = f"{baseline.unigram - loss:.4f} | {baseline.copying - loss:.4f}"
        lines.append(f"| {name} | {row['residues_per_s']:,.0f} | {row['ratio']:.2f} | {loss:.4f} | {below} |")
    lines += [
        "",
        f"Unigram entropy of the corpus: {baseline.unigram:.4f} nats. A model that knows the frequencies and weighs the residues that it is shown at 20 %",
        f"of the targets, but nothing of the context, reaches {baseline.copying:.4f}: only what is below that is learned from context.",
        f"Losses are over the same {VALIDATION_SEQUENCES} held-out proteins and masks. Times include no validation.",
        "",
        hardware["line"],
        "",
    ]
    (out / "learning.md").write_text("\n".join(lines))
    plot(curves, baseline, out / "learning.png")


def plot(curves: dict[str, list[Point]], baseline: Baselines, path: Path) -> None:
    """Validation loss against residues and against seconds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    by_residues, by_seconds = figure.subplots(1, 2, sharey=True)
    for name, points in curves.items():
        by_residues.plot([p.residues / 1e6 for p in points], [p.loss for p in points], marker=".", label=name)
        by_seconds.plot([p.seconds for p in points], [p.loss for p in points], marker=".", label=name)
    for axes, label in ((by_residues, "million residues seen"), (by_seconds, "seconds of training")):
        axes.axhline(baseline.unigram, color="grey", linestyle=":", label="residue frequencies")
        axes.axhline(baseline.copying, color="grey", linestyle="--", label="frequencies and copying")
        axes.set_xlabel(label)
    by_residues.set_ylabel("validation loss, nats")
    by_seconds.legend(fontsize="small")
    figure.savefig(path, dpi=150)


def main() -> None:
    """Prepare the corpus, train each way once, one after the other, and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--residues", type=int, default=800_000)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--work", type=Path, help="keep the corpus and the curves here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() if arguments.work is None else nullcontext(arguments.work) as folder:
        measure(arguments, Path(folder).resolve())


def measure(arguments: argparse.Namespace, folder: Path) -> None:
    """The corpus, the four curves, the report."""
    folder.mkdir(parents=True, exist_ok=True)
    corpus = folder / "corpus"
    fasta = arguments.data / "pretrain" / "swissprot201401_sp50.fasta.zst"
    subprocess.run([sys.executable, "-m", "prottrans_hpc.launch.cli", "preprocess", str(fasta), "--out", str(corpus), "--validation", "0.01"], check=True)
    residues = arguments.residues
    steps = math.ceil(residues / (BATCH * mean_residues(corpus)))
    recipe = read_recipe("small_prot_bert", settings_of(steps, "fp32"))
    ways: dict[str, Callable[[Path], list[Point]]] = {
        "prottrans_hpc fp32": lambda place: run_ours(corpus, place, steps=steps, precision="fp32"),
        "transformers fp32": lambda place: run_trainer(corpus, recipe, residues=residues, bf16=False, folder=place),
        "prottrans_hpc bf16": lambda place: run_ours(corpus, place, steps=steps, precision="bf16"),
        "transformers bf16": lambda place: run_trainer(corpus, recipe, residues=residues, bf16=True, folder=place),
    }
    curves = {name: kept(folder / f"{name.replace(' ', '-')}-{residues}", run) for name, run in ways.items()}
    arguments.out.mkdir(parents=True, exist_ok=True)
    report(curves, baselines(corpus), arguments.out, residues)


def kept(place: Path, run: Callable[[Path], list[Point]]) -> list[Point]:
    """The curve that an earlier start left at this place, or a new one."""
    file = place / "curve.json"
    if not file.exists():
        place.mkdir(exist_ok=True)
        points = run(place)
        file.write_text(json.dumps([vars(point) for point in points]))
    return [Point(**point) for point in json.loads(file.read_text())]


def mean_residues(corpus: Path) -> float:
    """Residues of a training sequence, cut at the limit."""
    split = Corpus(read_index(corpus), "train")
    return float(np.minimum(split.lengths_of(np.arange(split.num_sequences)), MAX_RESIDUES).mean())


if __name__ == "__main__":
    main()
