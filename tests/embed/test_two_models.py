"""Two models side by side: the columns of each are those that it gives alone, and both belong to what a file is."""

from __future__ import annotations

import json
import os
import shutil
import signal

import h5py
import numpy as np
import pytest

from prottrans_hpc import architecture, durable, errors
from prottrans_hpc.embed import compute, h5file
from prottrans_hpc.embed import proteins as windows
from prottrans_hpc.models.prot_txl import build
from prottrans_hpc.train import checkpoint

RECORD = architecture.get("prot_txl")


def write_txl(path, *, seed, direction):
    module = build(RECORD.size("tiny").shape)
    module.initialise(seed)
    checkpoint.write_model_checkpoint(path, record=RECORD, shape=module.shape, weights=module.state_dict(), origin={})
    state = json.loads((path / checkpoint.STATE).read_text())
    state["identity"]["science"] = {"objective": {"name": "causal", "direction": direction}}
    (path / checkpoint.STATE).write_text(json.dumps(state))
    (path / durable.MANIFEST).unlink()
    durable.seal_folder(path)
    return str(path)


@pytest.fixture(scope="module")
def forward(tmp_path_factory):
    return write_txl(tmp_path_factory.mktemp("model") / "forward", seed=1, direction="forward")


@pytest.fixture(scope="module")
def reverse(tmp_path_factory):
    return write_txl(tmp_path_factory.mktemp("model") / "reverse", seed=2, direction="reverse")


def content(path):
    with h5py.File(path, "r") as file:
        return {name: dataset[()] for name, dataset in file.items()}


def test_the_columns_are_those_of_each_model_alone(embed, forward, reverse, tmp_path):
    both = content(embed(source=forward, also=reverse, per_residue=True))
    first, second = (content(embed(source=source, per_residue=True, out=str(tmp_path / f"{name}.h5"))) for name, source in (("f", forward), ("r", reverse)))
    assert both["residues"].shape[1] == both["mean"].shape[1] == 128
    for name in ("residues", "mean"):
        assert np.array_equal(both[name], np.concatenate([first[name], second[name]], axis=1))
    assert all(np.array_equal(both[name], first[name]) for name in ("names", "lengths", "offsets", "failed_names"))


def test_the_attributes_describe_both(embed, forward, reverse, capsys):
    attributes = h5file.read_attributes(embed(source=forward, also=reverse, json=True))
    found = {name: attributes[name] for name in ("architecture", "also_architecture", "also_size", "width", "also_width", "checkpoint", "also_checkpoint")}
    wanted = {"architecture": "prot_txl", "also_architecture": "prot_txl", "also_size": "tiny", "width": 128, "also_width": 64}
    assert found == wanted | {"checkpoint": "forward", "also_checkpoint": "reverse"}
    assert ("direction" in attributes, attributes["also_direction"]) == (False, "reverse")
    assert attributes["manifest_sha256"] != attributes["also_manifest_sha256"]
    summary = json.loads(capsys.readouterr().out)
    assert (summary["width"], summary["checkpoint"], summary["also_checkpoint"]) == (128, "forward", "reverse")


def test_two_architectures_read_what_both_can(embed, forward, tiny_checkpoint, fasta, tmp_path):
    """ProtBert's position table holds 2,558 residues, ProtTXL has no limit."""
    fasta.write_text(fasta.read_text() + ">long\n" + "MKVLA" * 600 + "\n")
    both = content(embed(source=forward, also=str(tiny_checkpoint), precision="fp16"))
    assert (both["failed_names"].tolist(), both["mean"].dtype) == ([b"long"], np.float16)
    assert b"2,558 at most" in both["failed_reasons"][0]
    alone = content(embed(precision="fp16", out=str(tmp_path / "bert.h5")))["mean"]
    assert np.abs(both["mean"][:, 64:].astype(np.float32) - alone).max() <= 2e-3


def test_another_second_model_is_another_request(embed, forward, reverse, tiny_checkpoint, tmp_path):
    path = embed(source=forward, also=reverse)
    before = path.read_bytes()
    for also, said in ((str(tiny_checkpoint), r"also\.manifest_sha256: '"), (None, r"also: \{.* -> None")):
        with pytest.raises(errors.IdentityError, match=rf"out\.h5 holds embeddings of another request.*{said}"):
            embed(source=forward, also=also)
    with pytest.raises(errors.IdentityError, match=r"checkpoint\.manifest_sha256.*also\.manifest_sha256"):
        embed(source=reverse, also=forward)
    embed(source=forward, also=reverse)
    assert path.read_bytes() == before
    embed(source=forward, out=str(tmp_path / "one.h5"))
    with pytest.raises(errors.IdentityError, match=r"also: None -> "):
        embed(source=forward, also=reverse, out=str(tmp_path / "one.h5"))


def test_a_stopped_extraction_goes_on_with_the_same_two_models_only(embed, forward, reverse, tiny_checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(windows, "WINDOW_RESIDUES", 3_000)
    monkeypatch.setattr(compute, "_PART_BYTES", 1)
    undisturbed = embed(source=forward, also=reverse, per_residue=True, out=str(tmp_path / "undisturbed.h5"))
    written = []
    real = compute._PartWriter.add

    def add(self, extract, **where):
        real(self, extract, **where)
        written.append(where)
        if len(written) == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(compute._PartWriter, "add", add)
        with pytest.raises(errors.RequeueRequested):
            embed(source=forward, also=reverse, per_residue=True)
    with pytest.raises(errors.IdentityError, match=r"out\.h5\.parts holds embeddings of another request.*also\.manifest_sha256"):
        embed(source=forward, also=str(tiny_checkpoint), per_residue=True)
    capsys.readouterr()
    found = embed(source=forward, also=reverse, per_residue=True, json=True)
    assert json.loads(capsys.readouterr().out)["resumed_batches"] == 5
    assert found.read_bytes() == undisturbed.read_bytes()


def test_one_model_twice_is_refused(embed, forward, tmp_path):
    shutil.copytree(forward, tmp_path / "copy")
    for also in (forward, str(tmp_path / "copy")):
        with pytest.raises(errors.ConfigError, match=r"--also .* is the checkpoint .*forward again"):
            embed(source=forward, also=also)
    with pytest.raises(errors.CheckpointError):
        embed(source=forward, also=str(tmp_path / "missing"))
