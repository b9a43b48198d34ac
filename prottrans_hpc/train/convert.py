"""The stages export and import: checkpoints of this project to and from HuggingFace model folders."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .. import __version__, architecture, durable, terminal
from ..architecture import Architecture
from ..errors import ConfigError
from ..models import huggingface
from ..stage import Request
from . import checkpoint
from .position_table import with_positions


def export(request: Request) -> None:
    """Write the model of a run directory or checkpoint in another library's layout."""
    if request["to"] not in _EXPORTS:
        raise ConfigError(f"--to {request['to']!r} is not known; choose from {', '.join(_EXPORTS)}")
    precision = request.get("precision", "fp32")
    if precision not in _PRECISIONS:
        raise ConfigError(f"--precision {precision!r} is not known; choose from {', '.join(_PRECISIONS)}")
    out = Path(request["out"])
    if out.exists():  # before gigabytes are read
        raise ConfigError(f"{out} exists already; choose a new folder, or remove it first")
    source = checkpoint.find_checkpoint(Path(request["source"]))
    values = _export_huggingface(source, out, _EXPORTS[request["to"]], _PRECISIONS[precision], request.get("positions"))
    _report(values, f"exported {values['architecture']} ({values['parameters']:,} parameters, step {values['step']}) to {values['path']}", request["json"])


def _export_huggingface(source: Path, out: Path, choose: Callable[[Architecture, Any], Any], dtype: torch.dtype, num_positions: int | None) -> dict[str, Any]:
    record, shape, weights = checkpoint.load_model(source)
    shape, weights = _resized(record, choose(record, shape), weights, num_positions)
    state = durable.read_json(source / checkpoint.STATE)
    huggingface.write_folder(out, record=record, shape=shape, weights=weights, card=render_card(record, shape, state), dtype=dtype)
    return {"path": str(out), "architecture": record.name, "parameters": record.num_parameters(shape), "step": int(state["step"]), "checkpoint": str(source)}


def _resized(record: Architecture, shape: Any, weights: dict[str, torch.Tensor], num_positions: int | None) -> tuple[Any, dict[str, torch.Tensor]]:
    if num_positions is None:
        return shape, weights
    shape, weights, notes = with_positions(record, shape, weights, num_positions)
    for line in notes:
        terminal.note(line)
    return shape, weights


def _whole(record: Architecture, shape: Any) -> Any:
    return shape


def _encoder(record: Architecture, shape: Any) -> Any:
    encoder_of = huggingface.layout_of(record).encoder_of
    if encoder_of is None:
        raise ConfigError(f"{record.name} is an encoder already, or has none: export it with --to hf")
    return encoder_of(shape)


_EXPORTS: dict[str, Callable[[Architecture, Any], Any]] = {"hf": _whole, "hf-encoder": _encoder}
"""What of a model is written: `(record, shape)` -> the shape of it."""
_PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def import_(request: Request) -> None:
    """Read a HuggingFace model folder into a checkpoint of step 0."""
    source, out = Path(request["source"]), Path(request["out"])
    if out.exists():
        raise ConfigError(f"{out} exists already; choose a new folder, or remove it first")
    found = huggingface.read_folder(source, _importable())
    for line in found.notes:
        terminal.note(line)
    shape, weights = _resized(found.record, found.shape, dict(found.weights), request.get("positions"))
    origin = {"imported_from": source.resolve().name, "notes": list(found.notes), "tool_version": __version__}
    checkpoint.write_model_checkpoint(out, record=found.record, shape=shape, weights=weights, origin=origin)
    values: dict[str, Any] = {
        "path": str(out),
        "architecture": found.record.name,
        "sizes": sizes_of(found.record, shape),
        "shape": dataclasses.asdict(shape),
    }
    values |= {"parameters": found.record.num_parameters(shape), "notes": list(found.notes)}
    _report(values, f"imported {found.record.name} ({values['parameters']:,} parameters) as {out}", request["json"])


def _importable() -> list[Architecture]:
    # Built-in ones first: a plug-in that reads the same layout must not take over what worked without it.
    return sorted((record for record in architecture.available() if record.huggingface), key=lambda record: record.name not in architecture.BUILT_IN)


def sizes_of(record: Architecture, shape: Any) -> list[str]:
    """The sizes that a shape may be: more than one where models differ in their data only, none for a custom one."""
    return [name for name, size in record.sizes.items() if size.shape == shape]


_FOLDER = 'folder = "."  # where this card is: run this there, or write the path of it'


def render_card(record: Architecture, shape: Any, state: dict[str, Any]) -> str:
    """The model card (README.md) of an exported model."""
    identity, origin = state["identity"], state.get("origin")
    trained = identity.get("science", {}).get("architecture", {}).get("size")
    sizes = [trained] if trained in record.sizes else sizes_of(record, shape)
    facts = {"architecture": record.name, "size": " or ".join(sizes) or "custom", "parameters": f"{record.num_parameters(shape):,}"}
    facts |= {"optimizer steps": str(state["step"])}
    facts |= {"run": state["run_id"]} if state["run_id"] else {}
    facts |= {"imported from": origin["imported_from"]} if origin else {}
    facts |= {"corpus (SHA-256 of its index)": identity["corpus_sha256"]} if "corpus_sha256" in identity else {}
    errata = list(dict.fromkeys(line for size in sizes for line in record.sizes[size].errata))
    parts = [
        "---\nlibrary_name: transformers\npipeline_tag: fill-mask\ntags:\n- protein\n---",
        f"# {record.name}\n\n{record.description}. Written by prottrans_hpc {__version__}.",
        "\n".join(f"- {name}: {value}" for name, value in facts.items()),
        "## Shape\n\n" + "\n".join(f"- {name}: {value}" for name, value in dataclasses.asdict(shape).items()),
        f"## Use\n\n```python\n{_FOLDER}\n{huggingface.layout_of(record).usage}\n```",
    ]
    if errata:
        parts.append("## Where the publication and the model differ\n\n" + "\n".join(f"- {line}" for line in errata))
    return "\n\n".join(parts) + "\n"


def _report(values: dict[str, Any], text: str, as_json: bool) -> None:
    print(json.dumps(values, indent=1) if as_json else text)
