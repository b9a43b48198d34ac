"""Export and import through the real stages: what other libraries open, what is refused, and every bit on the way round."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from prottrans_hpc import architecture
from prottrans_hpc.errors import CheckpointError, ConfigError, DataError
from prottrans_hpc.models.huggingface_bert import LAYOUT
from prottrans_hpc.models.prot_bert import build
from prottrans_hpc.stage import run_stage
from prottrans_hpc.train import checkpoint
from prottrans_hpc.train.convert import render_card

RECORD = architecture.get("prot_bert")
FILES = {"README.md", "config.json", "manifest.json", "model.safetensors", "special_tokens_map.json", "tokenizer_config.json", "vocab.txt"}
PUBLISHED = Path(__file__).resolve().parents[1] / "recorded" / "huggingface_prot_bert"


def export(source, out, **changes):
    run_stage("export", {"source": str(source), "to": "hf", "out": str(out), "json": False} | changes)


def import_(source, out, **changes):
    run_stage("import", {"source": str(source), "out": str(out), "json": False} | changes)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint of a tiny ProtBert, and its module."""
    model = build(RECORD.size("tiny").shape)
    model.initialise(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())) * 0.1)
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
    """A copy of the exported folder to damage, without the manifest: as from anywhere else."""
    copy = tmp_path / "hf"
    shutil.copytree(exported, copy)
    (copy / "manifest.json").unlink()
    return copy


def edit_config(folder, **changes):
    values = json.loads((folder / "config.json").read_text())
    values |= changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in values.items() if value != "remove"}))


