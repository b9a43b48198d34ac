"""The tasks of `preprocess` and their results as JSON, for nodes that share nothing with the main process but files.

Not pickle, which runs what it reads: a file names a type or a function of the tables below, and nothing else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError
from .alphabet import Rules
from .assembly import ShardPlan, Stretch, write_shard
from .checking import Finding, check_shard
from .duplicates import Duplicates, DuplicatesTask, find_duplicates
from .index import ShardEntry
from .pieces import Piece, Totals
from .scan import ScanResult, ScanTask, scan
from .sources import Source
from .splitting import Holdout
from .statistics import Tally

FUNCTIONS: dict[str, Callable[[Any], Any]] = {function.__name__: function for function in (scan, find_duplicates, write_shard, check_shard)}
"""What may be done elsewhere, because doing it twice leaves the same files; dropping rows of a piece is not among it."""
_NOUNS = (ScanTask, ScanResult, Source, Rules, Holdout, Tally, Piece, Totals, DuplicatesTask, Duplicates, ShardPlan, Stretch, ShardEntry, Finding)
_TYPES: dict[str, type[Any]] = {noun.__name__: noun for noun in _NOUNS}


def encode(value: Any) -> Any:
    """A task or a result as JSON values; types that JSON lacks become an object of one key that names them."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, np.integer):
        return int(value)
    if isinstance(value, Path):
        return {"path": str(value)}
    if isinstance(value, np.ndarray):
        return {"int64": value.astype(np.int64).tolist()}
    if isinstance(value, tuple):
        return {"tuple": [encode(one) for one in value]}
    if isinstance(value, list):
        return [encode(one) for one in value]
    if isinstance(value, Mapping):
        kind = "counter" if isinstance(value, Counter) else "map"
        return {kind: [[encode(key), encode(one)] for key, one in value.items()]}
    if is_dataclass(value) and _TYPES.get(type(value).__name__) is type(value):
        return {type(value).__name__: {field.name: encode(getattr(value, field.name)) for field in fields(value)}}
    raise TypeError(f"{type(value).__name__} is not part of a task")


def decode(value: Any) -> Any:
    """What `encode` made JSON of. Raises DataError for anything that it cannot have written."""
    if not isinstance(value, (dict, list)):
        return value
    try:
        return _decoded(value)
    except (TypeError, ValueError, KeyError, OverflowError) as error:
        raise DataError(f"this is no task of prottrans preprocess ({type(error).__name__}: {error})") from error


def _decoded(value: Any) -> Any:
    if isinstance(value, list):
        return [decode(one) for one in value]
    ((kind, content),) = value.items()
    if kind == "path":
        return Path(content)
    if kind == "int64":
        return np.array(content, np.int64)
    if kind == "tuple":
        return tuple(decode(one) for one in content)
    if kind in ("counter", "map"):
        found = {decode(key): decode(one) for key, one in content}
        return Counter(found) if kind == "counter" else found
    return _TYPES[kind](**{name: decode(one) for name, one in content.items()})
