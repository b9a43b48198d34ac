"""`prottrans pretrain --lr-range`: the recipe as a short sweep of the learning rate, and what follows when it has run.

Smith 2017, Cyclical Learning Rates for Training Neural Networks, section 3.3. The sweep is a run like any other, on the
same machine with the same ranks; its recipe differs in the schedule, so it has a run directory of its own.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from .. import errors, json_lines, terminal
from ..errors import ConfigError
from ..recipe import Divergence, Recipe, Validation
from ..stage import run_stage

if TYPE_CHECKING:
    from .gang import Plan

DEFAULT_STEPS, FEWEST_STEPS = 100, 20
_SPAN = 100.0
"""The default range: so many times below and above the recipe's peak."""


class Choices(Protocol):
    """What the sweep needs of a command line."""

    @property
    def lr_range(self) -> str | None:
        """LOW:HIGH, or empty."""

    @property
    def steps(self) -> int | None:
        """Steps of the sweep."""

    @property
    def chain(self) -> int | str | None:
        """Jobs of a chain."""

    @property
    def detach(self) -> bool:
        """In the background."""


def sweep(recipe: Recipe, choices: Choices) -> Recipe:
    """The recipe whose first phase sweeps the rate, from the same start with the same batches. Raises ConfigError for nonsense."""
    if choices.chain is not None or choices.detach:
        raise ConfigError("--lr-range is a short run whose result is printed at its end: it goes with neither --chain nor --detach")
    steps = choices.steps or DEFAULT_STEPS
    if steps < FEWEST_STEPS:
        raise ConfigError(f"--lr-range needs at least --steps {FEWEST_STEPS} to see a curve, not {steps}")
    peak = recipe.phases[0].learning_rate or recipe.optimizer.learning_rate
    low, high = _range(choices.lr_range or "", peak)
    phase = replace(recipe.phases[0], steps=steps, warmup_steps=0, warmup_epochs=None, learning_rate=None)
    return replace(
        recipe,
        phases=(phase,),
        optimizer=replace(recipe.optimizer, learning_rate=high),
        schedule=replace(recipe.schedule, decay="exponential_rise", first_fraction=low / high),
        checkpoint=replace(recipe.checkpoint, every_steps=steps),
        validation=Validation(),
        non_finite_limit=1,
        divergence=Divergence(action="log", window=10**9),  # it is meant to diverge: nothing to tell
    )


def _range(text: str, peak: float) -> tuple[float, float]:
    if not text:
        return peak / _SPAN, peak * _SPAN
    parts = text.split(":")
    try:
        low, high = (float(part) for part in parts)
    except ValueError:
        raise ConfigError(f"--lr-range {text!r} is not of the form LOW:HIGH, as in --lr-range 1e-5:1e-1") from None
    if not (low > 0.0 and math.isfinite(high) and high >= 2.0 * low):
        raise ConfigError(f"--lr-range {text!r}: LOW must be above 0, and HIGH at least twice LOW")
    return low, high


def is_over(plan: Plan) -> bool:
    """Whether the sweep has ended, at its last step or at non-finite numbers: there or in a batch job of before."""
    events = json_lines.read(plan.run_dir.history)
    return bool(events) and events[-1].get("event") == "stop" and events[-1].get("exit_code") in (errors.DONE, errors.NUMERICS)


def conclude(plan: Plan, code: int) -> int:
    """Write and print what the sweep found; non-finite numbers end it before its last step, as they may. Returns the exit code."""
    if code not in (errors.DONE, errors.NUMERICS):
        terminal.warn(f"the sweep ended with exit code {code}; the same command goes on with it. Logs: {plan.run_dir.node_log(0).parent}")
        return code
    run_stage("lr-range", {"run_dir": str(plan.run_dir.path)})
    return errors.DONE
