"""What a checkpoint is on disk, and how one is found, verified and read, at any world size.

`checkpoints/step-00001000/` holds safetensors files that together are one copy of the model and of the
optimizer's state, `state.json` with everything else, and the manifest with the SHA-256 of each file. Nothing
is ever unpickled: only files that the manifest lists are opened, and only as safetensors or JSON. Writing one
during training is `saving.py`'s work. A sharded run's files hold pieces of tensors, and its state.json says which rank
wrote which, so that a rank of a run with another layout opens only the files that it needs something of.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import architecture, config, durable
from ..architecture import Architecture
from ..errors import CheckpointError, DataError
from ..run_dir import RunDir
from . import lane_memory, piece_plan, piece_reader, pieces, tensor_file
from .piece_reader import Source
from .tensor_file import file_name

FORMAT = 1
FORMAT_OF_PIECES = 2
"""Of a sharded run's checkpoints."""
STATE = "state.json"
_KINDS = ("model", "optimizer")
_log = logging.getLogger(__name__)

Tensors = dict[str, torch.Tensor]
Agree = Callable[[bool], bool]
"""Whether a value is true on all ranks."""
LanesOf = Callable[[int], range]
"""Which of so many lanes are wanted."""
Owned = Mapping[str, Mapping[str, torch.Tensor]]
"""By kind and name the tensors that a checkpoint is to fill; of a sharded one this rank's piece is wanted."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint in memory."""

    path: Path
    state: dict[str, Any]
    """The content of state.json: step, position, identity, versions."""
    model: Tensors
    optimizer: Tensors
    """Empty in an imported checkpoint."""
    memory: tuple[int, torch.Tensor] | None = None
    """The first of the lanes that were asked for, and a row for each of them; None where there are none."""

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return int(self.state["step"])


def describe_architecture(record: Architecture, shape: Any) -> dict[str, Any]:
    """What a checkpoint says about its architecture: enough to build the module again."""
    described = {"name": record.name, "shape": dataclasses.asdict(shape), "vocabulary": list(record.vocabulary.tokens)}
    return dict(json.loads(json.dumps(described)))


def problems(path: Path) -> list[str]:
    """What is wrong with a checkpoint folder, one line a fault; every byte is read."""
    found = durable.folder_problems(path)
    if found:
        return found
    try:
        _read_state(path, _whole_manifest(path))
    except CheckpointError as error:
        return [str(error)]
    return []


def find_checkpoint(source: Path) -> Path:
    """The checkpoint that `source` names: itself, or the newest intact one of a run directory, damaged ones warned of.

    Raises CheckpointError when there is none.
    """
    if (source / STATE).exists() or (source / durable.MANIFEST).exists():
        faults = problems(source)
        if faults:
            raise CheckpointError(f"the checkpoint {source} cannot be used: {'; '.join(faults)}")
        return source
    run_dir = RunDir(source)
    names = [run_dir.checkpoint(step) for step in reversed(run_dir.checkpoint_steps())]
    for path in names:
        faults = problems(path)
        if not faults:
            return path
        _log.warning("skipping the damaged checkpoint %s: %s", path, "; ".join(faults))
    if names:
        raise CheckpointError(
            f"none of the {len(names)} checkpoints in {run_dir.checkpoints} is intact: the newest, {names[0].name}: {'; '.join(problems(names[0]))}"
        )
    raise CheckpointError(f"{source} is neither a checkpoint nor a run directory that has one")


def read_checkpoint(path: Path, *, kinds: tuple[str, ...] = _KINDS, lanes_of: LanesOf | None = None, own: Owned | None = None) -> Checkpoint:
    """Read a checkpoint into host memory, verifying the bytes that are used; of the memory of lanes, those that `lanes_of` says.

    Where tensors of `own` are sharded, only this rank's pieces of them are read. A tensor that then is not among them, or
    of another shape, comes without data (on the meta device), for whoever takes it to refuse. Raises CheckpointError for a
    damaged one.
    """
    in_part = own is not None and any(pieces.is_sharded(group.values()) for group in own.values())
    # In part, one rank looks for files that do not belong there: thousands asking for the sizes of thousands would take minutes.
    listed = _manifest(path) if in_part and pieces.own_rank() else _whole_manifest(path)
    state = _read_state(path, listed)
    tensors: dict[str, Tensors] = {kind: {} for kind in _KINDS}
    try:
        plan = piece_plan.from_json(state["pieces"]) if state["format"] == FORMAT_OF_PIECES else None
        for kind in kinds:
            source = Source(path, kind, tuple(state["files"][kind]), listed, plan)
            tensors[kind] = piece_reader.read_own(source, own[kind]) if own and in_part else piece_reader.read_whole(source)
        memory = _read_memory(path, state, listed, lanes_of) if lanes_of else None
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"the checkpoint {path} is damaged: {error}") from error
    return Checkpoint(path, state, tensors["model"], tensors["optimizer"], memory)


