"""HuggingFace model folders, in and out, for any architecture: what is the same for all of them.

What differs (configuration keys, tensor names, tokenizer files) is an architecture's `HuggingFaceLayout`.
Nothing here needs the transformers library.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .. import durable
from ..architecture import Architecture, Vocabulary
from ..errors import CheckpointError, ConfigError, DataError
from ..stage import find
from . import weight_files
from .weight_files import Tensors, listed

CONFIG = "config.json"


@dataclass(frozen=True)
class HuggingFaceLayout:
    """How one family of models lies in a HuggingFace folder."""

    model_type: str
    """The `model_type` of config.json."""
    classes: tuple[str, ...]
    """What `architectures` in config.json may name; the published folders have no model_type."""
    write_config: Callable[[Any], dict[str, Any]]
    """`(shape)` -> config.json."""
    read_config: Callable[[Mapping[str, Any], frozenset[str]], tuple[Any, list[str]]]
    """`(config.json, names of the tensors)` -> the shape, or None, and what this project cannot represent, a line each."""
    names: Callable[[Any], dict[str, str]]
    """`(shape)` -> the name in the folder of each tensor of our state dict."""
    aliases: Mapping[str, str]
    """Second names of shared tensors: alias -> name. Never written; where one is read, it must be equal."""
    ignored: frozenset[str]
    """Tensors without information, to be skipped."""
    tokenizer_files: Callable[[Vocabulary], dict[str, bytes]]
    """`(vocabulary)` -> the tokenizer's files."""
    tokenizer_problems: Callable[[Path, Vocabulary], list[str]]
    """`(folder, vocabulary)` -> how the folder's vocabulary differs, a line each."""
    usage: str
    """Python that opens the exported folder whose path is `folder`, for the model card."""
    own_keys: frozenset[str] = frozenset()
    """Keys by which a config.json is known that has neither model_type nor architectures; empty where none tells."""
    token_rows: tuple[str, ...] = ()
    """Our tensors with a row a token, to be sorted as `row_order` says."""
    row_order: Callable[[Path, Vocabulary], list[int]] | None = None
    """`(folder, vocabulary)` -> for each of our tokens its row in the folder, for families whose vocabularies come in several orders."""
    encoder_of: Callable[[Any], Any] | None = None
    """`(shape)` -> the shape of its encoder alone, for families that have a decoder too."""
    companions: Mapping[str, Companion] = field(default_factory=dict)
    """Subfolder -> a second model that is trained with this one, where the shape has one."""


@dataclass(frozen=True)
class Companion:
    """A model that shares tensors with another and lies in a folder within its folder: ELECTRA's generator."""

    layout: HuggingFaceLayout
    """Its `names` are empty for a shape without it."""
    join: Callable[[Any, Any], tuple[Any, list[str]]]
    """`(shape of the main model, what the companion's config.json says)` -> the shape of both, and in what they do not fit, a line each."""


@dataclass(frozen=True)
class Imported:
    """A HuggingFace folder, read and checked."""

    record: Architecture
    shape: Any
    weights: Tensors
    """fp32, by our names."""
    notes: tuple[str, ...]
    """What was changed on the way, a line each."""


def layout_of(record: Architecture) -> HuggingFaceLayout:
    """The layout of an architecture. Raises ConfigError when it has none."""
    layout = find(record.huggingface) if record.huggingface else None
    if not isinstance(layout, HuggingFaceLayout):
        raise ConfigError(f"the architecture {record.name} has no HuggingFace layout")
    return layout


def write_folder(out: Path, *, record: Architecture, shape: Any, weights: Tensors, card: str, dtype: torch.dtype = torch.float32) -> None:
    """Write a folder that AutoModel and AutoTokenizer open; durable, with a manifest.

    Raises ConfigError when `out` exists, DataError when a weight leaves the range of `dtype`.
    """
    if out.exists():
        raise ConfigError(f"{out} exists already; choose a new folder, or remove it first")
    layout = layout_of(record)
    with durable.new_folder(out) as folder:
        _write_model(folder, layout, record=record, shape=shape, weights=weights, dtype=dtype)
        for name, companion in layout.companions.items():
            if companion.layout.names(shape):
                (folder / name).mkdir()
                _write_model(folder / name, companion.layout, record=record, shape=shape, weights=weights, dtype=dtype)
                durable.seal_folder(folder / name)
        durable.write_bytes(folder / "README.md", card.encode())


def _write_model(folder: Path, layout: HuggingFaceLayout, *, record: Architecture, shape: Any, weights: Tensors, dtype: torch.dtype) -> None:
    durable.write_json(folder / CONFIG, layout.write_config(shape) | {"dtype": str(dtype).removeprefix("torch.")})
    for name, content in layout.tokenizer_files(record.vocabulary).items():
        durable.write_bytes(folder / name, content)
    tensors = {theirs: weights[ours] for ours, theirs in layout.names(shape).items()}
    weight_files.write_weights(folder / weight_files.SAFETENSORS, tensors, dtype)


