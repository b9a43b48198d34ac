"""Optimizers, norms and checkpoints where ranks hold parts of tensors: as on one rank, with tensors that torch itself cuts and gathers."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from prottrans_hpc import durable, errors
from prottrans_hpc.errors import CheckpointError
from prottrans_hpc.run_dir import RunDir
from prottrans_hpc.train import checkpoint, tensor_file

HERE = Path(__file__).parent
LAYOUTS = {"one": 1, "ddp3": 3, "fsdp2": 2, "fsdp4": 4, "hybrid2x2": 4, "tp2": 2, "fsdp2xtp2": 4}


def run_gangs(scenario: str, folder: Path, layouts: list[str], *, device: str = "cpu") -> None:
    environment = os.environ | {"PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": "1", "SHARD_DEVICE": device}
    command = [sys.executable, str(HERE / "shard_gang.py"), scenario, str(folder), ",".join(layouts)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-5000:]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    run_gangs("train", folder, list(LAYOUTS))
    return folder


@pytest.mark.parametrize("optimizer", ["lamb", "adamw", "adam", "adafactor"])
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "one"])
def test_steps_are_those_of_one_rank(trained: Path, layout: str, optimizer: str) -> None:
    expected = load_file(trained / f"one-{optimizer}-0.safetensors")
    norms = [float.fromhex(norm) for norm in json.loads((trained / f"one-{optimizer}-0.json").read_text())]
    bits = set()
    for rank in range(LAYOUTS[layout]):
        path = trained / f"{layout}-{optimizer}-{rank}.safetensors"
        found = load_file(path)
        bits.add((path.read_bytes(), (trained / f"{layout}-{optimizer}-{rank}.json").read_text()))
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            # Six steps whose sums were added in another order: a few units in the last place of fp32.
            torch.testing.assert_close(tensor, expected[name], rtol=3e-6, atol=3e-9, msg=lambda text, name=name: f"{name}: {text}")
        own_norms = [float.fromhex(norm) for norm in json.loads((trained / f"{layout}-{optimizer}-{rank}.json").read_text())]
        assert own_norms == pytest.approx(norms, rel=1e-12)
    assert len(bits) == 1, "the same bits on every rank"


def test_plain_gangs_keep_the_bits_of_one_rank(trained: Path) -> None:
    for optimizer in ("lamb", "adamw", "adam", "adafactor"):
        assert (trained / f"ddp3-{optimizer}-2.safetensors").read_bytes() == (trained / f"one-{optimizer}-0.safetensors").read_bytes()


def test_an_optimizer_on_the_host_is_that_of_the_device(tmp_path: Path) -> None:
    run_gangs("on host", tmp_path, ["fsdp2", "hybrid2x2", "fsdp2xtp2"])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory a layout, with checkpoints of the steps 1 and 2."""
    folder = tmp_path_factory.mktemp("saved")
    run_gangs("save", folder, list(LAYOUTS))
    return folder


@pytest.fixture(scope="module")
def loaded(saved: Path) -> Path:
    """What every layout has found in the checkpoint of every other, and one that all of them have to refuse."""
    other = saved / "other"
    shutil.copytree(saved / "fsdp4", other)
    _rewrite_state(RunDir(other).checkpoint(1), lambda text: text.replace("few.weight", "new.weight"))
    shutil.copytree(saved / "fsdp4", saved / "flipped")
    piece = RunDir(saved / "flipped").checkpoint(1) / "optimizer-00002-of-00004.safetensors"
    piece.write_bytes(bytes([*piece.read_bytes()[:-1], 0xAA]))
    run_gangs("load", saved, list(LAYOUTS))
    return saved


def _rewrite_state(path: Path, change: object) -> None:
    state = path / checkpoint.STATE
    state.write_text(change(state.read_text()))  # type: ignore[operator]
    (path / durable.MANIFEST).unlink()
    durable.seal_folder(path)


def _same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name].dtype != expected[name].dtype or not torch.equal(found[name], expected[name])] == []


@pytest.mark.parametrize("source", LAYOUTS)
def test_readers_of_whole_models_put_the_pieces_together(saved: Path, source: str) -> None:
    for step in (1, 2):
        found = checkpoint.read_checkpoint(checkpoint.find_checkpoint(RunDir(saved / source).checkpoint(step)))
        _same(
            {f"{kind}/{name}": tensor for kind in ("model", "optimizer") for name, tensor in getattr(found, kind).items()},
            load_file(saved / f"expected-{step}.safetensors"),
        )
        assert found.state["format"] == (1 if source in ("one", "ddp3") else 2)


