"""ProtTXL out to HuggingFace's layout and back: no bit changes, what is refused, and what the command line does with it.

That transformers 4.35 computes the same from this layout is held by the recording of tests/models/test_prot_txl.py.
"""

from __future__ import annotations

import json
import shutil

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from prottrans_hpc import architecture
from prottrans_hpc.errors import ConfigError, DataError
from prottrans_hpc.models.huggingface_transfo_xl import LAYOUT
from prottrans_hpc.models.prot_txl import build
from prottrans_hpc.stage import run_stage
from prottrans_hpc.train import checkpoint

RECORD = architecture.get("prot_txl")
WORDS = "transformer.word_emb.emb_layers.0.weight"


def export(source, out, **choices):
    run_stage("export", {"source": str(source), "to": "hf", "out": str(out), "json": False} | choices)


def import_(source, out):
    run_stage("import", {"source": str(source), "out": str(out), "json": False})


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint of a tiny ProtTXL all of whose weights differ from where they start, and its module."""
    model = build(RECORD.size("tiny").shape)
    model.initialise(3)
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)) * 0.1)
    path = tmp_path_factory.mktemp("trained") / "checkpoint"
    checkpoint.write_model_checkpoint(path, record=RECORD, shape=model.shape, weights=model.state_dict(), origin={"imported_from": "a test"})
    return path, model.eval()


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    """That checkpoint in HuggingFace layout. Tests must not change it."""
    folder = tmp_path_factory.mktemp("exported") / "hf"
    export(trained[0], folder)
    return folder


@pytest.fixture
def folder(exported, tmp_path):
    """A copy to damage, without the manifest: as from anywhere else."""
    copy = tmp_path / "hf"
    shutil.copytree(exported, copy, ignore=shutil.ignore_patterns("manifest.json"))
    return copy


def edit_config(folder, **changes):
    values = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in values.items() if value != "absent"}))


def test_the_round_trip_changes_no_bit(trained, exported, tmp_path):
    import_(exported, tmp_path / "back")
    record, shape, weights = checkpoint.load_model(tmp_path / "back")
    assert (record.name, shape) == ("prot_txl", trained[1].shape)
    assert weights.keys() == trained[1].state_dict().keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in trained[1].state_dict().items())
    export(tmp_path / "back", tmp_path / "again")
    for name in ("config.json", "model.safetensors", "vocab.txt", "tokenizer_config.json", "special_tokens_map.json"):
        assert (tmp_path / "again" / name).read_bytes() == (exported / name).read_bytes()


@pytest.mark.parametrize("size", ["prot_txl", "prot_txl_bfd"])
def test_the_published_sizes_are_read_from_what_is_written_of_them(size):
    shape = RECORD.size(size).shape
    assert LAYOUT.read_config(LAYOUT.write_config(shape), frozenset()) == (shape, [])


def test_half_precision_comes_back_as_fp32_and_says_so(trained, tmp_path, capsys):
    export(trained[0], tmp_path / "half", precision="bf16")
    import_(tmp_path / "half", tmp_path / "back")
    assert "converted to fp32 (from torch.bfloat16)" in "".join(capsys.readouterr())
    weights = checkpoint.load_model(tmp_path / "back")[2]
    assert all(torch.equal(weights[name], tensor.bfloat16().float()) for name, tensor in trained[1].state_dict().items())


def test_a_folder_as_the_reference_saves_it_is_read(trained, folder, tmp_path):
    """With the decoder's second name of the word table, the frequencies of the distances, and a program as vocabulary beside the list."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weights |= {"crit.out_layers.0.weight": weights[WORDS], "transformer.pos_emb.inv_freq": torch.ones(32)}
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "vocab.pkl").write_bytes(b"not run")
    edit_config(folder, model_type="absent", dropatt="absent", dtype="absent", mem_len=512, proj_share_all_but_first=True)
    import_(folder, tmp_path / "back")
    _, shape, found = checkpoint.load_model(tmp_path / "back")
    assert shape.memory_length == 512
    assert all(torch.equal(found[name], tensor) for name, tensor in trained[1].state_dict().items())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"vocab_size": 267_735}, "vocab_size is 267735, this architecture has 28"),
        ({"cutoffs": [20, 24]}, r"cutoffs is \[20, 24\], this architecture has \[\] \(one softmax over all tokens\)"),
        ({"cutoffs": "absent"}, "cutoffs is 'missing'"),
        ({"div_val": 4}, "div_val is 4, this architecture has 1"),
        ({"div_val": "absent"}, "div_val is missing"),
        ({"untie_r": True}, "untie_r is True, this architecture has False"),
        ({"clamp_len": 1000}, "clamp_len is 1000, this architecture has -1"),
        ({"same_length": False}, "same_length is False"),
        ({"pre_lnorm": True}, "pre_lnorm is True"),
        ({"dropatt": 0.1}, "dropatt is 0.1, this architecture has 0.0"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is False"),
        ({"d_embed": 32}, "d_embed is 32, this architecture has the width of the hidden states, 64"),
        ({"d_head": "absent"}, "d_head is missing"),
        ({"mem_len": 0}, "memory and vocabulary must be at least 1"),
        ({"n_layer": "two"}, "num_layers"),
        ({"attn_type": 1, "n_head": "absent"}, "n_head is missing; .*attn_type is 1"),
    ],
)
def test_a_foreign_configuration_is_refused_naming_every_difference(folder, change, said, tmp_path):
    edit_config(folder, **change)
    with pytest.raises(ConfigError, match=rf"cannot be read as prot_txl: .*{said}"):
        import_(folder, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_a_damaged_configuration_is_refused(folder, tmp_path):
    content = (folder / "config.json").read_text()
    for damaged in (content[: len(content) // 2], "[1]"):
        (folder / "config.json").write_text(damaged)
        with pytest.raises(DataError, match=r"config\.json"):
            import_(folder, tmp_path / "back")


def test_a_vocabulary_in_another_order_or_unknown_is_refused(folder, tmp_path):
    tokens = (folder / "vocab.txt").read_text().split()
    for changed, said in (([*tokens[:3], *tokens[:2:-1]], "token 3 is 'O', not 'L'"), (tokens[:-1], "27 tokens instead of 28")):
        (folder / "vocab.txt").write_text("\n".join(changed) + "\n")
        with pytest.raises(ConfigError, match=rf"vocab\.txt: {said}"):
            import_(folder, tmp_path / "back")
    (folder / "vocab.txt").unlink()
    with pytest.raises(ConfigError, match=r"it has no vocab\.txt .*vocab\.pkl is a program and is not run"):
        import_(folder, tmp_path / "back")


def test_weights_of_another_shape_or_kind_are_refused(folder, tmp_path):
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"crit.out_layers.0.weight": weights[WORDS] + 1}, folder / "model.safetensors")
    with pytest.raises(DataError, match=rf"crit\.out_layers\.0\.weight is not equal to {WORDS}"):
        import_(folder, tmp_path / "back")
    del weights["transformer.r_w_bias"]
    changed = weights | {"transformer.r_r_bias": weights["transformer.r_r_bias"].flatten(), "transformer.layers.0.dec_attn.r_w_bias": torch.ones(2, 32)}
    save_file(changed, folder / "model.safetensors")
    said = r"missing: transformer\.r_w_bias; not part of the model: transformer\.layers\.0\.dec_attn\.r_w_bias; .*r_r_bias is \[64\], not \[2, 32\]"
    with pytest.raises(DataError, match=said):
        import_(folder, tmp_path / "back")


def test_the_command_line_imports_embeds_and_exports(prottrans, trained, exported, tmp_path):
    """What was imported embeds as the model that was exported, and is told of by its name."""
    fasta = tmp_path / "proteins.fasta"
    fasta.write_text(">a\nMKTAYIAKQR\n>long\n" + "ACDEFGHIKLMNPQRSTVWY" * 40 + "\n")
    done = prottrans("import", str(exported), "--out", str(tmp_path / "imported"), "--json")
    assert (json.loads(done.stdout)["architecture"], json.loads(done.stdout)["sizes"]) == ("prot_txl", ["tiny"])
    files = []
    for source in (trained[0], tmp_path / "imported"):
        files.append(tmp_path / f"{len(files)}.h5")
        prottrans("embed", str(source), str(fasta), "--out", str(files[-1]), "--per-residue")
    with h5py.File(files[0]) as one, h5py.File(files[1]) as other:
        assert other.attrs["architecture"] == "prot_txl" and other["residues"].shape == (810, 64)
        assert np.array_equal(one["residues"][()], other["residues"][()]) and np.array_equal(one["mean"][()], other["mean"][()])
    prottrans("export", str(tmp_path / "imported"), "--to", "hf", str(tmp_path / "again"))
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (exported / "model.safetensors").read_bytes()
    sizes = {size["name"]: size for size in json.loads(prottrans("models", "show", "prot_txl", "--json").stdout)["sizes"]}
    assert list(sizes) == ["prot_txl", "prot_txl_bfd", "small", "tiny"]
    assert sizes["prot_txl"]["parameters"] == 409_251_868
    assert "Transformer-XL" in prottrans("models", "show", "prot_txl").stdout
