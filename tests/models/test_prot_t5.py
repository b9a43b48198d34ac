"""ProtT5 on packed proteins is the function of transformers' T5, and its arithmetic is that of its record."""

from __future__ import annotations

import contextlib
import dataclasses
import lzma

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from prottrans_hpc.architectures.prot_t5 import ARCHITECTURE, T5Shape, activation_bytes, flops, num_parameters
from prottrans_hpc.corpus.index import read_index
from prottrans_hpc.corpus.reader import Corpus
from prottrans_hpc.corpus.samples import whole_sequences
from prottrans_hpc.errors import ConfigError
from prottrans_hpc.models.huggingface_t5 import LAYOUT
from prottrans_hpc.models.prot_t5 import ProtT5, buckets, build
from prottrans_hpc.objectives.denoising import corrupt
from prottrans_hpc.objectives.layout import lay_out
from prottrans_hpc.recipe_objectives import Denoising

transformers = pytest.importorskip("transformers", reason="the reference implementation: pip install 'prottrans-hpc[interop]'")

VOCABULARY = ARCHITECTURE.vocabulary
TINY = ARCHITECTURE.size("tiny").shape
SHAPES = {
    "tiny": TINY,
    "uneven": dataclasses.replace(TINY, num_layers=3, num_decoder_layers=1, num_heads=3, head_size=32),
    "few buckets": dataclasses.replace(TINY, num_buckets=8, max_distance=20),
}


def strong(shape: T5Shape) -> ProtT5:
    """Position biases and norms far from their start: a difference anywhere shows in the output."""
    model = build(shape)
    model.initialise(7)
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
            else:
                parameter.mul_(8.0 if "position_biases" in name else 1.5)
    return model.eval()


@pytest.fixture(scope="module")
def corrupted(small_corpus):
    """`corrupted(ids)`: real proteins as the objective corrupts them, as one packed batch of tensors."""
    corpus = Corpus(read_index(small_corpus))

    def make(ids, settings=Denoising(), max_residues=512):  # noqa: B008 - frozen
        ids = np.array(ids, np.int64)
        samples = whole_sequences(ids, np.minimum(corpus.lengths_of(ids), max_residues), epoch=0)
        batch = corrupt(lay_out(corpus, samples, VOCABULARY), settings, 5)
        return dataclasses.replace(batch, **{name: torch.from_numpy(value) for name, value in vars(batch).items() if isinstance(value, np.ndarray)})

    return make


def rows(tokens, cu_seqlens, padding=0):
    return torch.nn.utils.rnn.pad_sequence(tokens.split(cu_seqlens.diff().tolist()), batch_first=True, padding_value=padding)


@pytest.fixture(params=SHAPES)
def pair(request):
    """One of ours, and theirs with the same weights; the layout's own configuration and names connect them."""
    ours = strong(SHAPES[request.param])
    theirs = transformers.T5ForConditionalGeneration(transformers.T5Config(**LAYOUT.write_config(ours.shape))).eval()
    state = ours.state_dict()
    absent = theirs.load_state_dict({name: state[own] for own, name in LAYOUT.names(ours.shape).items()}, strict=False)
    assert set(absent.missing_keys) <= set(LAYOUT.aliases) and not absent.unexpected_keys
    theirs.tie_weights()
    return ours, theirs