def _read_memory(path: Path, state: Mapping[str, Any], listed: Mapping[str, durable.FileSeal], lanes_of: LanesOf) -> tuple[int, torch.Tensor] | None:
    files = [lane_memory.parse_name(name) for name in state["files"].get("memory", [])]
    if not files:
        return None
    lanes = lanes_of(files[0].num_lanes)
    needed = [file.name for file in files if file.first < lanes.stop and file.end > lanes.start]
    return lanes.start, lane_memory.rows_of(lanes, [tensor_file.read(path / name, sha256=listed[name].sha256) for name in needed])


def load_model(path: Path) -> tuple[Architecture, Any, Tensors]:
    """The architecture record, shape and weights of a checkpoint. Raises CheckpointError, or ConfigError for an unknown architecture."""
    found = read_checkpoint(path, kinds=("model",))
    record, shape = _architecture_in(found.state, path)
    return record, shape, found.model


def read_architecture(path: Path) -> tuple[Architecture, Any]:
    """The architecture record and shape of a checkpoint whose files were verified, without its weights."""
    return _architecture_in(durable.read_json(path / STATE), path)


def _architecture_in(state: Mapping[str, Any], path: Path) -> tuple[Architecture, Any]:
    described = state["identity"]["architecture"]
    record = architecture.get(described["name"])
    known = next(iter(record.sizes.values())).shape
    shape = config.parse(type(known), described["shape"], source=str(path / STATE))
    if list(record.vocabulary.tokens) != described["vocabulary"]:
        raise CheckpointError(f"the checkpoint {path} was trained with another vocabulary than {record.name} has in this version")
    return record, shape


def write_model_checkpoint(path: Path, *, record: Architecture, shape: Any, weights: Mapping[str, torch.Tensor], origin: Mapping[str, Any]) -> None:
    """Write weights alone as a checkpoint of step 0; `origin` (JSON values) says where they came from."""
    name = file_name("model", 0, 1)
    state = {
        "format": FORMAT,
        "run_id": None,
        "step": 0,
        "identity": {"architecture": describe_architecture(record, shape)},
        "origin": dict(origin),
        "files": {"model": [name], "optimizer": []},
    }
    with durable.new_folder(path) as folder:
        staging = tensor_file.Staging(weights)
        staging.fill(weights)
        staging.write(folder / name)
        durable.write_json(folder / STATE, state)


def read_newest(run_dir: RunDir, steps: list[int], agree: Agree, *, lanes_of: LanesOf | None = None, own: Owned | None = None) -> Checkpoint | None:
    """The newest of `steps` that every rank can read intact, as `read_checkpoint` reads it; None when there are no checkpoints at all.

    `agree` tells whether a value is true on all ranks, so that all take the same one. Damaged ones are warned of.
    Raises CheckpointError when none of them is intact.
    """
    for step in steps:
        found = None
        try:
            found = read_checkpoint(run_dir.checkpoint(step), lanes_of=lanes_of, own=own)
        except PermissionError:
            raise
        except (CheckpointError, OSError) as error:
            _log.warning("skipping a checkpoint: %s", error)
        if agree(found is not None):
            return found
        if found is not None:
            _log.warning("skipping the checkpoint of step %d: another rank cannot read it", step)
    if steps:
        raise CheckpointError(f"none of the {len(steps)} checkpoints in {run_dir.checkpoints} is intact; move them away to start from step 0")
    return None


def _manifest(path: Path) -> dict[str, durable.FileSeal]:
    try:
        return durable.read_manifest(path)
    except (DataError, FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(f"the checkpoint {path} is damaged: {error}") from error


def _whole_manifest(path: Path) -> dict[str, durable.FileSeal]:
    """The manifest, held against the names and sizes that are there. Raises CheckpointError."""
    try:
        listed = durable.read_manifest(path)
        present = {entry.name: entry.stat().st_size for entry in path.iterdir() if entry.name != durable.MANIFEST}
    except (DataError, FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(f"the checkpoint {path} is damaged: {error}") from error
    odd = sorted(name for name in present.keys() | listed.keys() if name not in listed or present.get(name) != listed[name].num_bytes)
    if odd:
        raise CheckpointError(f"the checkpoint {path} is damaged: missing, of another size or not written by the save: {', '.join(odd)}")
    return listed


def _read_state(path: Path, listed: Mapping[str, durable.FileSeal]) -> dict[str, Any]:
    try:
        content = (path / STATE).read_bytes()
        if hashlib.sha256(content).hexdigest() != listed[STATE].sha256:
            raise ValueError("its SHA-256 is not the one that was written")
        state: dict[str, Any] = json.loads(content)
        if state["format"] not in (FORMAT, FORMAT_OF_PIECES):
            raise ValueError(f"it has format {state['format']!r}; this version reads {FORMAT} and {FORMAT_OF_PIECES}")
        if path.name.startswith("step-") and path.name != f"step-{int(state['step']):08d}":
            raise ValueError(f"it says that it is of step {state['step']}")
    except (FileNotFoundError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"the checkpoint {path} is damaged: {STATE}: {error}") from error
    return state