def read_folder(folder: Path, records: list[Architecture]) -> Imported:
    """Read a model folder as whichever of `records` it belongs to.

    Raises CheckpointError when it is no model folder, ConfigError when its configuration or vocabulary is foreign
    (naming every difference), DataError when a file is damaged.
    """
    record, layout = _choose(_read_config(folder), records, source=folder / CONFIG)
    models = {folder: layout} | {folder / name: companion.layout for name, companion in layout.companions.items() if (folder / name).is_dir()}
    tensors = {place: weight_files.read_weights(place) for place in models}
    shape, *others = (_read_shape(place, each, record, frozenset(tensors[place])) for place, each in models.items())
    for place, other in zip(list(models)[1:], others, strict=True):
        shape, problems = layout.companions[place.name].join(shape, other)
        _refuse(place, record, problems)
    weights: Tensors = {}
    notes: list[str] = []
    for place, each in models.items():
        found, remarks = _translate(tensors[place], each, shape, record, source=place)
        unequal = [name for name in found.keys() & weights.keys() if not torch.equal(found[name], weights[name])]
        if unequal:
            raise DataError(f"{place} and {folder} differ in tensors that {record.name} shares: {listed(sorted(unequal))}")
        weights, notes = weights | found, notes + remarks
    return Imported(record, shape, weights, tuple(dict.fromkeys(notes)))


def _read_shape(folder: Path, layout: HuggingFaceLayout, record: Architecture, tensors: frozenset[str]) -> Any:
    problems = layout.tokenizer_problems(folder, record.vocabulary)
    shape, differences = layout.read_config(_read_config(folder), tensors)
    _refuse(folder, record, [f"{CONFIG}: {line}" for line in differences] + problems)
    return shape


def _refuse(folder: Path, record: Architecture, problems: list[str]) -> None:
    if problems:
        raise ConfigError(f"{folder} cannot be read as {record.name}: {'; '.join(problems)}")


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise CheckpointError(f"{folder} is not a HuggingFace model folder: it has no {CONFIG}")
    values = durable.read_json(path)
    if not isinstance(values, dict):
        raise DataError(f"{path} is damaged: it holds a {type(values).__name__}, not a table of settings")
    return values


def _choose(config: Mapping[str, Any], records: list[Architecture], *, source: Path) -> tuple[Architecture, HuggingFaceLayout]:
    named = config.get("architectures")
    classes = set(named) if isinstance(named, list) else set()
    layouts = [(record, layout_of(record)) for record in records if record.huggingface]
    for record, layout in layouts:
        own = bool(layout.own_keys) and layout.own_keys <= config.keys() and "architectures" not in config
        if config.get("model_type") == layout.model_type or ("model_type" not in config and (classes & set(layout.classes) or own)):
            return record, layout
    known = "; ".join(f"{record.name}: model_type {layout.model_type!r} or architectures {' / '.join(layout.classes)}" for record, layout in layouts)
    raise ConfigError(f"{source} has model_type {config.get('model_type')!r} and architectures {named!r}; what can be imported is {known}")


def _translate(theirs: Tensors, layout: HuggingFaceLayout, shape: Any, record: Architecture, *, source: Path) -> tuple[Tensors, list[str]]:
    theirs = _without_aliases(theirs, layout, source=source)
    names = layout.names(shape)
    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in find(record.build)(shape).state_dict().items()}
    missing = [name for name in names.values() if name not in theirs]
    foreign = sorted(theirs.keys() - set(names.values()))
    misshapen = [
        f"{name} is {list(theirs[name].shape)}, not {list(expected[ours])}"
        for ours, name in names.items()
        if name in theirs and tuple(theirs[name].shape) != expected[ours]
    ]
    found = {"missing": missing, "not part of the model": foreign, "of another shape": misshapen}
    faults = [f"{what}: {listed(some)}" for what, some in found.items() if some]
    if faults:
        raise DataError(f"the weights in {source} are not those of the {record.name} that its {CONFIG} describes; {'; '.join(faults)}")
    converted = [name for name in names.values() if theirs[name].dtype != torch.float32]
    notes = [f"{len(converted)} tensors were converted to fp32 (from {theirs[converted[0]].dtype})"] if converted else []
    weights = {ours: theirs[name].float().contiguous() for ours, name in names.items()}
    return weights, notes + _sort_rows(weights, layout, record.vocabulary, source=source)


def _sort_rows(weights: Tensors, layout: HuggingFaceLayout, vocabulary: Vocabulary, *, source: Path) -> list[str]:
    """Bring the rows of the tokens into the order of our vocabulary; returns a note when that changed anything."""
    order = layout.row_order(source, vocabulary) if layout.row_order else []
    if order == sorted(order):
        return []
    for name in layout.token_rows:
        weights[name] = weights[name][order].contiguous()
    return ["the folder's vocabulary has another order: the rows of its tokens were sorted into this architecture's"]


def _without_aliases(theirs: Tensors, layout: HuggingFaceLayout, *, source: Path) -> Tensors:
    kept = {name: tensor for name, tensor in theirs.items() if name not in layout.ignored and name not in layout.aliases}
    for alias, name in layout.aliases.items():
        if alias in theirs and not torch.equal(theirs[alias], kept.setdefault(name, theirs[alias])):
            raise DataError(f"in {source}, {alias} is not equal to {name}; this architecture shares them")
    return kept
