"""ProtT5 out to transformers and back, whole and as an encoder in half precision, through the real stages."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from prottrans_hpc import architecture
from prottrans_hpc.embed.batches import build_batch, build_encoder
from prottrans_hpc.errors import ConfigError, DataError
from prottrans_hpc.models.huggingface_t5 import LAYOUT
from prottrans_hpc.models.prot_t5 import build
from prottrans_hpc.stage import run_stage
from prottrans_hpc.train import checkpoint

transformers = pytest.importorskip("transformers", reason="the reference implementation: pip install 'prottrans-hpc[interop]'")

RECORD = architecture.get("prot_t5")
PROTEIN = "MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQAPILSRVGDGTQDNLSGAEKAVQ"


def export(source, out, **changes):
    run_stage("export", {"source": str(source), "to": "hf", "precision": "fp32", "out": str(out), "json": False} | changes)


def import_(source, out):
    run_stage("import", {"source": str(source), "out": str(out), "json": False})


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint of a tiny ProtT5, and its module."""
    model = build(RECORD.size("tiny").shape)
    model.initialise(3)
    path = tmp_path_factory.mktemp("trained") / "checkpoint"
    checkpoint.write_model_checkpoint(path, record=RECORD, shape=model.shape, weights=model.state_dict(), origin={"imported_from": "a test"})
    return path, model.eval()


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "hf"
    export(trained[0], folder)
    return folder


def own_hidden(model):
    with torch.no_grad():
        return model.hidden(build_batch([PROTEIN.encode()], build_encoder(RECORD.vocabulary)))


def test_an_exported_folder_opens_in_transformers_and_computes_the_same(trained, exported):
    tokenizer, model = transformers.AutoTokenizer.from_pretrained(exported), transformers.AutoModelForSeq2SeqLM.from_pretrained(exported).eval()
    assert type(model).__name__ == "T5ForConditionalGeneration" and model.config.scale_decoder_outputs
    inputs = tokenizer(" ".join(PROTEIN), return_tensors="pt")
    with torch.no_grad():
        hidden = model.encoder(**inputs).last_hidden_state[0]
    assert (own_hidden(trained[1]) - hidden).abs().max() <= 1e-5
    assert "T5EncoderModel" in (exported / "README.md").read_text()


@pytest.mark.parametrize(("precision", "dtype", "tolerance"), [("fp32", torch.float32, 1e-5), ("bf16", torch.bfloat16, 0.05), ("fp16", torch.float16, 0.01)])
def test_the_encoder_alone_in_any_precision(trained, tmp_path, precision, dtype, tolerance):
    export(trained[0], tmp_path / "encoder", to="hf-encoder", precision=precision)
    tensors = load_file(tmp_path / "encoder" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {dtype} and not any(name.startswith("decoder") for name in tensors)
    model = (
        transformers.AutoModel.from_pretrained(tmp_path / "encoder")
        if precision == "fp32"
        else transformers.T5EncoderModel.from_pretrained(tmp_path / "encoder")
    )
    assert model.dtype == dtype or precision == "fp16", "transformers keeps some matrices of fp16 models in fp32"
    theirs = transformers.T5EncoderModel.from_pretrained(tmp_path / "encoder", dtype=torch.float32).eval()
    inputs = transformers.AutoTokenizer.from_pretrained(tmp_path / "encoder")(" ".join(PROTEIN), return_tensors="pt")
    with torch.no_grad():
        assert (own_hidden(trained[1]) - theirs(**inputs).last_hidden_state[0]).abs().max() <= tolerance

    import_(tmp_path / "encoder", tmp_path / "back")
    record, shape, weights = checkpoint.load_model(tmp_path / "back")
    assert record.name == "prot_t5" and shape.num_decoder_layers == 0
    assert all(torch.equal(weights[own], tensors[name].float()) for own, name in LAYOUT.names(shape).items())
    export(tmp_path / "back", tmp_path / "again", precision=precision)
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (tmp_path / "encoder" / "model.safetensors").read_bytes()


def test_the_round_trip_changes_no_bit(trained, exported, tmp_path):
    import_(exported, tmp_path / "back")
    _, shape, weights = checkpoint.load_model(tmp_path / "back")
    assert shape == trained[1].shape
    state = trained[1].state_dict()
    assert weights.keys() == state.keys() and all(torch.equal(weights[name], state[name]) for name in state)
    export(tmp_path / "back", tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (exported / "model.safetensors").read_bytes()


@pytest.mark.parametrize("kind", ["T5ForConditionalGeneration", "T5EncoderModel"])
def test_a_folder_as_transformers_saves_it_is_read(trained, exported, tmp_path, kind):
    getattr(transformers, kind).from_pretrained(exported).save_pretrained(tmp_path / "saved")
    transformers.AutoTokenizer.from_pretrained(exported).save_pretrained(tmp_path / "saved")
    import_(tmp_path / "saved", tmp_path / "back")
    _, shape, weights = checkpoint.load_model(tmp_path / "back")
    assert (shape.num_decoder_layers > 0) == (kind == "T5ForConditionalGeneration")
    assert all(torch.equal(tensor, trained[1].state_dict()[name]) for name, tensor in weights.items())


@pytest.mark.parametrize("kind", ["config.json", "encoder_config.json"])
def test_the_published_configurations_are_those_of_the_published_sizes(repository, kind):
    published = json.loads((repository / "tests" / "recorded" / "huggingface_prot_t5" / kind).read_text())
    tensors = LAYOUT.names(RECORD.size("prot_t5_xl_u50").shape).values()
    shape, differences = LAYOUT.read_config(published, frozenset(name for name in tensors if kind == "config.json" or not name.startswith("decoder.")))
    assert not differences
    written, wanted = LAYOUT.write_config(shape), RECORD.size("prot_t5_xl_u50").shape
    assert shape == (wanted if kind == "config.json" else LAYOUT.encoder_of(wanted))
    aside = {"_name_or_path", "transformers_version", "torch_dtype", "output_past"}
    assert {key: written.get(key) for key in published.keys() - aside} == {key: published[key] for key in published.keys() - aside}
    assert published["architectures"] == written["architectures"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"feed_forward_proj": "gated-gelu"}, "feed_forward_proj is 'gated-gelu', this architecture has 'relu'"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is False"),
        ({"vocab_size": 32_128}, "vocab_size is 32128, this architecture has 128"),
        ({"d_kv": None}, "d_kv"),
        ({"d_model": 128}, "of another shape"),
    ],
)
def test_a_foreign_configuration_is_refused_naming_the_difference(exported, tmp_path, change, said):
    shutil.copytree(exported, tmp_path / "hf")
    (tmp_path / "hf" / "manifest.json").unlink()
    values = json.loads((tmp_path / "hf" / "config.json").read_text()) | change
    (tmp_path / "hf" / "config.json").write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    with pytest.raises((ConfigError, DataError), match=said):
        import_(tmp_path / "hf", tmp_path / "back")


