"""How long a training takes, from its arithmetic and the rate of its ranks, and how many chained jobs that is. Pure."""

from __future__ import annotations

import math
from typing import Any

from ..architecture import Architecture
from ..errors import ConfigError
from ..recipe import Recipe
from .batch_arithmetic import PhaseBatch, mean_tokens
from .demand import time_text
from .memory_time import recomputed_share
from .rate import Rate

START_UP_MIN = 5
"""Minutes of each job before its first step: starting ranks, reading the checkpoint."""
MAX_JOBS = 100
"""Sites allow about so many queued jobs a user."""


def estimate_minutes(
    recipe: Recipe, chosen: Architecture, shape: Any, batches: list[PhaseBatch], rate: Rate, *, first_step: int = 0, last_step: int | None = None
) -> float:
    """Minutes from `first_step` to `last_step` (None: the recipe's end), with what `[memory]` has layers compute again; copies are taken to hide behind it."""
    flops_a_rank, begin = 0.0, 0
    for batch, phase in zip(batches, recipe.phases, strict=True):
        end = begin + phase.steps
        num_steps = max(0, min(end, recipe.num_steps if last_step is None else last_step) - max(begin, first_step))
        lengths = [mean_tokens(chosen, batch)]
        flops_of_step = batch.num_sequences * chosen.flops(shape, lengths) * (1.0 + recomputed_share(recipe, chosen, shape, lengths))
        flops_a_rank += num_steps * flops_of_step / (batch.num_ranks - batch.num_idle_ranks)
        begin = end
    return flops_a_rank / rate.flops_per_s / 60.0


def count_jobs(work_min: float, *, walltime_min: int, warning_min: int) -> int:
    """Jobs of a chain that do so much work: each loses its start and the minutes before its end in which it saves. Raises ConfigError."""
    useful = walltime_min - warning_min - START_UP_MIN
    if useful <= 0:
        raise ConfigError(
            f"a job of {time_text(walltime_min)} has no time to work: {START_UP_MIN} minutes to start, {warning_min} to save; take a longer --walltime"
        )
    jobs = max(1, math.ceil(work_min / useful))
    if jobs > MAX_JOBS:
        raise ConfigError(
            f"{time_text(work_min)} of work are {jobs:,} jobs of {time_text(walltime_min)}, more than the {MAX_JOBS} that sites let a user queue: "
            f"take a larger size, or --chain {MAX_JOBS} and the same command again later"
        )
    return jobs
