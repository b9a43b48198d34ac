"""What ALBERT and ELECTRA have of their own in HuggingFace folders: vocabularies in any order, folders without a type, a generator beside."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from prottrans_hpc import architecture
from prottrans_hpc.errors import ConfigError, DataError
from prottrans_hpc.models import huggingface, sentencepiece_model
from prottrans_hpc.stage import find

ALBERT, BERT, ELECTRA = (architecture.get(name) for name in ("prot_albert", "prot_bert", "prot_electra"))
RECORDS = [ALBERT, BERT, ELECTRA]


@pytest.fixture(scope="module")
def folders(tmp_path_factory, strengthen):
    """`{name: (model, exported folder)}`. Tests must not change them."""
    made = {}
    for record in (ALBERT, ELECTRA):
        model = strengthen(find(record.build)(record.size("tiny").shape)).eval()
        out = tmp_path_factory.mktemp(record.name) / "hf"
        huggingface.write_folder(out, record=record, shape=model.shape, weights=model.state_dict(), card="a card")
        made[record.name] = (model, out)
    return made


@pytest.fixture
def copy(folders, tmp_path):
    """`copy(name)`: such a folder to change, without manifests: as from anywhere else."""

    def make(name):
        target = tmp_path / "hf"
        shutil.copytree(folders[name][1], target)
        for manifest in target.rglob("manifest.json"):
            manifest.unlink()
        return target

    return make


def edit_config(folder, **changes):
    values = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in values.items() if value != "remove"}))


def same_weights(imported, model):
    state = model.state_dict()
    return imported.weights.keys() == state.keys() and all(torch.equal(imported.weights[name], state[name]) for name in state)


@pytest.mark.parametrize("name", ["prot_albert", "prot_electra"])
def test_the_round_trip_changes_no_bit(folders, name):
    model, folder = folders[name]
    imported = huggingface.read_folder(folder, RECORDS)
    assert (imported.record.name, imported.shape, imported.notes) == (name, model.shape, ())
    assert same_weights(imported, model)


def test_an_exported_albert_opens_in_transformers_and_tokenises_as_we_do(folders, query_proteins):
    transformers = pytest.importorskip("transformers", reason="the reference implementation: pip install 'prottrans-hpc[interop]'")
    model, folder = folders["prot_albert"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    table = ALBERT.vocabulary.residue_table()
    assert len(query_proteins) == 500
    for protein in [*query_proteins, "MKBUZOX"]:
        assert tokenizer(" ".join(protein))["input_ids"] == [2, *protein.encode().translate(table), 3]
    assert (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.mask_token_id) == (0, 1, 4)
    masked, report = transformers.AutoModelForMaskedLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] | report["mismatched_keys"]
    body, report = transformers.AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    inputs = tokenizer(" ".join(query_proteins[0]), return_tensors="pt")
    hidden = model.hidden(one_sequence(inputs["input_ids"][0]))
    assert (body(**inputs).last_hidden_state[0] - hidden).abs().max() <= 1e-5
    assert (masked(**inputs).logits[0] - model.logits(hidden)).abs().max() <= 1e-5


def one_sequence(tokens):
    length, nothing = len(tokens), torch.empty(0, dtype=torch.long)
    return architecture.Batch(tokens, torch.arange(length), torch.tensor([0, length], dtype=torch.int32), nothing, nothing, torch.zeros(1), length, length - 2)


def test_the_published_albert_folder_names_no_type_and_is_known_by_its_keys(copy, folders):
    """Its config.json has these keys and no others."""
    folder, shape = copy("prot_albert"), folders["prot_albert"][0].shape
    kept = json.loads((folder / "config.json").read_text())
    published = {
        "attention_probs_dropout_prob": 0,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0,
        "net_structure_type": 0,
        "layers_to_keep": [],
        "gap_size": 0,
    }
    published |= {"num_memory_blocks": 0, "inner_group_num": 1, "down_scale_factor": 1, "num_hidden_groups": 1}
    own = ("embedding_size", "hidden_size", "initializer_range", "intermediate_size", "max_position_embeddings", "num_attention_heads")
    published |= {key: kept[key] for key in (*own, "num_hidden_layers", "type_vocab_size", "vocab_size")}
    (folder / "config.json").write_text(json.dumps(published))
    assert huggingface.read_folder(folder, RECORDS).shape == shape


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_act": "gelu_new"}, "hidden_act is 'gelu_new', this architecture has 'gelu'"),
        ({"hidden_act": "remove"}, "hidden_act is missing, which means 'gelu_new' to ALBERT"),
        ({"num_hidden_groups": 2, "inner_group_num": 3}, "num_hidden_groups is 2, .*inner_group_num is 3"),
        ({"num_attention_heads": 7}, "hidden_size .* must be a multiple of num_heads 7"),
    ],
)
def test_a_foreign_albert_is_refused_naming_each_difference(copy, change, said):
    folder = copy("prot_albert")
    edit_config(folder, **change)
    with pytest.raises(ConfigError, match=said):
        huggingface.read_folder(folder, RECORDS)


def test_rows_are_sorted_by_the_vocabulary_beside_them(copy, folders):
    """As in the released weights, whose order is known from their spiece.model alone."""
    folder, model = copy("prot_albert"), folders["prot_albert"][0]
    original = sentencepiece_model.parse((folder / "spiece.model").read_bytes(), source="a test")
    order = [*range(13), *reversed(range(13, 34))]
    pieces = tuple(original.pieces[row] for row in order)
    pieces = (*pieces[:7], dataclasses.replace(pieces[7], text="_"), *pieces[8:])  # a sign that ours lacks
    (folder / "spiece.model").write_bytes(sentencepiece_model.render(dataclasses.replace(original, pieces=pieces)))
    tensors = load_file(folder / "model.safetensors")
    for name in ("albert.embeddings.word_embeddings.weight", "predictions.bias"):
        tensors[name] = tensors[name][order].contiguous()
    save_file(tensors, folder / "model.safetensors")
    imported = huggingface.read_folder(folder, RECORDS)
    assert same_weights(imported, model)
    assert "sorted" in imported.notes[0]


def test_a_vocabulary_without_a_residue_is_refused(copy):
    folder = copy("prot_albert")
    original = sentencepiece_model.parse((folder / "spiece.model").read_bytes(), source="a test")
    pieces = tuple(dataclasses.replace(piece, text="J") if piece.text.endswith("W") else piece for piece in original.pieces)
    (folder / "spiece.model").write_bytes(sentencepiece_model.render(dataclasses.replace(original, pieces=pieces)))
    with pytest.raises(ConfigError, match=r"spiece.model: without 'W'"):
        huggingface.read_folder(folder, RECORDS)
    (folder / "spiece.model").unlink()
    with pytest.raises(ConfigError, match=r"it has no spiece.model, so which row"):
        huggingface.read_folder(folder, RECORDS)


def test_both_electra_models_open_in_transformers_and_compute_the_same(folders, query_proteins):
    transformers = pytest.importorskip("transformers", reason="the reference implementation: pip install 'prottrans-hpc[interop]'")
    model, folder = folders["prot_electra"]
    for place in (folder, folder / "generator"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(place)
        table = ELECTRA.vocabulary.residue_table()
        assert all(tokenizer(" ".join(protein))["input_ids"] == [2, *protein.encode().translate(table), 3] for protein in query_proteins)
    opened = []
    for kind, place in (("AutoModelForPreTraining", folder), ("AutoModel", folder), ("AutoModelForMaskedLM", folder / "generator")):
        found, report = getattr(transformers, kind).from_pretrained(place, output_loading_info=True)
        assert not report["missing_keys"] | report["mismatched_keys"]
        opened.append(found)
    discriminator, body, generator = opened
    assert [type(one).__name__ for one in opened] == ["ElectraForPreTraining", "ElectraModel", "ElectraForMaskedLM"]
    inputs = tokenizer(" ".join(query_proteins[0]), return_tensors="pt")
    batch = one_sequence(inputs["input_ids"][0])
    hidden = model.hidden(batch)
    assert (body(**inputs).last_hidden_state[0] - hidden).abs().max() <= 1e-5
    assert (discriminator(**inputs).logits[0] - model.logits(hidden)[:, 0]).abs().max() <= 1e-5
    assert (generator(**inputs).logits[0] - model.generator_logits(model.generator_hidden(batch))).abs().max() <= 1e-5


def test_a_discriminator_alone_is_read_as_the_released_one_and_written_as_one(copy, folders, tmp_path):
    folder, model = copy("prot_electra"), folders["prot_electra"][0]
    shutil.rmtree(folder / "generator")
    imported = huggingface.read_folder(folder, RECORDS)
    assert imported.shape == dataclasses.replace(model.shape, generator=None)
    alone = find(ELECTRA.build)(imported.shape)
    alone.load_state_dict(imported.weights)
    huggingface.write_folder(tmp_path / "again", record=ELECTRA, shape=imported.shape, weights=imported.weights, card="a card")
    assert not (tmp_path / "again" / "generator").exists()
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_the_released_configuration_is_a_size():
    """The keys and values of its config.json."""
    values = {"architectures": ["ElectraForPreTraining"], "embedding_size": 1280, "hidden_act": "gelu", "hidden_size": 1280, "initializer_range": 0.02}
    values |= {"intermediate_size": 5120, "layer_norm_eps": 1e-12, "max_position_embeddings": 40000, "model_type": "electra", "num_attention_heads": 20}
    values |= {"num_hidden_layers": 32, "pad_token_id": 0, "type_vocab_size": 2, "vocab_size": 30}
    shape, differences = huggingface.layout_of(ELECTRA).read_config(values, frozenset())
    assert (shape, differences) == (ELECTRA.size("prot_electra_released").shape, [])


def test_a_generator_that_does_not_belong_to_the_discriminator_is_refused(copy):
    folder = copy("prot_electra")
    edit_config(folder / "generator", max_position_embeddings=512, hidden_act="relu")
    with pytest.raises(ConfigError, match=r"generator cannot be read .*hidden_act is 'relu'"):
        huggingface.read_folder(folder, RECORDS)
    edit_config(folder / "generator", hidden_act="gelu")
    with pytest.raises(ConfigError, match=r"max_position_embeddings is 512, the discriminator's is 2560"):
        huggingface.read_folder(folder, RECORDS)
    edit_config(folder / "generator", max_position_embeddings=2560)
    tensors = load_file(folder / "generator" / "model.safetensors")
    tensors["electra.embeddings.word_embeddings.weight"][7, 3] += 1.0
    save_file(tensors, folder / "generator" / "model.safetensors")
    with pytest.raises(DataError, match=r"differ in tensors that prot_electra shares: embeddings.words.weight"):
        huggingface.read_folder(folder, RECORDS)


def test_a_flipped_bit_in_the_generator_is_found(folders, tmp_path):
    folder = tmp_path / "hf"
    shutil.copytree(folders["prot_electra"][1], folder)
    weights = bytearray((folder / "generator" / "model.safetensors").read_bytes())
    weights[-5] ^= 1
    (folder / "generator" / "model.safetensors").write_bytes(weights)
    with pytest.raises(DataError, match=r"generator/model.safetensors is damaged: its SHA-256"):
        huggingface.read_folder(folder, RECORDS)
