"""The learning rate as a pure function of the step: per phase a linear warm-up, then a decay.

Steps count from 0: step `i` is the one that follows `i` finished optimizer steps. The warm-up of w steps gives
peak * 1/w, ..., peak, so that no step is wasted on a rate of zero and the peak is really reached.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from ..errors import ConfigError
from ..recipe import Phase, Recipe, Schedule


def phase_of(recipe: Recipe, step: int) -> tuple[int, Phase, int]:
    """The phase that a step belongs to: its index, itself, and the step's number within it, from 0."""
    start = 0
    for index, phase in enumerate(recipe.phases):
        if 0 <= step - start < phase.steps:
            return index, phase, step - start
        start += phase.steps
    raise ValueError(f"step {step} is not one of this recipe's {recipe.num_steps}, which count from 0")


def learning_rate(recipe: Recipe, step: int) -> float:
    """The rate of the optimizer step that follows `step` finished ones. Raises ConfigError where a warm-up is still in epochs."""
    number, phase, done = phase_of(recipe, step)
    if phase.warmup_epochs is not None:
        raise ConfigError(f"phases.{number}.warmup_epochs is not in steps: `prottrans pretrain` works them out when it makes the run")
    peak = phase.learning_rate or recipe.optimizer.learning_rate
    if done < phase.warmup_steps:
        return peak if recipe.schedule.warmup == "constant" else peak * (done + 1) / phase.warmup_steps
    return peak * DECAYS[recipe.schedule.decay](phase, recipe.schedule, done)


def _constant(phase: Phase, schedule: Schedule, done: int) -> float:
    return 1.0


def _linear(phase: Phase, schedule: Schedule, done: int) -> float:
    """Devlin et al. 2019, appendix A.2: from the peak down to `final_fraction`, reached when the phase is over."""
    return 1.0 - (1.0 - schedule.final_fraction) * _progress(phase, done)


def _cosine(phase: Phase, schedule: Schedule, done: int) -> float:
    """Loshchilov and Hutter 2017, equation 5, one period a phase."""
    return schedule.final_fraction + (1.0 - schedule.final_fraction) * 0.5 * (1.0 + math.cos(math.pi * _progress(phase, done)))


def _inverse_square_root(phase: Phase, schedule: Schedule, done: int) -> float:
    """Raffel et al. 2020, section 3.1.2: 1/sqrt(max(n, k)) for warm-up k, scaled so that step k has the peak."""
    return math.sqrt(max(phase.warmup_steps, 1) / (done + 1))


def _exponential_rise(phase: Phase, schedule: Schedule, done: int) -> float:
    """Smith 2017, Cyclical Learning Rates, section 3.3, on a logarithmic axis: each step multiplies the rate alike, the last has the peak."""
    num_rises = phase.steps - phase.warmup_steps - 1
    return float(schedule.first_fraction ** (1.0 - (done - phase.warmup_steps) / max(num_rises, 1)))


def _progress(phase: Phase, done: int) -> float:
    """0 at the first step after the warm-up, 1 when the phase, or its decay, is over."""
    end = phase.decay_steps or phase.steps
    return min(1.0, (done - phase.warmup_steps) / (end - phase.warmup_steps))


DECAYS: dict[str, Callable[[Phase, Schedule, int], float]] = {
    "constant": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "inverse_square_root": _inverse_square_root,
    "exponential_rise": _exponential_rise,
}