@pytest.mark.parametrize("target", ["whole", "sentinels"])
def test_hidden_states_logits_loss_and_gradients_are_those_of_transformers(pair, corrupted, target, states_of):
    ours, theirs = pair
    batch = corrupted(range(10), Denoising(target=target))
    lengths = batch.cu_seqlens.diff()
    assert batch.max_length > 2 * int(lengths.min()), "the batch must mix lengths"
    real, written = rows(torch.ones_like(batch.tokens), batch.cu_seqlens).bool(), rows(torch.ones_like(batch.targets), batch.decoder_cu_seqlens).bool()
    found = theirs(
        input_ids=rows(batch.tokens, batch.cu_seqlens),
        attention_mask=real.long(),
        decoder_input_ids=rows(batch.decoder_tokens, batch.decoder_cu_seqlens),
        output_hidden_states=True,
    )
    loss = torch.nn.functional.cross_entropy(found.logits[written], batch.targets, reduction="sum")
    states = states_of(ours, ours.encoder.layers, batch)
    assert len(states) == len(found.encoder_hidden_states) == ours.shape.num_layers + 1
    for state, wanted in zip(states, found.encoder_hidden_states, strict=True):
        assert (state - wanted[real]).abs().max() <= 1e-5
    logits = ours.logits(ours.decode(batch, states[-1]))
    assert (logits - found.logits[written]).abs().max() <= 1e-5
    result = ours(batch)
    assert result.loss.item() == pytest.approx(loss.item(), rel=1e-6)
    assert result.num_correct == (found.logits[written].argmax(-1) == batch.targets).sum()

    result.loss.backward()
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    own = {name: parameter.grad for name, parameter in ours.named_parameters()}
    largest = max(gradient.abs().max().item() for gradient in own.values())
    for name, their_name in LAYOUT.names(ours.shape).items():
        assert (own[name] - gradients[their_name]).abs().max() <= 5e-5 * largest, name


def test_the_loss_of_labels_as_transformers_takes_them(pair, corrupted):
    """Their own shift to the right and mean over targets."""
    ours, theirs = pair
    batch = corrupted([3])
    found = theirs(input_ids=batch.tokens[None], labels=batch.targets[None])
    assert ours(batch).loss.item() / len(batch.targets) == pytest.approx(found.loss.item(), rel=1e-6)


def test_inference_is_the_same_function_by_another_kernel(corrupted):
    model, batch = strong(TINY), corrupted(range(6))
    with torch.no_grad():
        found = model.hidden(batch)
        for backend in ("products", "dense"):
            model.backend = backend
            assert (model.hidden(batch) - found).abs().max() <= 1e-5


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_buckets_are_those_of_transformers(shape, bidirectional):
    from transformers.models.t5.modeling_t5 import T5Attention

    wanted = T5Attention._relative_position_bucket(torch.arange(-3_000, 3_001), bidirectional, shape.num_buckets, shape.max_distance)
    assert torch.equal(buckets(shape, 3_001, bidirectional=bidirectional), wanted)


@pytest.mark.parametrize("recompute", [1, 2])
def test_dropout_is_drawn_anew_and_again_alike_where_layers_are_computed_again(corrupted, recompute):
    model, batch = strong(dataclasses.replace(TINY, dropout=0.2)), corrupted([1, 2], max_residues=60)

    def gradients():
        torch.manual_seed(3)
        model.zero_grad()
        model(batch).loss.backward()
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    plain = model(batch).loss.item()
    model.train()
    kept = gradients()
    assert model(batch).loss.item() != plain
    model.recompute_every = recompute
    assert torch.equal(gradients(), kept)
    model.eval()
    assert model(batch).loss.item() == pytest.approx(plain, rel=1e-6)


@pytest.mark.parametrize("size", ARCHITECTURE.sizes)
@pytest.mark.parametrize("has_decoder", [True, False])
def test_the_arithmetic_of_parameters_is_that_of_the_modules(size, has_decoder):
    shape = ARCHITECTURE.size(size).shape
    shape = shape if has_decoder else dataclasses.replace(shape, num_decoder_layers=0)
    with torch.device("meta"):
        model = build(shape)
    assert sum(parameter.numel() for parameter in model.parameters()) == num_parameters(shape)


def test_an_encoder_alone_embeds_but_does_not_train(corrupted):
    whole, batch = strong(TINY), corrupted([4, 5])
    encoder = build(dataclasses.replace(TINY, num_decoder_layers=0)).eval()
    encoder.load_state_dict({name: tensor for name, tensor in whole.state_dict().items() if not name.startswith("decoder.")})
    with torch.no_grad():
        assert torch.equal(encoder.hidden(batch), whole.hidden(batch))
    with pytest.raises(ConfigError, match="has no decoder"):
        encoder(batch)


