"""What holds up a training at scale: `python benchmarks/scaling.py [--study DIR] [--flips N] [--gigabytes G] [--data FASTA]`.

1. Exposed communication, from the ledger of a study of `prottrans scale` (--study, as scale_slurm.py makes them): the share of a step that
   reductions add, which is what the rank waits that comes last, for it waits for no slower one; nodes share cores here.
   Target: at most 3 % at every size, which is a weak-scaling efficiency of 97 %.
2. Checkpoints: how long a save blocks training, for about one gigabyte, by the clock and by the CPU time of the one thread
   that copies, which other programs cannot lengthen; and which share of a real training's time its saves took, at the
   interval that its recipe has. Targets: 0.2 s a gigabyte, 1 % of the time.
3. Flipped bytes: one byte of a saved checkpoint is changed at a random place of any of its files, and it is loaded. Beside
   ours torch.save, safetensors and torch's distributed checkpoints. Target: all found.

Each part is measured only if its means are there, and keeps its place in results/scaling.json otherwise. Writes results/scaling.json and results/scaling.md.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hardware
import scaling_flips
import torch

from prottrans_hpc.comm import Solo
from prottrans_hpc.profile import measured_steps, scaling
from prottrans_hpc.recipe import Checkpointing, read_recipe
from prottrans_hpc.run_dir import RunDir
from prottrans_hpc.train.saving import Saver

RESULTS = Path(__file__).parent / "results"
MOST_EXPOSED, MOST_BLOCKED_S_PER_GB, MOST_SAVING = 0.03, 0.2, 0.01
TRAINED, BATCH, STEPS = "tiny_prot_bert", 8, 101


def exposed(study_dir: Path) -> dict[str, Any]:
    """Of each size: the median step, which share of it reductions add, and which share a mean rank waits, for slower ones, too."""
    study = scaling.read_scaling(study_dir)
    sizes = measured_steps.sizes_of(study, measured_steps.all_steps(study))
    rows = {
        str(size.nodes): {
            "step_s": size.step_s,
            "exposed_share": size.exposed_comm_s / size.step_s,
            "waiting_share": _waiting_s(study, size.nodes) / size.step_s,
        }
        for size in sizes
    }
    about = {"recipe": study.recipe, "machine": study.machine, "comm": study.comm, "residues_per_node_step": study.residues_per_node_step}
    return {"study": about, "sizes": rows}


def _waiting_s(study: scaling.Scaling, nodes: int) -> float:
    return statistics.median(seconds for point in study.at(nodes) for seconds in point.ledger.exposed_comm_s)


def tensors_of(num_bytes: float) -> dict[str, torch.Tensor]:
    """As many fp32 matrices of ProtBert's feed-forward part as make so many bytes."""
    shape = (1024, 4096)
    return {f"layer.{number}": torch.randn(shape) for number in range(max(1, round(num_bytes / (4 * 1024 * 4096))))}


def blocked(num_bytes: float, rounds: int) -> dict[str, Any]:
    """Seconds a gigabyte that a save blocks on one thread, by the clock and by that thread's CPU time; the first, which allocates, and the later ones."""
    torch.set_num_threads(1)
    tensors = tensors_of(num_bytes)
    gigabytes = sum(tensor.numel() * 4 for tensor in tensors.values()) / 1e9
    clock: list[float] = []
    cpu: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        run = RunDir(Path(folder))
        run.checkpoints.mkdir(parents=True)
        saver = Saver(run, Solo(torch.device("cpu")), Checkpointing(every_steps=1, keep_last=1), start_id="benchmark")
        for step in range(1, rounds + 2):
            began, began_cpu = time.perf_counter(), time.thread_time()
            saver.stage(step, {"format": 1, "step": step}, {"model": tensors, "optimizer": {}})
            saver.start()
            clock.append((time.perf_counter() - began) / gigabytes)
            cpu.append((time.thread_time() - began_cpu) / gigabytes)
            saver.drain()  # a training would go on meanwhile
    series = {"clock": clock, "cpu": cpu}
    figures = {name: {"first": values[0], "median": statistics.median(values[1:]), "best": min(values[1:])} for name, values in series.items()}
    return {"gigabytes": gigabytes, "rounds": rounds, **figures}


def share_of_training(fasta: Path) -> dict[str, Any]:
    """What the saves of a training took of its time, the first one, which allocates, included. Its batch is small, so that saves weigh more."""
    with tempfile.TemporaryDirectory() as folder:
        corpus, run = Path(folder) / "corpus", Path(folder) / "run"
        _prottrans("preprocess", str(fasta), "--out", str(corpus))
        shorter = ("--set", f"phases.0.global_batch_size={BATCH}", "--set", "validation.every_steps=0")
        _prottrans("pretrain", TRAINED, "--corpus", str(corpus), "--run-dir", str(run), "--nodes", "1", "--steps", str(STEPS), *shorter)
        steps = [json.loads(line) for line in RunDir(run).metrics.read_text().splitlines()]
    saves = [step["checkpoint_s"] for step in steps if step["checkpoint_s"]]
    total = sum(step["step_s"] for step in steps)
    every = read_recipe(TRAINED).checkpoint.every_steps
    return {"recipe": TRAINED, "steps": len(steps), "batch": BATCH, "every_steps": every, "saves": len(saves), "share": sum(saves) / total, "training_s": total}


