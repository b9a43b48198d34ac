"""The model of an extraction: which checkpoint, on which device, in which precision, and how it is called."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import durable
from ..architecture import Architecture, Batch
from ..errors import CheckpointError, ConfigError, ResourceError
from ..stage import find
from ..train import checkpoint
from .batches import Encoder, build_batch, build_encoder

DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True)
class Source:
    """A verified checkpoint, not yet loaded."""

    path: Path
    run_id: str | None
    """None: imported, not trained here."""
    step: int
    manifest_sha256: str
    """Of its manifest, which holds the SHA-256 of every file."""


@dataclass(frozen=True)
class Model:
    """A model ready to be run."""

    record: Architecture
    shape: Any
    module: torch.nn.Module
    encoder: Encoder
    device: torch.device
    autocast: torch.dtype | None
    """What matrix products are computed in; None: fp32."""
    is_reversed: bool = False
    """Whether it was trained to read from the last residue to the first: it reads so here, too, and its rows are turned back."""

    @property
    def max_residues(self) -> int | None:
        """The longest protein that the model can read; None: no limit."""
        return max_residues(self.shape, self.encoder)

    @functools.cached_property
    def width(self) -> int:
        """Numbers in an embedding: asked of the model, as each architecture names it differently."""
        return int(self.hidden([b"M"]).shape[1])

    def hidden(self, proteins: list[bytes]) -> torch.Tensor:
        """The last hidden states of the proteins' residues, special tokens left out: [sum of lengths, H], fp32."""
        batch = build_batch([protein[::-1] for protein in proteins] if self.is_reversed else proteins, self.encoder)
        residue_rows = _residue_rows(batch, self.encoder)
        if self.is_reversed:
            residue_rows = torch.cat([rows.flip(0) for rows in torch.split(residue_rows, [len(protein) for protein in proteins])])
        with torch.inference_mode(), self._precision():
            hidden: torch.Tensor = self.module.hidden(_moved(batch, self.device))  # type: ignore[operator]
            return hidden.index_select(0, residue_rows.to(self.device)).float()

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast)


def find_source(path: Path) -> Source:
    """The checkpoint that a person named, directly or by its run directory. Raises CheckpointError."""
    found = checkpoint.find_checkpoint(path)
    state = durable.read_json(found / checkpoint.STATE)
    return Source(found, state["run_id"], int(state["step"]), durable.sha256_of(found / durable.MANIFEST))


def read_max_residues(source: Source) -> int | None:
    """The longest protein that the model of a checkpoint can read, without loading its weights; None: no limit."""
    record, shape = checkpoint.read_architecture(source.path)
    return max_residues(shape, build_encoder(record.vocabulary))


def choose_device(name: str) -> torch.device:
    """The device that `--device` means here. Raises ConfigError or ResourceError."""
    if name not in DEVICES:
        raise ConfigError(f"--device is one of {', '.join(DEVICES)}, not {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ResourceError("--device cuda: PyTorch finds no CUDA GPU here; use --device auto or cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def autocast_type(precision: str, device: torch.device) -> torch.dtype | None:
    """What a precision is computed in on a device.

    Before Ampere a GPU only emulates bf16. A CPU gains nothing from fp16 products (few have them), so there fp16
    is fp32 rounded once at the end.
    """
    if precision == "fp32" or (precision == "fp16" and device.type == "cpu"):
        return None
    if precision == "bf16" and (device.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)):
        return torch.bfloat16
    return torch.float16


def load(source: Source, *, device: torch.device, precision: str) -> Model:
    """Build the checkpoint's model and load its weights. Raises CheckpointError."""
    record, shape, weights = checkpoint.load_model(source.path)
    module: torch.nn.Module = find(record.build)(shape)
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(f"the weights of {source.path} do not fit the architecture {record.name}: {error}") from error
    objective = durable.read_json(source.path / checkpoint.STATE)["identity"].get("science", {}).get("objective", {})
    return Model(
        record,
        shape,
        module.eval().to(device),
        build_encoder(record.vocabulary),
        device,
        autocast_type(precision, device),
        is_reversed=objective.get("direction") == "reverse",
    )


def max_residues(shape: Any, encoder: Encoder) -> int | None:
    """Residues that fit the position table beside the special tokens; None for a shape without such a table."""
    rows = getattr(shape, "max_positions", None)
    return None if rows is None else int(rows) - encoder.num_specials


def describe(source: Source, model: Model) -> dict[str, Any]:
    """The attributes that say which model the embeddings come from."""
    same = [name for name, size in model.record.sizes.items() if size.shape == model.shape]
    return {
        "architecture": model.record.name,
        "size": ", ".join(same) or "custom",
        "width": model.width,
        "shape": json.dumps(dataclasses.asdict(model.shape)),
        "checkpoint": source.path.resolve().name,
        "run_id": source.run_id or "",
        "step": source.step,
        "manifest_sha256": source.manifest_sha256,
        "computed_in": str(model.autocast or torch.float32).removeprefix("torch."),
        "torch": str(torch.__version__),
    } | ({"direction": "reverse"} if model.is_reversed else {})


def usable_cores() -> int:
    """Cores this process may use, or the number of threads that the environment sets on purpose."""
    return torch.get_num_threads() if "OMP_NUM_THREADS" in os.environ else len(os.sched_getaffinity(0))


def _residue_rows(batch: Batch, encoder: Encoder) -> torch.Tensor:
    """int64: which tokens of a batch are residues."""
    lengths = torch.diff(batch.cu_seqlens).long()
    places = batch.positions
    is_residue = (places >= len(encoder.head)) & (places < torch.repeat_interleave(lengths, lengths) - len(encoder.tail))
    return torch.nonzero(is_residue).squeeze(1)


def _moved(batch: Batch, device: torch.device) -> Batch:
    tensors: dict[str, Any] = {name: value.to(device, non_blocking=True) for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
    return dataclasses.replace(batch, **tensors)
