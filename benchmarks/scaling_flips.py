"""Four formats of checkpoints, and what each makes of one changed byte; see scaling.py."""

from __future__ import annotations

import random
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp

from prottrans_hpc.comm import Solo
from prottrans_hpc.recipe import Checkpointing
from prottrans_hpc.run_dir import RunDir
from prottrans_hpc.train import checkpoint
from prottrans_hpc.train.saving import Saver

Tensors = dict[str, torch.Tensor]
STEP = 1


@dataclass(frozen=True)
class Way:
    """A format: how it is written into a folder, and read again."""

    write: Callable[[Path, Tensors], None]
    read: Callable[[Path], Tensors]


def _write_ours(folder: Path, tensors: Tensors) -> None:
    run = RunDir(folder)
    run.checkpoints.mkdir(parents=True)
    saver = Saver(run, Solo(torch.device("cpu")), Checkpointing(every_steps=1), start_id="benchmark")
    saver.stage(STEP, {"format": checkpoint.FORMAT, "step": STEP}, {"model": tensors, "optimizer": {}})
    saver.start()
    saver.drain()


def _write_dcp(folder: Path, tensors: Tensors) -> None:
    dcp.save(dict(tensors), checkpoint_id=folder / "dcp", no_dist=True)


def _read_dcp(folder: Path) -> Tensors:
    into: Tensors = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    dcp.load(into, checkpoint_id=folder / "dcp", no_dist=True)
    return into


WAYS = {
    "prottrans_hpc": Way(_write_ours, lambda folder: checkpoint.read_checkpoint(RunDir(folder).checkpoint(STEP)).model),
    "torch.save, torch.load": Way(
        lambda folder, tensors: torch.save(tensors, folder / "model.pt"), lambda folder: dict(torch.load(folder / "model.pt", weights_only=True))
    ),
    "safetensors": Way(
        lambda folder, tensors: safetensors.torch.save_file(tensors, folder / "model.safetensors"),
        lambda folder: dict(safetensors.torch.load_file(folder / "model.safetensors")),
    ),
    "torch.distributed.checkpoint": Way(_write_dcp, _read_dcp),
}
SHAPES = {f"layer.{number}.weight": (256, 512) for number in range(8)} | {f"layer.{number}.bias": (512,) for number in range(8)}


def measure(count: int, generator: random.Random) -> dict[str, Any]:
    """By format: how many of `count` single flips were found, changed values in silence, or changed nothing that is loaded."""
    draw = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=draw) for name, shape in SHAPES.items()}
    rows = {name: _measure_way(way, tensors, count, generator) for name, way in WAYS.items()}
    return {"count": count, "bytes": sum(4 * tensor.numel() for tensor in tensors.values()), "ways": rows}


def _measure_way(way: Way, tensors: Tensors, count: int, generator: random.Random) -> dict[str, int]:
    tally = {"found": 0, "wrong": 0, "same": 0}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        way.write(folder, tensors)
        assert _outcome(way, folder, tensors) == "same", "what is not damaged must load"
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        sizes = [path.stat().st_size for path in files]
        for _ in range(count):
            path = generator.choices(files, weights=sizes)[0]
            whole, place = path.read_bytes(), generator.randrange(path.stat().st_size)
            path.write_bytes(whole[:place] + bytes([whole[place] ^ generator.randrange(1, 256)]) + whole[place + 1 :])
            tally[_outcome(way, folder, tensors)] += 1
            path.write_bytes(whole)
    return tally


def _outcome(way: Way, folder: Path, tensors: Tensors) -> str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = way.read(folder)
    except KeyboardInterrupt:
        raise
    except BaseException:  # torch's CheckpointException is no Exception
        return "found"
    equal = loaded.keys() == tensors.keys() and all(torch.equal(loaded[key].view(torch.int32), tensors[key].view(torch.int32)) for key in tensors)
    return "same" if equal else "wrong"
