"""What the files of several families in HuggingFace folders have in common: how settings are written and read, tokenizer settings, tensor names."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from ..architecture import Vocabulary
from ..config import parse
from ..errors import ConfigError

Shape = TypeVar("Shape")


@dataclass(frozen=True)
class Keys:
    """Which settings of config.json belong to which fields of our shape, and which have to be as they are."""

    needed: Mapping[str, str]
    """Field -> key that must be there."""
    with_default: Mapping[str, str]
    """Field -> key that may be missing, which means the field's own default."""
    fixed: Mapping[str, tuple[Any, ...]]
    """Key -> what this project's modules compute; the first value is written, a missing key means the same."""

    @property
    def by_field(self) -> dict[str, str]:
        """Field -> key."""
        return {**self.needed, **self.with_default}

    def write(self, shape: object) -> dict[str, Any]:
        """The settings of a shape, and the fixed ones."""
        return {theirs: getattr(shape, ours) for ours, theirs in self.by_field.items()} | {key: choices[0] for key, choices in self.fixed.items()}

    def differences(self, values: Mapping[str, Any], *, also_needed: Iterable[str] = ()) -> list[str]:
        """What is missing, or is not as it has to be, a line each."""
        missing = [f"{key} is missing" for key in (*self.needed.values(), *also_needed) if key not in values]
        return missing + [
            f"{key} is {values[key]!r}, this architecture has {choices[0]!r}"
            for key, choices in self.fixed.items()
            if key in values and values[key] not in choices
        ]

    def read(self, kind: type[Shape], values: Mapping[str, Any], **more: object) -> tuple[Shape | None, list[str]]:
        """The shape that the settings and `more` of its fields make, or None and why they make none."""
        found = {ours: values[theirs] for ours, theirs in self.by_field.items() if theirs in values}
        try:
            return parse(kind, found | more, source="its shape"), []
        except ConfigError as error:
            return None, [str(error)]


def tokenizer_settings(settings: Mapping[str, Any], special: Mapping[str, Any]) -> dict[str, bytes]:
    """The two files that every tokenizer has beside its vocabulary; `special` says which token is what."""
    files = {"tokenizer_config.json": {**settings, **special}, "special_tokens_map.json": special}
    return {name: json_file(values) for name, values in files.items()}


def json_file(values: Mapping[str, Any]) -> bytes:
    """As every JSON file of a tokenizer is written."""
    return (json.dumps(values, indent=1) + "\n").encode("ascii")


def vocabulary_file(vocabulary: Vocabulary) -> bytes:
    """A token a line."""
    return ("\n".join(vocabulary.tokens) + "\n").encode("ascii")


def with_biases(modules: Mapping[str, str]) -> dict[str, str]:
    """Names of tensors: weight and bias of each module."""
    return {f"{ours}.{part}": f"{theirs}.{part}" for ours, theirs in modules.items() for part in ("weight", "bias")}


def embedding_tables(prefix: str) -> dict[str, str]:
    """Names of the tables that BERT and its relatives look words, positions and token types up in."""
    tables = {"words": "word_embeddings", "positions": "position_embeddings", "token_types": "token_type_embeddings"}
    return {f"embeddings.{ours}.weight": f"{prefix}.embeddings.{theirs}.weight" for ours, theirs in tables.items()}


def rows_of(tokens: list[str], vocabulary: Vocabulary) -> list[int]:
    """For each of our tokens its row among a folder's; signs that no protein has take the rows that are left."""
    rows = {token: tokens.index(token) for token in vocabulary.tokens if token in tokens}
    left = iter(row for row in range(len(tokens)) if row not in rows.values())
    return [rows[token] if token in rows else next(left) for token in vocabulary.tokens]
