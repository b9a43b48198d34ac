"""Epochs as steps: how many steps of a recipe a corpus lasts, and a warm-up given in epochs as the steps that it comes to. Pure."""

from __future__ import annotations

import math
from dataclasses import replace

from ..architecture import Architecture
from ..errors import ConfigError
from ..recipe import Phase, Recipe
from .batch_arithmetic import plan_batches
from .checks import CorpusFacts


def steps_per_epoch(recipe: Recipe, chosen: Architecture, corpus: CorpusFacts) -> list[float]:
    """Of each phase. Exact where a step is a number of whole or cropped sequences, or of lanes; from the mean length elsewhere.

    Raises ConfigError for a corpus that is not known here.
    """
    mean = corpus.mean_residues
    if mean is None:
        raise ConfigError(f"{corpus.path} is not on this machine, so how many steps an epoch of it has is unknown")
    sizes = [batch.num_sequences for batch in plan_batches(recipe, num_ranks=1, mean_residues=mean)]
    if chosen.lanes:
        num_special = len(chosen.vocabulary.prefix) + len(chosen.vocabulary.suffix)
        num_tokens = corpus.train_residues + num_special * corpus.train_sequences
        return [max(1.0, float(num_tokens // (size * phase.max_residues))) for size, phase in zip(sizes, recipe.phases, strict=True)]
    return [_num_samples(recipe, phase, corpus, mean) / size for size, phase in zip(sizes, recipe.phases, strict=True)]


def _num_samples(recipe: Recipe, phase: Phase, corpus: CorpusFacts, mean: float) -> float:
    fragments = max(1.0, mean / phase.max_residues) if recipe.order.long_sequences == "split" else 1.0
    return corpus.train_sequences * fragments


def resolve_warmup(recipe: Recipe, chosen: Architecture, corpus: CorpusFacts) -> Recipe:
    """The recipe with every `warmup_epochs` as `warmup_steps`, rounded up.

    Raises ConfigError where the corpus is not known, or is so large that a warm-up would exceed its phase.
    """
    if all(phase.warmup_epochs is None for phase in recipe.phases):
        return recipe
    epochs = steps_per_epoch(recipe, chosen, corpus)
    phases = [_resolved(number, phase, epoch) for number, (phase, epoch) in enumerate(zip(recipe.phases, epochs, strict=True))]
    return replace(recipe, phases=tuple(phases))


def _resolved(number: int, phase: Phase, steps_in_epoch: float) -> Phase:
    if phase.warmup_epochs is None:
        return phase
    steps = math.ceil(phase.warmup_epochs * steps_in_epoch)
    most = phase.steps if phase.decay_steps is None else phase.decay_steps - 1
    if steps > most:
        raise ConfigError(
            f"phases.{number}.warmup_epochs = {phase.warmup_epochs:g} is {steps:,} steps of this corpus ({steps_in_epoch:,.1f} steps an epoch), "
            f"but the phase has {'' if most == phase.steps else 'room for '}{most:,}: at most {most / steps_in_epoch:.3g} epochs"
        )
    return replace(phase, warmup_steps=steps, warmup_epochs=None)
