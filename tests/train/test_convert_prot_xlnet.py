"""ProtXLNet out to HuggingFace's layout and back: what transformers opens, the tokens of real proteins, what is refused."""

from __future__ import annotations

import dataclasses
import gzip
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from prottrans_hpc import architecture
from prottrans_hpc.embed.batches import build_batch, build_encoder
from prottrans_hpc.errors import ConfigError, DataError
from prottrans_hpc.models import sentencepiece_model
from prottrans_hpc.models.prot_xlnet import build
from prottrans_hpc.models.sentencepiece_model import BLANK, Piece, SentencePieceModel
from prottrans_hpc.stage import run_stage
from prottrans_hpc.train import checkpoint

RECORD = architecture.get("prot_xlnet")


def export(source, out):
    run_stage("export", {"source": str(source), "to": "hf", "out": str(out), "json": False})


def import_(source, out):
    run_stage("import", {"source": str(source), "out": str(out), "json": False})


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint of a tiny ProtXLNet, and its module."""
    model = build(dataclasses.replace(RECORD.size("tiny").shape, initializer_range=0.02))
    model.initialise(3)
    with torch.no_grad():
        for parameter in filter(lambda parameter: parameter.requires_grad, model.parameters()):
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
    """A copy to damage, without the manifest: as from anywhere else."""
    copy = tmp_path / "hf"
    shutil.copytree(exported, copy, ignore=shutil.ignore_patterns("manifest.json"))
    return copy


def edit_config(folder, **changes):
    values = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in values.items() if value != "absent"}))


@pytest.fixture(scope="module")
def query_proteins(repository):
    with gzip.open(repository / "data" / "mmseqs2_example_QUERY.fasta.gz", "rt") as file:
        return ["".join(record.splitlines()[1:]) for record in file.read().split(">")[1:]]


def test_an_exported_folder_opens_in_transformers_and_computes_the_same(trained, exported, query_proteins):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    body, whole = (kind.from_pretrained(exported).eval() for kind in (transformers.AutoModel, transformers.XLNetLMHeadModel))
    assert type(body).__name__ == "XLNetModel"
    assert sum(parameter.numel() for parameter in whole.parameters()) == RECORD.num_parameters(trained[1].shape)
    for protein in query_proteins[:5]:
        batch = build_batch([protein.encode()], build_encoder(RECORD.vocabulary))
        inputs = tokenizer(" ".join(protein), return_tensors="pt")
        with torch.no_grad():
            hidden, found = trained[1].hidden(batch), body(**inputs)
            scores = whole(**inputs).logits[0]
            # With token types as well: the table of segments is zero.
            typed = body(**inputs, token_type_ids=torch.tensor([[0] * (len(protein) + 1) + [2]]))
        assert (found.last_hidden_state[0] - hidden).abs().max() <= 1e-5
        assert (typed.last_hidden_state[0] - hidden).abs().max() <= 1e-5
        assert (scores - trained[1].logits(hidden)).abs().max() <= 1e-5


def test_the_reference_tokenizer_gives_the_same_tokens_for_every_protein(exported, query_proteins):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    assert type(tokenizer).__name__ == "XLNetTokenizer" and len(tokenizer) == 37
    encoder = build_encoder(RECORD.vocabulary)
    assert len(query_proteins) == 500
    for protein in [*query_proteins, "MKTUZOBXXJA"]:
        assert tokenizer(" ".join(protein))["input_ids"] == build_batch([protein.encode()], encoder).tokens.tolist()


def test_the_round_trip_changes_no_bit(trained, exported, tmp_path):
    import_(exported, tmp_path / "back")
    record, shape, weights = checkpoint.load_model(tmp_path / "back")
    assert (record.name, shape) == ("prot_xlnet", trained[1].shape)
    assert weights.keys() == trained[1].state_dict().keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in trained[1].state_dict().items())


def test_a_folder_as_transformers_saves_it_is_read(trained, exported, folder, tmp_path):
    transformers = pytest.importorskip("transformers")
    transformers.XLNetLMHeadModel.from_pretrained(exported).save_pretrained(folder)
    import_(folder, tmp_path / "back")
    weights = checkpoint.load_model(tmp_path / "back")[2]
    assert all(torch.equal(weights[name], tensor) for name, tensor in trained[1].state_dict().items())


def test_the_configuration_of_the_published_size_counts_as_transformers_does(folder):
    transformers = pytest.importorskip("transformers")
    from prottrans_hpc.models.huggingface_xlnet import LAYOUT

    with torch.device("meta"):
        model = transformers.XLNetLMHeadModel(transformers.XLNetConfig(**LAYOUT.write_config(RECORD.size("prot_xlnet").shape)))
    assert sum(parameter.numel() for parameter in model.parameters()) == 409_413_669


def test_the_released_configuration_is_read_as_a_model_without_memory(folder, trained, tmp_path):
    """Keys as Rostlab/prot_xlnet has them, some of which say nothing here."""
    edit_config(folder, mem_len=None, reuse_len=None, clamp_len=-1, summary_type="last", start_n_top=5, end_n_top=5, dtype="absent", use_mems_eval="absent")
    import_(folder, tmp_path / "back")
    shape = checkpoint.load_model(tmp_path / "back")[1]
    assert (shape.memory_length, shape.clamp_length, shape.num_layers) == (0, 0, trained[1].shape.num_layers)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"attn_type": "uni"}, "attn_type is 'uni', this architecture has 'bi'"),
        ({"ff_activation": "relu"}, "ff_activation is 'relu'"),
        ({"bi_data": True}, "bi_data is True"),
        ({"vocab_size": 32_000}, "vocab_size is 32000, this architecture has 37"),
        ({"d_inner": "absent"}, "d_inner is missing"),
        ({"d_head": 16}, "d_head is 16, this architecture has d_model / n_head = 32"),
        ({"n_head": 3}, "must be a multiple"),
    ],
)
def test_a_foreign_configuration_is_refused_naming_the_difference(folder, change, said, tmp_path):
    edit_config(folder, **change)
    with pytest.raises(ConfigError, match=said):
        import_(folder, tmp_path / "back")


def reordered(folder, order):
    model = sentencepiece_model.parse((folder / "spiece.model").read_bytes(), source="a test")
    return SentencePieceModel(tuple(model.pieces[i] for i in order), unknown_id=0, padding_id=-1)


def test_residues_in_another_order_are_sorted_and_the_unknown_piece_may_be_called_x(folder, trained, tmp_path, capsys):
    order = [*range(17), *np.random.default_rng(0).permutation(np.arange(17, 37)).tolist()]
    model = reordered(folder, order)
    pieces = (Piece("X", kind=sentencepiece_model.PieceType.UNKNOWN), *model.pieces[1:])
    (folder / "spiece.model").write_bytes(sentencepiece_model.render(SentencePieceModel(pieces, unknown_id=0)))
    weights = load_file(folder / "model.safetensors")
    for name in ("transformer.word_embedding.weight", "lm_loss.bias"):
        weights[name] = weights[name][order].contiguous()
    save_file(weights, folder / "model.safetensors")
    import_(folder, tmp_path / "back")
    assert "another order" in "".join(capsys.readouterr())
    found = checkpoint.load_model(tmp_path / "back")[2]
    assert all(torch.equal(found[name], tensor) for name, tensor in trained[1].state_dict().items())


def test_a_vocabulary_without_a_residue_is_refused_naming_it(folder, tmp_path):
    model = sentencepiece_model.parse((folder / "spiece.model").read_bytes(), source="a test")
    pieces = tuple(Piece(BLANK + "J") if piece.text == BLANK + "W" else piece for piece in model.pieces)
    (folder / "spiece.model").write_bytes(sentencepiece_model.render(SentencePieceModel(pieces)))
    with pytest.raises(ConfigError, match=r"spiece.model: without 'W'"):
        import_(folder, tmp_path / "back")
    (folder / "spiece.model").unlink()
    with pytest.raises(ConfigError, match=r"has no spiece.model"):
        import_(folder, tmp_path / "back2")


def test_weights_of_another_shape_or_kind_are_refused(folder, tmp_path):
    weights = load_file(folder / "model.safetensors")
    weights["transformer.layer.0.rel_attn.q"] = weights["transformer.layer.0.rel_attn.q"].flatten(1).clone()
    del weights["transformer.mask_emb"]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(DataError, match=r"missing: transformer.mask_emb.*rel_attn.q is \[64, 64\], not \[64, 2, 32\]"):
        import_(folder, tmp_path / "back")
