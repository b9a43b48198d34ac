from __future__ import annotations

import json
import pickle
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from prottrans_hpc import architecture, durable
from prottrans_hpc.errors import CheckpointError
from prottrans_hpc.run_dir import RunDir
from prottrans_hpc.train import checkpoint
from prottrans_hpc.train.checkpoint import find_checkpoint, load_model, problems, read_checkpoint, read_newest, write_model_checkpoint

RECORD = architecture.get("prot_bert")
SHAPE = RECORD.size("tiny").shape


def _write(path: Path, step: int) -> Path:
    """A checkpoint of step `step` whose tensors say so, small enough to damage every byte of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names = {kind: checkpoint.file_name(kind, 0, 1) for kind in ("model", "optimizer")}
    state = {"format": checkpoint.FORMAT, "run_id": "r", "step": step, "identity": {}, "files": {kind: [name] for kind, name in names.items()}}
    with durable.new_folder(path) as folder:
        for kind, name in names.items():
            tensors = {"a": torch.full((7, 3), float(step)), "b": torch.arange(5) + step, f"only {kind}": torch.ones(2, dtype=torch.bfloat16)}
            staging = checkpoint.tensor_file.Staging(tensors)
            staging.fill(tensors)
            staging.write(folder / name)
        durable.write_json(folder / checkpoint.STATE, state)
    return path


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run directory with the checkpoints of steps 1 and 2."""
    directory = RunDir(tmp_path / "run")
    for step in (1, 2):
        _write(directory.checkpoint(step), step)
    return directory


def _newest(directory: RunDir) -> int:
    found = read_newest(directory, directory.checkpoint_steps()[::-1], agree=lambda value: value)
    assert found is not None
    assert found.model["a"].eq(found.step).all()
    assert found.path == find_checkpoint(directory.path)
    return found.step


def test_files_are_plain_safetensors(run: RunDir) -> None:
    path = run.checkpoint(2)
    theirs, ours = load_file(path / checkpoint.file_name("model", 0, 1)), read_checkpoint(path).model
    assert theirs.keys() == ours.keys() == {"a", "b", "only model"}
    for name, tensor in theirs.items():
        assert tensor.dtype == ours[name].dtype
        assert torch.equal(tensor, ours[name])


def test_newest_is_used(run: RunDir) -> None:
    assert _newest(run) == 2


def _flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def _swap(folder: Path) -> None:
    one, two = sorted(folder.glob("*.safetensors"))
    content = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(content)