def edit_weights(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_an_exported_folder_opens_in_transformers_and_computes_the_same(trained, exported):
    transformers = pytest.importorskip("transformers", reason="the reference implementation: pip install 'prottrans-hpc[interop]'")
    assert {path.name for path in exported.iterdir()} == FILES
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    inputs = tokenizer(" ".join("MKTUZ"), return_tensors="pt")
    assert inputs["input_ids"].tolist() == [[2, 21, 12, 15, 26, 28, 3]]
    assert tokenizer.mask_token_id == 4
    assert tokenizer.pad_token_id == 0
    masked, report = transformers.AutoModelForMaskedLM.from_pretrained(exported, output_loading_info=True)
    assert type(masked).__name__ == "BertForMaskedLM"
    assert not report["missing_keys"] | report["mismatched_keys"]
    body, report = transformers.AutoModel.from_pretrained(exported, output_loading_info=True)
    assert not report["missing_keys"]
    batch = one_sequence(inputs["input_ids"][0])
    ours = trained[1]
    hidden = ours.hidden(batch)
    assert (body(**inputs).last_hidden_state[0] - hidden).abs().max() <= 1e-5
    assert torch.equal(body.pooler.dense.weight, ours.pooler.weight)
    assert (masked(**inputs).logits[0] - ours.logits(hidden)).abs().max() <= 1e-5


def one_sequence(tokens):
    length, nothing = len(tokens), torch.empty(0, dtype=torch.long)
    return architecture.Batch(tokens, torch.arange(length), torch.tensor([0, length], dtype=torch.int32), nothing, nothing, torch.zeros(1), length, length - 2)


def test_the_model_card_says_what_it_is_and_how_to_use_it(exported):
    card = (exported / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    for said in ("prot_bert", "size: tiny", "parameters: 274,592", "imported from: a test", "AutoTokenizer.from_pretrained", "one blank between residues"):
        assert said in card


def test_the_example_of_the_model_card_works_as_it_is_pasted(trained, exported, monkeypatch):
    pytest.importorskip("transformers", reason="the reference implementation: pip install 'prottrans-hpc[interop]'")
    snippet = re.search(r"```python\n(.*?)```", (exported / "README.md").read_text(), re.DOTALL)[1]
    monkeypatch.chdir(exported)
    names = {}
    exec(snippet, names)
    hidden = trained[1].hidden(one_sequence(names["inputs"]["input_ids"][0]))
    assert names["residue_vectors"].shape == (10, 64)
    assert (names["residue_vectors"] - hidden[1:-1]).abs().max() <= 1e-5


@pytest.mark.parametrize("name", [record.name for record in architecture.available() if record.huggingface])
def test_every_example_is_python_that_opens_the_folder_of_its_card(name):
    record = architecture.get(name)
    card = render_card(record, record.size("tiny").shape, {"identity": {}, "step": 0, "run_id": None})
    snippet = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    compile(snippet, name, "exec")
    assert snippet.startswith('folder = "."') and "from_pretrained(folder" in snippet


def test_the_published_folders_settings_are_those_of_an_export(exported):
    published, ours = (json.loads((folder / "config.json").read_text()) for folder in (PUBLISHED, exported))
    assert published.keys() <= ours.keys()
    assert (exported / "vocab.txt").read_text().split() == (PUBLISHED / "vocab.txt").read_text().split()
    assert json.loads((exported / "special_tokens_map.json").read_text()) == json.loads((PUBLISHED / "special_tokens_map.json").read_text())


def test_the_round_trip_changes_no_bit(trained, exported, tmp_path):
    import_(exported, tmp_path / "imported")
    record, shape, weights = checkpoint.load_model(tmp_path / "imported")
    original = trained[1].state_dict()
    assert (record.name, shape) == ("prot_bert", trained[1].shape)
    assert weights.keys() == original.keys()
    assert all(torch.equal(weights[name], original[name]) for name in original)
    export(tmp_path / "imported", tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (exported / "model.safetensors").read_bytes()


@pytest.mark.parametrize("heads", [("pooler",), ("next_sentence",), ("pooler", "next_sentence")])
def test_a_model_without_the_unused_heads_keeps_being_one(folder, heads, tmp_path):
    gone = {"pooler": "bert.pooler.dense", "next_sentence": "cls.seq_relationship"}
    edit_weights(folder, lambda tensors: [tensors.pop(f"{gone[head]}.{part}") for head in heads for part in ("weight", "bias")])
    import_(folder, tmp_path / "imported")
    _, shape, weights = checkpoint.load_model(tmp_path / "imported")
    assert (shape.has_pooler, shape.has_next_sentence) == ("pooler" not in heads, "next_sentence" not in heads)
    assert not {f"{head}.weight" for head in heads} & weights.keys()
    export(tmp_path / "imported", tmp_path / "again")
    assert load_file(tmp_path / "again" / "model.safetensors").keys() == load_file(folder / "model.safetensors").keys()
    assert json.loads((tmp_path / "again" / "config.json").read_text())["architectures"] == ["BertForMaskedLM"]


def test_a_folder_as_transformers_saves_it_is_read(trained, tmp_path):
    """As in the wild: a .bin with second names of shared tensors and a position buffer, the published config.json's keys, tokenizer.json."""
    transformers = pytest.importorskip("transformers", reason="the reference implementation: pip install 'prottrans-hpc[interop]'")
    shape, state = trained[1].shape, trained[1].state_dict()
    wild = tmp_path / "wild"
    transformers.BertTokenizer.from_pretrained(PUBLISHED, do_lower_case=False).save_pretrained(wild)
    values = json.loads((PUBLISHED / "config.json").read_text())
    (wild / "config.json").write_text(json.dumps(values | {key: LAYOUT.write_config(shape)[key] for key in values if key != "architectures"}))
    tensors = {name: state[own] for own, name in LAYOUT.names(shape).items()}
    tensors |= {alias: tensors[name] for alias, name in LAYOUT.aliases.items()}
    torch.save(tensors | {"bert.embeddings.position_ids": torch.arange(shape.max_positions)[None]}, wild / "pytorch_model.bin")
    import_(wild, tmp_path / "imported")
    weights = checkpoint.load_model(tmp_path / "imported")[2]
    assert all(torch.equal(weights[name], state[name]) for name in state)


def test_the_published_configuration_is_that_of_the_published_size():
    shape, differences = LAYOUT.read_config(
        json.loads((PUBLISHED / "config.json").read_text()), frozenset({"bert.pooler.dense.weight", "cls.seq_relationship.weight"})
    )
    assert differences == []
    assert shape == RECORD.size("prot_bert").shape
    assert LAYOUT.tokenizer_problems(PUBLISHED, RECORD.vocabulary) == []


def test_sharded_weights_are_read(folder, trained, tmp_path):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    places = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(places.values()):
        save_file({name: tensors[name] for name in tensors if places[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    import_(folder, tmp_path / "imported")
    weights = checkpoint.load_model(tmp_path / "imported")[2]
    assert all(torch.equal(weights[name], tensor) for name, tensor in trained[1].state_dict().items())


def test_a_shard_outside_the_folder_is_not_opened(folder, tmp_path):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))
    with pytest.raises(DataError, match="not a file beside it"):
        import_(folder, tmp_path / "imported")


def test_half_precision_weights_become_fp32_and_it_is_said(folder, tmp_path, capsys):
    edit_weights(folder, lambda tensors: tensors.update({name: tensor.half() for name, tensor in tensors.items()}))
    import_(folder, tmp_path / "imported", json=True)
    told = capsys.readouterr()
    assert "converted to fp32 (from torch.float16)" in told.err
    assert "converted to fp32" in json.loads(told.out)["notes"][0]
    assert all(tensor.dtype == torch.float32 for tensor in checkpoint.load_model(tmp_path / "imported")[2].values())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_act": "relu"}, "hidden_act is 'relu', this architecture has 'gelu'"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'"),
        ({"is_decoder": True, "tie_word_embeddings": False}, "is_decoder is True, .*tie_word_embeddings is False"),
        ({"vocab_size": 31}, "vocab_size is 31, this architecture has 30"),
        ({"hidden_size": "remove", "vocab_size": "remove"}, "hidden_size is missing; .*vocab_size is missing"),
        ({"num_attention_heads": 7}, "hidden_size 64 must be a multiple of num_heads 7"),
        ({"num_hidden_layers": "two"}, "num_layers = 'two'"),
        ({"model_type": "gpt2"}, "model_type 'gpt2'.*what can be imported is .*prot_bert: model_type 'bert'"),
        ({"model_type": "remove", "architectures": ["GPT2Model"]}, "GPT2Model"),
    ],
)
def test_a_foreign_configuration_is_refused_naming_each_difference(folder, change, said, tmp_path):
    edit_config(folder, **change)
    with pytest.raises(ConfigError, match=said):
        import_(folder, tmp_path / "imported")
    assert not (tmp_path / "imported").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[PAD]\n[UNK]\n", "2 tokens instead of 30 .without"),
        (" \n".join(["[PAD]", "[UNK]"]), "2 tokens instead of 30"),
        (None, "neither vocab.txt nor tokenizer.json"),
    ],
)
def test_a_foreign_vocabulary_is_refused(folder, content, said, tmp_path):
    (folder / "vocab.txt").unlink()
    if content is not None:
        (folder / "vocab.txt").write_text(content)
    with pytest.raises(ConfigError, match=said):
        import_(folder, tmp_path / "imported")


