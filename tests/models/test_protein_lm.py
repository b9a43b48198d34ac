"""ProteinLM on packed input: what must not matter does not matter, and its arithmetic is that of its record."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from prottrans_hpc import architecture
from prottrans_hpc.architecture import Batch
from prottrans_hpc.architectures.protein_lm import activation_bytes, flops, num_parameters
from prottrans_hpc.errors import ConfigError
from prottrans_hpc.models.huggingface_megatron_bert import LAYOUT
from prottrans_hpc.models.protein_lm import ProteinLm, build

RECORD = architecture.get("protein_lm")
TABLE = np.frombuffer(RECORD.vocabulary.residue_table(), np.uint8)
CLS, MASK = 2, 1


def pack_proteins(proteins: list[str], *, masked: bool = True) -> Batch:
    """One packed batch; every 7th residue of a protein is masked, hence equal in any company."""
    rows = [torch.tensor([CLS, *TABLE[np.frombuffer(protein.encode(), np.uint8)].tolist()]) for protein in proteins]
    lengths = [len(row) for row in rows]
    positions = torch.cat([torch.arange(length) for length in lengths]) if rows else torch.empty(0, dtype=torch.long)
    clean = torch.cat(rows) if rows else torch.empty(0, dtype=torch.long)
    chosen = (positions % 7 == 3) if masked else torch.zeros(len(clean), dtype=torch.bool)
    return Batch(
        tokens=torch.where(chosen, torch.tensor(MASK), clean),
        positions=positions,
        cu_seqlens=torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32),
        target_positions=chosen.nonzero().flatten(),
        targets=clean[chosen],
        sample_ids=torch.arange(len(rows)),
        max_length=max(lengths, default=0),
        num_residues=sum(lengths) - len(rows),
    )


def make_strong(size: str = "tiny", **changes: object) -> ProteinLm:
    """Weights five times Megatron's, biases, norms and segments not at their start: a difference anywhere shows in the output."""
    model = build(dataclasses.replace(RECORD.size(size).shape, **{"initializer_range": 0.02} | changes))
    model.initialise(7)
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1 and parameter.requires_grad:
                parameter.mul_(5.0)
            else:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


@pytest.fixture
def strong() -> Callable[..., ProteinLm]:
    """`strong(size, **changes of the shape)`."""
    return make_strong


def gradients(model: ProteinLm) -> torch.Tensor:
    found = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    assert all(gradient is not None for gradient in found), "a trained parameter is not connected to the loss"
    return torch.cat([gradient.flatten() for gradient in found])