MODEL = checkpoint.file_name("model", 0, 1)
DAMAGES = {
    "flipped bit": lambda folder: _flip_bit(folder / MODEL),
    "flipped bit in the manifest": lambda folder: _flip_bit(folder / durable.MANIFEST),
    "flipped bit in the state": lambda folder: _flip_bit(folder / checkpoint.STATE),
    "cut short": lambda folder: (folder / MODEL).write_bytes((folder / MODEL).read_bytes()[:-1]),
    "emptied": lambda folder: (folder / MODEL).write_bytes(b""),
    "zero filled": lambda folder: (folder / MODEL).write_bytes(bytes((folder / MODEL).stat().st_size)),
    "half deleted": lambda folder: (folder / checkpoint.file_name("optimizer", 0, 1)).unlink(),
    "without manifest": lambda folder: (folder / durable.MANIFEST).unlink(),
    "without state": lambda folder: (folder / checkpoint.STATE).unlink(),
    "empty folder": lambda folder: [path.unlink() for path in folder.iterdir()],
    "swapped files": _swap,
    "a file too many": lambda folder: (folder / "extra.pt").write_bytes(b"x"),
    "an older one under its name": lambda folder: (shutil.rmtree(folder), shutil.copytree(folder.with_name("step-00000001"), folder)),
    "a file in its place": lambda folder: (shutil.rmtree(folder), folder.write_bytes(b"x")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_newest_is_named_and_the_one_before_is_used(run: RunDir, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    DAMAGES[damage](run.checkpoint(2))
    assert problems(run.checkpoint(2))
    assert _newest(run) == 1
    assert "step-00000002" in caplog.text
    with pytest.raises(CheckpointError, match="step-00000002"):
        find_checkpoint(run.checkpoint(2)) if run.checkpoint(2).is_dir() and any(run.checkpoint(2).iterdir()) else read_checkpoint(run.checkpoint(2))


def test_none_intact_is_an_error_that_names_the_newest(run: RunDir) -> None:
    for step in (1, 2):
        _flip_bit(run.checkpoint(step) / MODEL)
    with pytest.raises(CheckpointError, match="none of the 2 checkpoints"):
        read_newest(run, [2, 1], agree=lambda value: value)
    with pytest.raises(CheckpointError, match="step-00000002"):
        find_checkpoint(run.path)


def test_no_checkpoints_at_all(tmp_path: Path) -> None:
    assert read_newest(RunDir(tmp_path), [], agree=lambda value: value) is None
    with pytest.raises(CheckpointError, match="neither a checkpoint nor a run directory"):
        find_checkpoint(tmp_path)


def test_all_ranks_take_the_same_when_one_cannot_read_the_newest(run: RunDir) -> None:
    answers = iter([False, True])  # another rank fails on step 2 and reads step 1
    found = read_newest(run, [2, 1], agree=lambda value: value and next(answers))
    assert found is not None
    assert found.step == 1


def test_every_byte_counts(run: RunDir) -> None:
    """Each byte of each file, one random bit of it: all found."""
    dice = random.Random(0)
    folder = run.checkpoint(2)
    for path in sorted(folder.iterdir()):
        original = path.read_bytes()
        for place in range(len(original)):
            content = bytearray(original)
            content[place] ^= 1 << dice.randrange(8)
            path.write_bytes(content)
            with pytest.raises(CheckpointError):
                read_checkpoint(folder)
        path.write_bytes(original)
    assert read_checkpoint(folder).step == 2


class _Bomb:
    """A pickle that leaves a mark when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (open, (str(self.mark), "w"))  # type: ignore[return-value]


@pytest.mark.parametrize("place", ["model.safetensors", "state", "manifest", "beside", "metadata"])
def test_no_pickle_is_ever_loaded(run: RunDir, tmp_path: Path, place: str) -> None:
    mark, folder = tmp_path / "mark", run.checkpoint(2)
    content = pickle.dumps(_Bomb(mark))
    path = {
        "model.safetensors": folder / MODEL,
        "state": folder / checkpoint.STATE,
        "manifest": folder / durable.MANIFEST,
        "beside": folder / "pytorch_model.bin",
        "metadata": folder / ".metadata",
    }[place]
    path.write_bytes(content)
    if place != "manifest":  # an attacker who can write seals what he wrote
        (folder / durable.MANIFEST).unlink()
        durable.seal_folder(folder)
    found = read_newest(run, [2, 1], agree=lambda value: value)
    assert found is not None
    assert found.step == (2 if place in ("beside", "metadata") else 1)
    if found.step == 1:
        with pytest.raises(CheckpointError, match="damaged"):
            read_checkpoint(folder)
    assert not mark.exists()
    pickle.loads(content)
    assert mark.exists(), "the bomb itself is a dud"


def test_weights_alone_travel_with_their_architecture(tmp_path: Path) -> None:
    weights = {"w": torch.randn(3, 4), "b": torch.randn(4)}
    path = tmp_path / "imported"
    write_model_checkpoint(path, record=RECORD, shape=SHAPE, weights=weights, origin={"source": "a test"})
    record, shape, found = load_model(find_checkpoint(path))
    assert (record, shape) == (RECORD, SHAPE)
    assert {name: tensor.tolist() for name, tensor in found.items()} == {name: tensor.tolist() for name, tensor in weights.items()}
    assert read_checkpoint(path).step == 0
    assert json.loads((path / checkpoint.STATE).read_text())["origin"] == {"source": "a test"}


def test_another_vocabulary_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "imported"
    write_model_checkpoint(path, record=RECORD, shape=SHAPE, weights={"w": torch.zeros(1)}, origin={})
    state = json.loads((path / checkpoint.STATE).read_text())
    tokens = state["identity"]["architecture"]["vocabulary"]
    tokens[5], tokens[6] = tokens[6], tokens[5]
    (path / checkpoint.STATE).write_text(json.dumps(state))
    (path / durable.MANIFEST).unlink()
    durable.seal_folder(path)
    with pytest.raises(CheckpointError, match="another vocabulary"):
        load_model(path)
