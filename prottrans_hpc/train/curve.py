"""The loss curve of a run as a picture, from its own records: python -m prottrans_hpc.train.curve RUN_DIR --out loss.png

Works on a finished run and on one that is running. Drawn are the training loss of each step, its running mean, the
validation loss, where the run was resumed, and the entropy of the corpus's residue frequencies: a model that is not
below that line has learned no more than how common each residue is.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .. import durable, errors, json_lines, terminal
from ..corpus.index import INDEX
from ..corpus.statistics import unigram_entropy
from ..errors import CheckpointError, ProttransError, missing_package
from ..run_dir import RunDir, read_run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SMOOTHING_STEPS = 21

Points = tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Curve:
    """What is drawn: steps with losses in nats a predicted residue."""

    title: str
    training: Points
    validation: Points
    resumed_at: tuple[int, ...]
    """Steps that a start went on from."""
    unigram_entropy: float | None
    """Of the corpus's residues, nats; None when the corpus is not there any more."""


def read_curve(run_dir: RunDir) -> Curve:
    """The curve of a run. Raises CheckpointError when the run has not finished a step yet."""
    run = read_run(run_dir)
    training = _losses(run_dir.metrics)
    if not training:
        raise CheckpointError(f"{run_dir.path} has no finished step yet: {run_dir.metrics.name} is empty")
    starts = (event for event in json_lines.read(run_dir.history) if event.get("event") == "start")
    return Curve(
        title=f"{run.recipe_name}, {run.allocation.num_ranks} ranks",
        training=training,
        validation=_losses(run_dir.validation),
        resumed_at=tuple(sorted({int(event["step"]) for event in starts if event.get("step")})),
        unigram_entropy=_unigram_entropy(Path(run.corpus)),
    )


def _losses(path: Path) -> Points:
    return tuple((int(entry["step"]), float(entry["loss"])) for entry in json_lines.read(path) if entry.get("loss") is not None)


def _unigram_entropy(corpus: Path) -> float | None:
    try:
        return unigram_entropy(durable.read_json(corpus / INDEX)["residue_counts"])
    except (OSError, ProttransError, KeyError, TypeError, AttributeError):
        return None


def running_mean(points: Points, width: int = SMOOTHING_STEPS) -> Points:
    """The mean of each point and its neighbours, `width` (odd) in all and fewer at the ends; one that only looked back would lag."""
    losses = [loss for _, loss in points]
    windows = (losses[max(0, middle - width // 2) : middle + width // 2 + 1] for middle in range(len(losses)))
    return tuple((step, sum(window) / len(window)) for (step, _), window in zip(points, windows, strict=True))


def draw(curve: Curve) -> Figure:
    """The picture, without any state of pyplot. Raises ResourceError when matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise missing_package("matplotlib", "plots", "the loss curve") from error
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.plot(*zip(*curve.training, strict=True), color="tab:blue", alpha=0.25, linewidth=0.8, label="training, each step")
    axes.plot(*zip(*running_mean(curve.training), strict=True), color="tab:blue", label=f"training, mean of {SMOOTHING_STEPS} steps")
    if curve.validation:
        axes.plot(*zip(*curve.validation, strict=True), "o-", color="tab:orange", markersize=4, label="validation")
    for number, step in enumerate(curve.resumed_at):
        axes.axvline(step, color="gray", linestyle=":", label="resumed" if number == 0 else None)
    if curve.unigram_entropy is not None:
        axes.axhline(curve.unigram_entropy, color="black", linestyle="--", linewidth=0.8, label=f"residue frequencies alone ({curve.unigram_entropy:.3f})")
    axes.set(title=curve.title, xlabel="optimizer step", ylabel="loss, nats a masked residue")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return figure


def write_curve(run_dir: RunDir, out: Path) -> Curve:
    """Draw a run's curve into a PNG file, durably, and return what was drawn."""
    curve = read_curve(run_dir)
    figure = draw(curve)
    with durable.new_file(out) as temporary:
        figure.savefig(temporary, format="png")
    return curve


def summary(curve: Curve) -> list[str]:
    """The curve in a few lines of text."""
    (first_step, first), (last_step, last) = curve.training[0], running_mean(curve.training)[-1]
    lines = [f"training loss    {first:.3f} at step {first_step}, {last:.3f} at step {last_step} (nats a masked residue)"]
    if curve.validation:
        lines.append(f"validation loss  {curve.validation[-1][1]:.3f} at step {curve.validation[-1][0]}")
    if curve.unigram_entropy is not None:
        lines.append(f"to beat          {curve.unigram_entropy:.3f}: the entropy of the residue frequencies")
    if curve.resumed_at:
        lines.append(f"resumed          after step {', '.join(map(str, curve.resumed_at))}")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw the curve of a run directory and print its summary; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m prottrans_hpc.train.curve", description="Draw the loss curve of a run.")
    parser.add_argument("run_dir", type=Path, help="the run directory")
    parser.add_argument("--out", type=Path, help="the PNG file (default: loss.png in the run directory)")
    options = parser.parse_args(arguments)
    try:
        out = options.out or options.run_dir / "loss.png"
        curve = write_curve(RunDir(options.run_dir), out)
    except (ProttransError, OSError) as error:
        print(f"error: {terminal.printable_lines(errors.explain(error))}", file=sys.stderr)
        return errors.exit_code(error)
    print("\n".join([*summary(curve), f"loss curve       {out}"]))
    return errors.DONE


if __name__ == "__main__":
    sys.exit(main())
