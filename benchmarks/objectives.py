"""What corruption costs: drawing masks, spans, orders and sentinels beside one training step on the same batch.

CPU time of one thread each, medians over batches of real proteins: laying the batch out (gather and special tokens)
and corrupting it, beside forward and backward of the size `small`, which is the smallest model that anybody trains in
earnest. Loading runs in a thread beside the step, so that even this is hidden unless cores are short. Writes
objectives.{json,md}.

    python benchmarks/objectives.py
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hardware import describe
from train_step import FAMILIES, TOKENS_PER_TARGET, layout_of, proteins

from prottrans_hpc import architecture, objectives
from prottrans_hpc.corpus.samples import whole_sequences
from prottrans_hpc.recipe import read_recipe
from prottrans_hpc.stage import find
from prottrans_hpc.train.loader import to_tensors

CAP = 512
ROUNDS = 5


def seconds(work: Callable[[], Any], repeats: int) -> float:
    """CPU seconds of one call."""
    work()
    began = time.process_time()
    for _ in range(repeats):
        work()
    return (time.process_time() - began) / repeats


def family(name: str, sequences: int) -> dict[str, Any]:
    """Medians of the three parts for one family's published objective."""
    recipe = read_recipe(f"small_{name}")
    record = architecture.get(name)
    corrupt = objectives.get(recipe.objective.name)
    module: Any = find(record.build)(record.size(recipe.architecture.size).shape)
    module.initialise(0)
    known, dice = proteins(), np.random.default_rng(1)
    parts: dict[str, list[float]] = {"layout": [], "corruption": [], "step": []}
    for _ in range(ROUNDS):
        chosen = [known[i][:CAP] for i in dice.choice(len(known), sequences, replace=False)]
        samples = whole_sequences(np.arange(len(chosen)), np.array([len(one) for one in chosen]), epoch=0)
        layout = layout_of(chosen, samples, record)
        batch = replace(to_tensors(corrupt(layout, recipe.objective, 1)), tokens_per_target=TOKENS_PER_TARGET)
        parts["layout"].append(seconds(lambda: layout_of(chosen, samples, record), 20))  # noqa: B023 - called here and now
        parts["corruption"].append(seconds(lambda: corrupt(layout, recipe.objective, 1), 20))  # noqa: B023 - called here and now
        parts["step"].append(seconds(lambda: module(batch).loss.backward(), 1))  # noqa: B023 - called here and now
    return {"family": name, "objective": recipe.objective.name, "residues": batch.num_residues} | {
        part: statistics.median(found) for part, found in parts.items()
    }


def report(rows: list[dict[str, Any]], out: Path) -> None:
    """JSON and a Markdown table."""
    hardware = describe()
    (out / "objectives.json").write_text(json.dumps({"hardware": hardware, "rows": rows}, indent=1) + "\n")
    lines = ["# What corruption costs beside a step of the size `small`, one CPU thread, fp32", ""]
    lines += ["| family | objective | layout, ms | corruption, ms | forward and backward, ms | corruption / step |", "|---|---|---|---|---|---|"]
    for row in rows:
        times = " | ".join(f"{1e3 * row[part]:,.2f}" for part in ("layout", "corruption", "step"))
        lines.append(f"| {row['family']} | {row['objective']} | {times} | {row['corruption'] / row['step']:.3%} |")
    (out / "objectives.md").write_text("\n".join([*lines, "", f"About {rows[0]['residues']:,} residues a batch.", "", hardware["line"], ""]))


def main() -> None:
    """Every family once."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--families", default=",".join(FAMILIES))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in arguments.families.split(","):
        rows.append(family(name, arguments.sequences))
        print(json.dumps(rows[-1]), flush=True)
        report(rows, arguments.out)


if __name__ == "__main__":
    main()