def test_a_vocabulary_in_another_order_is_refused_naming_the_tokens(folder, tmp_path):
    tokens = (folder / "vocab.txt").read_text().split()
    tokens[5], tokens[6] = tokens[6], tokens[5]
    (folder / "vocab.txt").write_text("\n".join(tokens))
    with pytest.raises(ConfigError, match=r"vocab\.txt: token 5 is 'A', not 'L', token 6 is 'L', not 'A'"):
        import_(folder, tmp_path / "imported")


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda tensors: tensors.pop("cls.predictions.bias"), "missing: cls.predictions.bias"),
        (lambda tensors: tensors.update(classifier=torch.zeros(1)), "not part of the model: classifier"),
        (
            lambda tensors: tensors.update({"bert.embeddings.position_embeddings.weight": torch.zeros(512, 64)}),
            r"of another shape: bert.embeddings.position_embeddings.weight is \[512, 64\], not \[2560, 64\]",
        ),
        (lambda tensors: tensors.update({"cls.predictions.bias": torch.full((30,), torch.nan)}), "not finite: cls.predictions.bias"),
        (lambda tensors: tensors.update({"cls.predictions.decoder.weight": torch.ones(30, 64)}), "decoder.weight is not equal to"),
    ],
)
def test_weights_that_do_not_fit_are_refused(folder, edit, said, tmp_path):
    edit_weights(folder, edit)
    with pytest.raises(DataError, match=said):
        import_(folder, tmp_path / "imported")


def test_a_position_table_of_another_length_is_fine_when_both_say_so(folder, tmp_path):
    edit_config(folder, max_position_embeddings=700)
    edit_weights(folder, lambda tensors: tensors.update({"bert.embeddings.position_embeddings.weight": torch.zeros(700, 64)}))
    import_(folder, tmp_path / "imported")
    assert checkpoint.load_model(tmp_path / "imported")[1].max_positions == 700