def _prottrans(*arguments: str) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-m", "prottrans_hpc.launch.cli", *arguments], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"prottrans {' '.join(arguments)} ended with {done.returncode}:\n{done.stderr}")


def report(results: dict[str, Any]) -> list[str]:
    """The markdown; parts that were never measured say so."""
    lines = ["# At scale", "", (__doc__ or "").split("\n\n", 1)[1].strip(), ""]
    parts: dict[str, tuple[str, Callable[[dict[str, Any]], list[str]]]] = {
        "exposed": ("Exposed communication", _exposed_lines),
        "saving": ("Checkpoints", _saving_lines),
        "training": ("Share of a training", _training_lines),
        "flips": ("Flipped bytes", _flip_lines),
    }
    for name, (title, write) in parts.items():
        part = results.get(name)
        lines += [f"## {title}", "", *(write(part) if part else ["Not measured yet."]), ""]
        lines += [f"{part['hardware']['line']}; load average {part['load']:.1f} at the start.", ""] if part else []
    return lines


def _exposed_lines(part: dict[str, Any]) -> list[str]:
    study = part["study"]
    lines = [f"{study['recipe']} on {study['machine']} over {study['comm']}, {study['residues_per_node_step']:,.0f} residues a node and step.", ""]
    lines += [
        "The nodes of the testbed are namespaces with a Slurm of their own that share the cores of one computer: steps grow, and the ledger tells why.",
        "",
    ]
    lines += ["| nodes | step s | exposed communication | target | with the wait for slower nodes |", "|---|---|---|---|---|"]
    for nodes, row in part["sizes"].items():
        exposed_percent, waiting_percent = 100 * row["exposed_share"], 100 * row["waiting_share"]
        met = "met" if row["exposed_share"] <= MOST_EXPOSED else "missed"
        lines.append(f"| {nodes} | {row['step_s']:.3f} | {exposed_percent:.2f} % | <= {100 * MOST_EXPOSED:.0f} %: {met} | {waiting_percent:.2f} % |")
    return lines


def _saving_lines(part: dict[str, Any]) -> list[str]:
    met = "met" if part["cpu"]["median"] <= MOST_BLOCKED_S_PER_GB else "missed"
    lines = [f"{part['gigabytes']:.2f} GB, {part['rounds']} saves after the first, staged into a buffer that is kept; a thread writes.", ""]
    lines += ["| blocked, s a GB | first, which allocates | later, median | later, best |", "|---|---|---|---|"]
    names = {"cpu": "CPU time of the one thread that copies", "clock": "by the clock, beside other programs"}
    lines += [f"| {text} | {part[key]['first']:.3f} | {part[key]['median']:.3f} | {part[key]['best']:.3f} |" for key, text in names.items()]
    lines += ["", f"Target: a median of at most {MOST_BLOCKED_S_PER_GB} s a GB, by CPU time: {met}."]
    return lines


def _training_lines(part: dict[str, Any]) -> list[str]:
    met = "met" if part["share"] <= MOST_SAVING else "missed"
    return [
        f"{part['recipe']}, {part['steps']} steps of {part['batch']} proteins; {part['saves']} saves, every {part['every_steps']} steps as in the recipe.",
        f"They took {100 * part['share']:.3f} % of {part['training_s']:.0f} s. Target: at most {100 * MOST_SAVING:.0f} %: {met}.",
    ]


def _flip_lines(part: dict[str, Any]) -> list[str]:
    lines = [f"{part['count']} flips of one byte each, {part['bytes'] / 1e6:.1f} MB of tensors.", ""]
    lines += [
        "What the others find is in the few bytes of their headers.",
        "",
        "| | found | loaded, with other values | loaded, no value changed |",
        "|---|---|---|---|",
    ]
    for name, row in part["ways"].items():
        lines.append(f"| {name} | {row['found']} | {row['wrong']} | {row['same']} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", type=Path, help="folder of a study of prottrans scale, for the exposed communication")
    parser.add_argument("--data", type=Path, help="proteins to train on, for the share of the time that saves take")
    parser.add_argument("--gigabytes", type=float, default=1.0, help="size of the checkpoint (default 1)")
    parser.add_argument("--rounds", type=int, default=5, help="saves after the first (default 5)")
    parser.add_argument("--flips", type=int, default=1000, help="flipped bytes a format (default 1000)")
    given = parser.parse_args()
    file = RESULTS / "scaling.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    about = {"hardware": hardware.describe(), "load": os.getloadavg()[0]}
    if given.study:
        results["exposed"] = about | exposed(given.study)
    if given.rounds:
        results["saving"] = about | blocked(1e9 * given.gigabytes, given.rounds)
    if given.data:
        results["training"] = about | share_of_training(given.data)
    if given.flips:
        results["flips"] = about | scaling_flips.measure(given.flips, random.Random(0))
    RESULTS.mkdir(exist_ok=True)
    file.write_text(json.dumps(results, indent=1) + "\n")
    (RESULTS / "scaling.md").write_text("\n".join(report(results)))
    print("\n".join(report(results)))


if __name__ == "__main__":
    main()