def test_whole_tensors_lie_on_disk_as_ever(saved: Path) -> None:
    one, three = (RunDir(saved / layout).checkpoint(1) for layout in ("one", "ddp3"))
    assert {path.name: path.read_bytes() for path in one.iterdir()} == {path.name: path.read_bytes() for path in three.iterdir()}
    assert json.loads((one / checkpoint.STATE).read_text()).keys() == {"format", "run_id", "step", "identity", "files"}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("source", LAYOUTS)
def test_every_layout_takes_up_what_every_other_has_saved(loaded: Path, source: str, layout: str) -> None:
    expected, files = load_file(loaded / "expected-1.safetensors"), json.loads((RunDir(loaded / source).checkpoint(1) / checkpoint.STATE).read_text())["files"]
    for rank in range(LAYOUTS[layout]):
        result = json.loads((loaded / f"{source}-as-{layout}-{rank}.json").read_text())
        assert "error" not in result
        _same(load_file(loaded / f"{source}-as-{layout}-{rank}.safetensors"), expected)
        assert len(set(result["opened"])) == len(result["opened"]) <= len(files["model"]) + len(files["optimizer"])
        if source == layout == "fsdp4":  # it needs its own pieces, and the tensor that each rank has whole
            assert set(result["opened"]) <= {f"{kind}-{number:05d}-of-00004.safetensors" for kind in files for number in (0, rank)}