def test_a_cut_or_flipped_weight_file_is_found(exported, folder, tmp_path):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-100])
    with pytest.raises(DataError, match=r"model.safetensors is damaged"):
        import_(folder, tmp_path / "imported")
    flipped = bytearray(content)
    flipped[-1000] ^= 1
    (folder / "model.safetensors").write_bytes(flipped)
    shutil.copy(exported / "manifest.json", folder)
    with pytest.raises(DataError, match=r"its SHA-256 is not the one in manifest\.json"):
        import_(folder, tmp_path / "imported")


class Marker:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("torch_format", [True, False])
def test_a_malicious_pickle_is_refused_and_not_executed(folder, torch_format, tmp_path, recwarn):
    (folder / "model.safetensors").unlink()
    content = {"bert.embeddings.LayerNorm.weight": torch.zeros(64), "payload": Marker(tmp_path / "executed")}
    if torch_format:
        torch.save(content, folder / "pytorch_model.bin")
    else:
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Marker(tmp_path / "executed")))
    with pytest.raises(DataError, match=r"pytorch_model\.bin is refused: it holds more than tensors.* Take a model\.safetensors") as caught:
        import_(folder, tmp_path / "imported")
    assert "weights_only" not in str(caught.value) and "can still be loaded" not in str(caught.value)
    assert not recwarn.list
    assert not (tmp_path / "executed").exists()
    pickle.loads(pickle.dumps(Marker(tmp_path / "executed")))
    assert (tmp_path / "executed").exists(), "the marker must work, or the test proves nothing"


@pytest.mark.parametrize("content", [b"", b"not a weight file", pickle.dumps([1, 2])])
def test_a_file_that_is_no_weight_file_is_refused(folder, content, tmp_path):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(DataError, match=r"pytorch_model\.bin"):
        import_(folder, tmp_path / "imported")


def test_what_is_no_model_folder_is_said(tmp_path, folder):
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        import_(tmp_path, tmp_path / "imported")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        import_(folder, tmp_path / "imported")
    (folder / "config.json").write_text("{")
    with pytest.raises(DataError, match=r"config\.json is damaged"):
        import_(folder, tmp_path / "imported")


def test_nothing_is_overwritten(trained, exported, tmp_path):
    with pytest.raises(ConfigError, match="exists already"):
        export(trained[0], exported)
    with pytest.raises(ConfigError, match="exists already"):
        import_(exported, tmp_path)
    with pytest.raises(ConfigError, match="'onnx' is not known; choose from hf"):
        export(trained[0], tmp_path / "onnx", to="onnx")


def test_every_file_may_be_read_by_whom_the_umask_lets(trained, tmp_path):
    before = os.umask(0o027)
    try:
        export(trained[0], tmp_path / "hf")
    finally:
        os.umask(before)
    assert {path.name: oct(stat.S_IMODE(path.stat().st_mode)) for path in (tmp_path / "hf").iterdir()} == dict.fromkeys(FILES, "0o640")


@pytest.mark.parametrize("size", ["4k", "400k"])
def test_a_full_disk_is_named_and_nothing_half_is_left(trained, tmp_path, prottrans, size):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("this user may not mount a small file system")
    try:
        told = prottrans("export", str(trained[0]), "--to", "hf", str(disk / "hf"), code=73)
        assert "No space left on device" in told.stderr
        assert f"(file system {disk})" in told.stderr
        assert "Traceback" not in told.stderr
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_the_commands_do_it_too(prottrans, trained, tmp_path):
    told = prottrans("export", str(trained[0]), "--to", "hf", str(tmp_path / "hf"), "--json")
    assert json.loads(told.stdout) == {
        "path": str(tmp_path / "hf"),
        "architecture": "prot_bert",
        "parameters": 274_592,
        "step": 0,
        "checkpoint": str(trained[0]),
    }
    told = prottrans("import", str(tmp_path / "hf"), "--out", str(tmp_path / "imported"))
    assert "imported prot_bert (274,592 parameters)" in told.stdout
    prottrans("import", str(tmp_path), "--out", str(tmp_path / "nothing"), code=66)
