"""What can be known to be wrong with a training run before anything is started, without torch and without reading shards."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import architecture
from ..architecture import Architecture, Size
from ..errors import CheckpointError, ConfigError, DataError
from ..recipe import Recipe

_INDEX = "index.json"


@dataclass(frozen=True)
class CorpusFacts:
    """What the index of a corpus says; the shards themselves are verified by the ranks."""

    path: Path
    """Absolute."""
    sha256: str
    """Of index.json, which holds the SHA-256 of every shard."""
    train_sequences: int
    train_residues: int
    validation_sequences: int
    num_bytes: int = 0
    """Of all shards."""

    @property
    def mean_residues(self) -> float | None:
        """Mean length of a training sequence; None where nothing is known of the corpus."""
        return self.train_residues / self.train_sequences if self.train_sequences else None


def check_model(recipe: Recipe) -> tuple[Architecture, Size]:
    """The architecture and size that a recipe names. Raises ConfigError when they, the objective or the lengths do not go together."""
    chosen = architecture.get(recipe.architecture.name)
    size = chosen.size(recipe.architecture.size)
    if recipe.objective.name not in chosen.objectives:
        raise ConfigError(f"{chosen.name} is trained with {', '.join(chosen.objectives)}, not with the objective {recipe.objective.name!r}")
    if chosen.lanes and recipe.order.long_sequences == "split":
        raise ConfigError(f'order.long_sequences is "split", but the lanes of {chosen.name} read whole proteins of any length, piece by piece: leave it out')
    positions = getattr(size.shape, "max_positions", None)
    special = len(chosen.vocabulary.prefix) + len(chosen.vocabulary.suffix)
    for number, phase in enumerate(recipe.phases):
        if positions is not None and phase.max_residues + special > positions:
            raise ConfigError(
                f"phases.{number}.max_residues is {phase.max_residues}, but {chosen.name} {recipe.architecture.size} has {positions} positions, "
                f"{special} of them for special tokens: at most {positions - special} residues"
            )
    return chosen, size


def sets_bins(settings: Sequence[str]) -> bool:
    """Whether a person has chosen the size of the micro batches with --set."""
    return any(setting.partition("=")[0].strip() == "loading.bin_residues" for setting in settings)


def read_corpus_facts(corpus: Path, *, must_exist: bool = True) -> CorpusFacts:
    """Read a corpus's index. Raises CheckpointError when there is none, DataError when it is damaged, empty or a shard is missing.

    A dry run may be for another machine, where the corpus is: then nothing is known of it (`sha256` is "").
    """
    path = corpus.absolute() / _INDEX
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        if not must_exist:
            return CorpusFacts(path.parent, "", 0, 0, 0)
        raise CheckpointError(f"{corpus} is no corpus: it has no {_INDEX}. Make one with: prottrans preprocess FASTA --out {corpus}") from None
    try:
        splits = json.loads(content)["splits"]
        train, validation = splits["train"], splits["validation"]
        shards = [(str(shard["file"]), int(shard["bytes"])) for shard in (*train["shards"], *validation["shards"])]
        facts = CorpusFacts(
            path.parent,
            hashlib.sha256(content).hexdigest(),
            int(train["sequences"]),
            int(train["residues"]),
            int(validation["sequences"]),
            num_bytes=sum(num_bytes for _, num_bytes in shards),
        )
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{path} is damaged: {type(error).__name__}: {error}. Make the corpus again with prottrans preprocess") from error
    for name, num_bytes in shards:
        _check_shard(path.parent / name, num_bytes)
    if facts.train_sequences == 0:
        raise DataError(f"{corpus} has no training sequences ({facts.validation_sequences} are held out for validation): add sequences or lower --validation")
    return facts


def remarks(recipe: Recipe, corpus: CorpusFacts) -> list[str]:
    """What works but may surprise, one line each."""
    if not corpus.sha256:
        return [f"{corpus.path} is not on this machine; it must be where the job runs"]
    lines = []
    if recipe.validation.every_steps and not corpus.validation_sequences:
        lines.append("the corpus has no validation split (preprocess with --validation 0.01 to get one): no validation loss is measured")
    largest = max((phase.global_batch_size or 0 for phase in recipe.phases), default=0)
    if largest > corpus.train_sequences:
        lines.append(f"a step takes {largest:,} sequences, the corpus has {corpus.train_sequences:,}: a step sees some of them more than once")
    return lines


def _check_shard(shard: Path, num_bytes: int) -> None:
    status = shard.stat() if shard.is_file() else None
    if status is None:
        raise DataError(f"the shard {shard} is missing: make the corpus again with prottrans preprocess")
    if status.st_size != num_bytes:
        raise DataError(f"the shard {shard} has {status.st_size} bytes, {num_bytes} were written: make the corpus again with prottrans preprocess")


def model_line(recipe: Recipe, chosen: Architecture, size: Size) -> str:
    """The model in one line for a person."""
    shape: Any = size.shape
    return f"{chosen.name} {recipe.architecture.size}, {chosen.num_parameters(shape):,} parameters"