def test_starting_weights_are_those_of_the_authors():
    model = build(ARCHITECTURE.size("small").shape)
    model.initialise(3)
    spread = {name: parameter.std().item() for name, parameter in model.named_parameters() if parameter.ndim > 1}
    layer, width = "encoder.layers.0", 256
    wanted = {"words.weight": 1.0, f"{layer}.attention.query.weight": (width * 32) ** -0.5, f"{layer}.attention.key.weight": width**-0.5}
    wanted |= {f"{layer}.attention.output.weight": 256**-0.5, f"{layer}.feed_forward.up.weight": width**-0.5}
    wanted |= {f"{layer}.feed_forward.down.weight": 1024**-0.5, "decoder.position_biases.weight": width**-0.5}
    for name, deviation in wanted.items():
        assert spread[name] == pytest.approx(deviation, rel=0.15), name
    assert all((parameter == 1).all() for parameter in model.parameters() if parameter.ndim == 1)


@pytest.mark.parametrize("size", ["tiny", "small"])
def test_flops_are_those_that_torch_counts(size, corrupted):
    """With the plain products, whose backward pass torch counts without a fused kernel's own conventions."""
    model = strong(ARCHITECTURE.size(size).shape)
    model.backend = "dense"
    batch = corrupted([7], max_residues=200)
    with FlopCounterMode(display=False) as counter:
        model(batch).loss.backward()
    assert counter.get_total_flops() == pytest.approx(flops(model.shape, batch.cu_seqlens.diff().tolist()), rel=1e-3)


@pytest.mark.parametrize("size", ["tiny", "small"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activation_bytes_are_those_of_the_saved_tensors_to_two_percent(size, precision, corrupted):
    model, batch = strong(ARCHITECTURE.size(size).shape), corrupted(range(4))
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    shapes = {tuple(sorted(parameter.shape)) for parameter in model.parameters()}
    saved: dict[int, torch.Tensor] = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        cast_weight = tensor.dtype == torch.bfloat16 and tuple(sorted(tensor.shape)) in shapes
        if storage.data_ptr() not in weights and not cast_weight:
            saved.setdefault(storage.data_ptr(), tensor)
        return tensor

    narrow = torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), narrow:
        result = model(batch)
    measured = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    assert result.loss.requires_grad
    assert activation_bytes(model.shape, batch.cu_seqlens.diff().tolist(), precision) == pytest.approx(measured, rel=0.02)


@pytest.fixture(scope="module")
def published(repository, tmp_path_factory):
    """The published folder's tokenizer."""
    recorded, folder = repository / "tests" / "recorded" / "huggingface_prot_t5", tmp_path_factory.mktemp("published")
    for name in ("config.json", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).write_bytes((recorded / name).read_bytes())
    (folder / "spiece.model").write_bytes(lzma.decompress((recorded / "spiece.model.xz").read_bytes()))
    return folder


def test_our_tokens_are_those_of_the_published_tokenizer(published, tmp_path, query_proteins):
    for name, content in LAYOUT.tokenizer_files(VOCABULARY).items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    theirs, ours = transformers.T5Tokenizer.from_pretrained(published), transformers.AutoTokenizer.from_pretrained(tmp_path)
    table = np.frombuffer(VOCABULARY.residue_table(), np.uint8)
    assert len(query_proteins) == 500 and len(ours) == len(theirs) == 128
    for protein in [*query_proteins, "MKTUZOBXJ"]:
        wanted = theirs(" ".join(protein)).input_ids
        assert ours(" ".join(protein)).input_ids == wanted
        assert [*table[np.frombuffer(protein.encode(), np.uint8)].tolist(), VOCABULARY.index("</s>")] == wanted
    assert [ours.convert_ids_to_tokens(i).removeprefix("\u2581") for i in range(128)] == list(VOCABULARY.tokens)
    assert [theirs.convert_ids_to_tokens(i).removeprefix("\u2581") for i in range(128)] == list(VOCABULARY.tokens)
    assert not LAYOUT.tokenizer_problems(published, VOCABULARY) and not LAYOUT.tokenizer_problems(tmp_path, VOCABULARY)
