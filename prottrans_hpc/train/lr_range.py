"""What a sweep of the learning rate found: where the loss is lowest, where it diverges, a peak to try; a table and a picture.

Smith 2017, Cyclical Learning Rates for Training Neural Networks, section 3.3. Losses are smoothed, as a step's batch is
small; a sweep of a hundred steps shows the order of magnitude, no more.
"""

from __future__ import annotations

import csv
import io
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .. import durable, json_lines
from ..errors import CheckpointError, missing_package
from ..run_dir import RunDir, read_run
from ..stage import Request
from .curve import running_mean
from .schedule import learning_rate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TABLE, PICTURE = "lr_range.csv", "lr_range.png"
_GAIN_LOST, _SIGMAS = 0.25, 3.0
"""The loss has diverged when it lost a quarter of what was gained, and rose by more than noise: three deviations of a single step."""
_SAFETY = 3.0
"""The suggested peak stays so many times below where the loss diverged."""


@dataclass(frozen=True)
class Sweep:
    """The steps of a sweep, from the lowest rate to the highest that was reached."""

    title: str
    rates: tuple[float, ...]
    losses: tuple[float | None, ...]
    """Nats a target; None where it was not finite."""
    smooth: tuple[float, ...]
    """Of the steps before the first that was not finite."""
    lowest: int
    """Step of the lowest smooth loss before the divergence."""
    diverged: int | None

    @property
    def suggested(self) -> float:
        """A peak to try: where the loss was lowest, or well below where it diverged, whichever is less."""
        limit = self.rates[self.diverged] / _SAFETY if self.diverged is not None else self.rates[self.lowest]
        return min(self.rates[self.lowest], limit)


def report(request: Request) -> None:
    """The stage: `{run_dir: str}`; writes the table and the picture into the run directory and prints the result."""
    run_dir = RunDir(Path(request["run_dir"]))
    found = read_sweep(run_dir)
    with durable.new_file(run_dir.path / PICTURE) as temporary:
        draw(found).savefig(temporary, format="png")
    durable.write_bytes(run_dir.path / TABLE, render_table(found).encode())
    print("\n".join([*summary(found), f"table           {run_dir.path / TABLE}", f"picture         {run_dir.path / PICTURE}"]))


def read_sweep(run_dir: RunDir) -> Sweep:
    """The sweep in a run directory. Raises CheckpointError when it has too few steps."""
    lines, run = json_lines.read(run_dir.metrics), read_run(run_dir)
    rates, losses = [line["lr"] for line in lines], [line["loss"] for line in lines]
    if len(lines) < run.last_step:  # non-finite numbers end a sweep, before its step is recorded
        rates, losses = [*rates, learning_rate(run.recipe, len(lines))], [*losses, None]
    try:
        return analyse(run.recipe_name, rates, losses)
    except ValueError as error:
        raise CheckpointError(f"{run_dir.path} has no sweep to read: {error}") from error


def analyse(title: str, rates: list[float], losses: list[float | None]) -> Sweep:
    """Find the lowest loss and where it diverges. Raises ValueError when fewer than 5 steps were finite."""
    count = next((step for step, loss in enumerate(losses) if loss is None), len(losses))
    finite = [loss for loss in losses[:count] if loss is not None]
    if count < 5:
        raise ValueError(f"only {count} steps with a finite loss")
    smooth = [loss for _, loss in running_mean(tuple(enumerate(finite)), width=2 * (len(losses) // 20) + 1)]
    noise = 1.4826 * statistics.median(abs(loss - mean) for loss, mean in zip(finite, smooth, strict=True))
    lowest, diverged = 0, None
    for step, loss in enumerate(smooth):
        if loss < smooth[lowest]:
            lowest = step
        elif loss - smooth[lowest] > max(_GAIN_LOST * (smooth[0] - smooth[lowest]), _SIGMAS * noise):
            diverged = step
            break
    if diverged is None and count < len(losses):
        diverged = count
    return Sweep(title, tuple(rates), tuple(losses), tuple(smooth), lowest, diverged)


def render_table(found: Sweep) -> str:
    """CSV: step, lr, loss (empty where not finite), smooth."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(("step", "lr", "loss", "smooth"))
    for step, (rate, loss) in enumerate(zip(found.rates, found.losses, strict=True)):
        writer.writerow((step + 1, repr(rate), "" if loss is None else repr(loss), repr(found.smooth[step]) if step < len(found.smooth) else ""))
    return stream.getvalue()


def draw(found: Sweep) -> Figure:
    """Loss over rate. Raises ResourceError when matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise missing_package("matplotlib", "plots", "the picture of a sweep") from error
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    finite = [(rate, loss) for rate, loss in zip(found.rates, found.losses, strict=True) if loss is not None]
    axes.plot(*zip(*finite, strict=True), color="tab:blue", alpha=0.3, linewidth=0.8, label="each step")
    axes.plot(found.rates[: len(found.smooth)], found.smooth, color="tab:blue", label="smooth")
    axes.axvline(found.suggested, color="tab:green", linestyle="--", label=f"suggested peak {found.suggested:.2g}")
    if found.diverged is not None:
        axes.axvline(found.rates[found.diverged], color="tab:red", linestyle=":", label=f"diverged at {found.rates[found.diverged]:.2g}")
    axes.set(title=found.title, xlabel="learning rate", ylabel="loss, nats a target", xscale="log", ylim=_limits(found))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return figure


def _limits(found: Sweep) -> tuple[float, float]:
    """What a diverged loss reaches must not flatten the rest."""
    low, first = found.smooth[found.lowest], found.smooth[0]
    height = max(first - low, 0.1)
    return low - 0.2 * height, first + 1.5 * height


def summary(found: Sweep) -> list[str]:
    """The result in a few lines of text."""
    rates = found.rates
    where = f"at a learning rate of {rates[found.diverged]:.2g}" if found.diverged is not None else f"nowhere up to a learning rate of {rates[-1]:.2g}"
    return [
        f"swept           {len(rates)} steps from {rates[0]:.2g} to {rates[-1]:.2g}",
        f"lowest loss     {found.smooth[found.lowest]:.3f} at a learning rate of {rates[found.lowest]:.2g} (began at {found.smooth[0]:.3f})",
        f"diverged        {where}",
        f"suggested peak  {found.suggested:.2g}",
    ]