def loss_and_gradients(model: ProteinLm, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    model.zero_grad()
    result = model(batch)
    result.loss.backward()
    return result.loss.detach(), gradients(model)


@pytest.mark.parametrize("size", RECORD.sizes)
def test_the_arithmetic_of_parameters_is_that_of_the_modules(size):
    shape = RECORD.size(size).shape
    with torch.device("meta"):
        model = build(shape)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert sum(parameter.numel() for parameter in model.parameters()) == num_parameters(shape)


def test_the_starting_weights_are_megatrons():
    model = build(dataclasses.replace(RECORD.size("tiny").shape, num_layers=8, initializer_range=0.02))
    model.initialise(1)
    again = build(model.shape)
    torch.rand(3)
    again.initialise(1)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert model.layers[0].up.weight.std().item() == pytest.approx(0.02, rel=0.03)
    for writes in (model.layers[0].attention_output, model.layers[7].down):
        assert writes.weight.std().item() == pytest.approx(0.02 / 4, rel=0.03), "0.02 / sqrt(2 x 8 layers)"
    assert not model.embeddings.token_types.weight.any()
    assert (model.norm.weight == 1).all() and not model.head.bias.any()


def test_packed_is_the_same_as_one_by_one(strong, proteins):
    model, chosen = strong(), proteins[:8]
    together, whole = loss_and_gradients(model, pack_proteins(chosen))
    hidden = model.hidden(pack_proteins(chosen))
    alone, summed, added = [], 0.0, torch.zeros_like(whole)
    for protein in chosen:
        loss, gradient = loss_and_gradients(model, pack_proteins([protein]))
        summed, added = summed + loss, added + gradient
        alone.append(model.hidden(pack_proteins([protein])))
    assert (hidden - torch.cat(alone)).abs().max() <= 1e-5
    assert abs(together - summed) <= 1e-6 * summed
    assert (whole - added).abs().max() <= 1e-5 * added.abs().max()


def test_what_is_masked_reaches_every_residue(strong, proteins):
    """The invariance above would also hold for a model that ignores its input."""
    model = strong()
    masked, clean = model.hidden(pack_proteins(proteins[:1])), model.hidden(pack_proteins(proteins[:1], masked=False))
    assert ((masked - clean).abs().amax(dim=-1) > 1e-3).all()


@pytest.mark.parametrize("case", ["no sequence", "no target"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_an_empty_batch_gives_zero_loss_connected_to_every_trained_parameter(strong, proteins, case, dropout):
    model = strong(dropout=dropout, attention_dropout=dropout)
    result = model(pack_proteins([]) if case == "no sequence" else pack_proteins(proteins[:2], masked=False))
    result.loss.backward()
    assert result.loss == 0.0
    assert not gradients(model).any()
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen == ["embeddings.token_types.weight"]


def test_dropout_is_drawn_in_training_alone_and_alike_when_a_layer_is_computed_again(strong, proteins):
    model, batch = strong(dropout=0.1, attention_dropout=0.1), pack_proteins(proteins[:4])
    found = []
    for seed, every in ((1, 0), (1, 1), (2, 0)):
        torch.manual_seed(seed)
        model.recompute_every = every
        found.append(loss_and_gradients(model, batch))
    assert found[0][0] == found[1][0] != found[2][0]
    assert torch.equal(found[0][1], found[1][1])
    plain = strong()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model.eval().hidden(batch), plain.train().hidden(batch))


def test_bf16_autocast_trains_with_the_loss_of_fp32(strong, proteins):
    model, batch = strong(), pack_proteins(proteins[:6])
    exact, gradient = loss_and_gradients(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        narrow, narrow_gradient = loss_and_gradients(model, batch)
    assert abs(narrow - exact) <= 0.01 * exact
    assert torch.nn.functional.cosine_similarity(narrow_gradient, gradient, dim=0) > 0.99


def test_a_sequence_longer_than_the_position_table_is_refused(strong, proteins):
    longest = max(proteins[:50], key=len)
    with pytest.raises(ConfigError, match=f"{len(longest) + 1} tokens.* has {len(longest)} positions"):
        strong("tiny", max_positions=len(longest)).hidden(pack_proteins([longest]))


def test_flops_are_those_that_torch_counts(strong, proteins):
    model, batch = strong(), pack_proteins(proteins[:1])
    model.backend = "dense"
    length = len(batch.tokens)
    num_targets = round(0.15 * length)
    batch = dataclasses.replace(batch, target_positions=torch.arange(num_targets), targets=torch.full((num_targets,), 7))
    with FlopCounterMode(display=False) as counter:
        model(batch).loss.backward()
    assert counter.get_total_flops() == pytest.approx(flops(model.shape, [length]), rel=2e-3)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activation_bytes_are_those_of_the_saved_tensors_to_two_percent(precision, strong, proteins):
    model, batch = strong(), pack_proteins(proteins[:10])
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


@pytest.fixture(params=["tiny", "deep"])
def pair(request, strong):
    """One of ours, and transformers' with the same weights; the layout's own configuration and names connect them."""
    transformers = pytest.importorskip("transformers", reason="the reference implementation: pip install 'prottrans-hpc[interop]'")
    changes = {"tiny": {}, "deep": {"num_layers": 5, "hidden_size": 96, "num_heads": 3, "num_token_types": 2}}[request.param]
    ours = strong("tiny", **changes).eval()
    theirs = transformers.MegatronBertForMaskedLM(transformers.MegatronBertConfig(**LAYOUT.write_config(ours.shape))).eval()
    state = ours.state_dict()
    absent = theirs.load_state_dict({name: state[own] for own, name in LAYOUT.names(ours.shape).items()}, strict=False)
    assert set(absent.missing_keys) <= {*LAYOUT.aliases, *LAYOUT.ignored} and not absent.unexpected_keys
    theirs.tie_weights()
    return ours, theirs


def reference(theirs, batch: Batch):
    """transformers' hidden states, logits and summed loss for the same sequences, padded."""
    rows = batch.tokens.split(batch.cu_seqlens.diff().tolist())
    labels = torch.full_like(batch.tokens, -100)
    labels[batch.target_positions] = batch.targets
    tokens, labels, real = (
        torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=value)
        for parts, value in ((rows, 0), (labels.split([len(row) for row in rows]), -100), ([torch.ones_like(row) for row in rows], 0))
    )
    found = theirs(input_ids=tokens, attention_mask=real, labels=labels, output_hidden_states=True)
    chosen = real.bool()
    return [state[chosen] for state in found.hidden_states], found.logits[chosen], found.loss * len(batch.targets)


def test_hidden_states_logits_losses_and_gradients_are_those_of_transformers(pair, proteins, states_of):
    ours, theirs = pair
    batch = pack_proteins(proteins[:12])
    assert batch.max_length > 2 * int(batch.cu_seqlens.diff().min()), "the batch must mix lengths"
    wanted_states, wanted_logits, wanted_loss = reference(theirs, batch)
    states = states_of(ours, ours.layers, batch)
    assert len(states) == len(wanted_states) == ours.shape.num_layers + 1
    for state, wanted in zip(states, wanted_states, strict=True):
        assert (state - wanted).abs().max() <= 1e-5
    assert (ours.logits(states[-1]) - wanted_logits).abs().max() <= 1e-5
    loss = ours(batch).loss
    assert loss.item() == pytest.approx(wanted_loss.item(), rel=1e-6)
    loss.backward()
    wanted_loss.backward()
    theirs_by_name = dict(theirs.named_parameters())
    trained = {name: parameter.grad for name, parameter in ours.named_parameters() if parameter.requires_grad}
    largest = max(gradient.abs().max().item() for gradient in trained.values())
    # Their word table has a padding row without gradient; ours gets one from the softmax over all rows of the tied table.
    for own, name in LAYOUT.names(ours.shape).items():
        if own in trained:
            assert (trained[own] - theirs_by_name[name].grad).abs().max() <= 1e-5 * largest, own