def test_a_reader_keeps_one_file_beside_its_result(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, seen = tensor_file.read, []

    def read(path: Path, *, sha256: str) -> dict[str, torch.Tensor]:
        assert all(reference() is None for reference in seen), "pieces that were copied out are still in memory"
        content = real(path, sha256=sha256)
        seen.extend(weakref.ref(tensor) for name, tensor in content.items() if name.endswith("]") and "one.bias" not in name)  # that one is whole
        return content

    monkeypatch.setattr(tensor_file, "read", read)
    checkpoint.read_checkpoint(RunDir(saved / "fsdp4").checkpoint(1))
    assert len(seen) > 40


@pytest.mark.gpu
def test_on_a_gpu_steps_and_checkpoints_are_those_of_the_cpu(trained: Path, saved: Path, tmp_path: Path) -> None:
    run_gangs("train", tmp_path, ["fsdp1"], device="cuda")
    for optimizer in ("lamb", "adamw", "adam", "adafactor"):
        found, expected = (load_file(path) for path in (tmp_path / f"fsdp1-{optimizer}-0.safetensors", trained / f"one-{optimizer}-0.safetensors"))
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-8, msg=lambda text, name=name: f"{name}: {text}")
    run_gangs("save", tmp_path, ["fsdp1"], device="cuda")
    shutil.copytree(saved / "fsdp4", tmp_path / "fsdp4")
    run_gangs("load", tmp_path, ["fsdp1"], device="cuda")
    for source in ("fsdp1", "fsdp4"):
        _same(load_file(tmp_path / f"{source}-as-fsdp1-0.safetensors"), load_file(saved / "expected-1.safetensors"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_tensor_of_another_name_is_named(loaded: Path, layout: str) -> None:
    for rank in range(LAYOUTS[layout]):
        error = json.loads((loaded / f"other-as-{layout}-{rank}.json").read_text())["error"]
        # Who reads all finds that state.json and the files disagree, who reads its pieces that the model has another name.
        assert "new.weight are not there" in error if layout in ("one", "ddp3") else "few.weight" in error


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_damaged_piece_is_named_by_the_ranks_that_need_it(loaded: Path, layout: str) -> None:
    results = [json.loads((loaded / f"flipped-as-{layout}-{rank}.json").read_text()) for rank in range(LAYOUTS[layout])]
    named = [rank for rank, result in enumerate(results) if "optimizer-00002-of-00004" in result.get("error", "")]
    assert [rank for rank, result in enumerate(results) if "error" in result] == named != []
    if layout == "fsdp4":
        assert named == [2]


def test_every_flipped_byte_in_a_piece_is_found(saved: Path, tmp_path: Path) -> None:
    folder = RunDir(saved / "fsdp2xtp2").checkpoint(1)
    for number, name in enumerate(sorted(path.name for path in folder.iterdir() if path.suffix == ".safetensors")):
        damaged = tmp_path / str(number) / folder.name
        shutil.copytree(folder, damaged)
        content = bytearray((damaged / name).read_bytes())
        content[-1 - number] ^= 1 << (number % 8)
        (damaged / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=name):
            checkpoint.read_checkpoint(damaged)
        assert name in checkpoint.problems(damaged)[0]


def test_a_missing_piece_is_named(saved: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "step-00000001"
    shutil.copytree(RunDir(saved / "fsdp4").checkpoint(1), damaged)
    (damaged / "model-00002-of-00004.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"missing.*model-00002-of-00004\.safetensors"):
        checkpoint.read_checkpoint(damaged)
    (damaged / durable.MANIFEST).unlink()
    durable.seal_folder(damaged)  # as if it had never been there
    with pytest.raises(CheckpointError, match="model-00002-of-00004"):
        checkpoint.read_checkpoint(damaged)
    state = json.loads((damaged / checkpoint.STATE).read_text())
    state["files"]["model"].remove("model-00002-of-00004.safetensors")
    _rewrite_state(damaged, lambda _: json.dumps(state))
    with pytest.raises(CheckpointError, match=r"pieces of .*weight.* are not there"):
        checkpoint.read_checkpoint(damaged)


def test_a_cut_model_begins_again_with_nothing_left_of_its_steps(tmp_path: Path) -> None:
    run_gangs("begin again", tmp_path, ["fsdp2xtp2", "hybrid2x2"])


def test_a_full_disk_on_one_rank_ends_all_and_leaves_the_last_good_checkpoint(tmp_path: Path) -> None:
    run_gangs("full disk", tmp_path, ["fsdp2"])
    told = [json.loads((tmp_path / f"told-{rank}.json").read_text()) for rank in (0, 1)]
    assert [each["code"] for each in told] == [errors.CANNOT_WRITE] * 2
    assert "rank 1 could not write model-00001-of-00002.safetensors" in told[0]["text"]
    assert os.strerror(errno.ENOSPC) in told[1]["text"]
    checkpoints = RunDir(tmp_path / "fsdp2").checkpoints
    assert [path.name for path in checkpoints.iterdir()] == ["step-00000001"]
    assert checkpoint.problems(checkpoints / "step-00000001") == []


def test_killed_before_touches_of_the_file_system_by_either_rank(tmp_path: Path) -> None:
    command, environment = [sys.executable, str(HERE / "crash_shards.py"), str(tmp_path)], os.environ | {"PYTHONPATH": str(HERE.parents[1])}
    done = subprocess.run(command, env=environment | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    for rank in (0, 1):
        newest = [result["newest"] for result in found if result["rank"] == rank]
        assert len(newest) > 8, "the save has more calls than that: the hook does not see them"
        assert set(newest) == {2, 3}, "a loader must find the old or the new one"
        assert newest == sorted(newest), "and the new one for good once it was there"
    assert [result["newest"] for result in found if result["rank"] == 1 and result["touch"]] == [2] * (len(newest) - 1), "no checkpoint lacks a rank's pieces"


def test_every_file_is_forced_to_storage_by_its_writer_and_rank_0_needs_no_more_calls_for_more_of_them(tmp_path: Path) -> None:
    layouts = ["fsdp2", "fsdp4"]
    command = [sys.executable, str(HERE / "count_syncs.py"), "syncs", str(tmp_path), ",".join(layouts)]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    commits = []
    for layout in layouts:
        forced = [json.loads((tmp_path / f"{layout}-syncs-{rank}.json").read_text()) for rank in range(LAYOUTS[layout])]
        files = {path.name for step in (1, 2) for path in RunDir(tmp_path / layout).checkpoint(step).glob("*.safetensors")}
        assert len(files) == 2 * LAYOUTS[layout]
        assert sorted(name for names in forced for name in names if name in files) == sorted([*files, *files]), "each once in each of the two saves"
        for names in forced:
            places = [index for index, name in enumerate(names) if name in files]
            assert all(names[index + 1].startswith(".step-") for index in places), "then its name, before it is told of"
        commits.append(sorted(name.split(".tmp-")[0] for name in forced[0] if name not in files))
    few, many = commits
    assert few == many and {"state.json", ".manifest.json", "checkpoints"} <= set(few)