def test_a_vocabulary_in_another_order_is_refused_naming_the_tokens(exported, tmp_path):
    shutil.copytree(exported, tmp_path / "hf")
    (tmp_path / "hf" / "manifest.json").unlink()
    spiece = (tmp_path / "hf" / "spiece.model").read_bytes()
    (tmp_path / "hf" / "spiece.model").write_bytes(spiece.replace("\u2581A".encode(), b"****").replace("\u2581L".encode(), "\u2581A".encode()))
    with pytest.raises(ConfigError, match=r"spiece.model: token 3 is '.{4}', not 'A'"):
        import_(tmp_path / "hf", tmp_path / "back")


def test_the_bias_that_early_versions_gave_the_cross_attention_is_skipped(exported, tmp_path):
    shutil.copytree(exported, tmp_path / "hf")
    (tmp_path / "hf" / "manifest.json").unlink()
    tensors = load_file(exported / "model.safetensors")
    extra = {"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight": torch.zeros(32, 4), "lm_head.weight": tensors["shared.weight"].clone()}
    save_file(tensors | extra, tmp_path / "hf" / "model.safetensors")
    import_(tmp_path / "hf", tmp_path / "back")
    save_file(tensors | {"lm_head.weight": torch.zeros_like(tensors["shared.weight"])}, tmp_path / "hf" / "model.safetensors")
    with pytest.raises(DataError, match=r"lm_head.weight is not equal to shared.weight"):
        import_(tmp_path / "hf", tmp_path / "other")


def test_weights_beyond_half_precision_are_not_written_and_encoders_have_no_encoder(trained, tmp_path, tiny_checkpoint):
    weights = {name: tensor.clone() for name, tensor in trained[1].state_dict().items()}
    weights["words.weight"][3, 3] = 1e6
    checkpoint.write_model_checkpoint(tmp_path / "large", record=RECORD, shape=trained[1].shape, weights=weights, origin={"imported_from": "a test"})
    with pytest.raises(DataError, match=r"leave the range of torch.float16: shared.weight"):
        export(tmp_path / "large", tmp_path / "hf", precision="fp16")
    assert not (tmp_path / "hf").exists()
    with pytest.raises(ConfigError, match="--to hf"):
        export(tiny_checkpoint, tmp_path / "hf", to="hf-encoder")
