"""ProtAlbert is the function of transformers' ALBERT: same weights, same real proteins, same numbers."""

from __future__ import annotations

import dataclasses

import pytest

from prottrans_hpc import architecture
from prottrans_hpc.models.huggingface_albert import LAYOUT
from prottrans_hpc.models.prot_albert import build
from prottrans_hpc.recipe_objectives import Masked

transformers = pytest.importorskip("transformers", reason="the reference implementation: pip install 'prottrans-hpc[interop]'")

RECORD = architecture.get("prot_albert")
SHAPES = {"tiny": {}, "deep": {"num_layers": 12, "hidden_size": 96, "num_heads": 3}, "wide heads": {"hidden_size": 128, "num_heads": 2}}


@pytest.fixture(params=SHAPES)
def pair(request, strengthen):
    """One of ours, and theirs with the same weights; the layout's own configuration and names connect them."""
    ours = strengthen(build(dataclasses.replace(RECORD.size("tiny").shape, **SHAPES[request.param]))).eval()
    config = transformers.AlbertConfig(**LAYOUT.write_config(ours.shape))
    masked, body = transformers.AlbertForMaskedLM(config).eval(), transformers.AlbertModel(config).eval()
    tensors = {theirs: ours.state_dict()[own] for own, theirs in LAYOUT.names(ours.shape).items()}
    absent = masked.load_state_dict(tensors, strict=False)
    assert set(absent.missing_keys) <= {*LAYOUT.aliases, *LAYOUT.ignored}
    assert set(absent.unexpected_keys) == {"albert.pooler.weight", "albert.pooler.bias"}
    masked.tie_weights()
    assert not body.load_state_dict({name.removeprefix("albert."): value for name, value in tensors.items()}, strict=False).missing_keys
    return ours, masked, body


def test_all_hidden_states_logits_and_losses_agree_on_mixed_lengths(pair, corrupted, padded, states_of):
    ours, masked, body = pair
    batch = corrupted(RECORD, Masked(), list(range(12)), max_residues=300)
    assert batch.max_length > 2 * int(batch.cu_seqlens.diff().min()), "the batch must mix lengths"
    tokens, real, labels = padded(batch)
    chosen = real.bool()
    states = states_of(ours, [ours.layer], batch)
    wanted = body(input_ids=tokens, attention_mask=real, output_hidden_states=True).hidden_states
    found = masked(input_ids=tokens, attention_mask=real, labels=labels)
    # With shared layers transformers records each application and, first, what the first one reads.
    assert len(wanted) == len(states) == ours.shape.num_layers + 1
    for state, reference in zip(states[1:], wanted[1:], strict=True):
        assert (state - reference[chosen]).abs().max() <= 1e-5
    # Scores of these strong weights reach 8, and rounding goes with them: the reference in fp32 is 2e-4 from itself in fp64.
    largest = max(1.0, found.logits.abs().max().item())
    assert (ours.logits(states[-1]) - found.logits[chosen]).abs().max() <= 1e-5 * largest
    assert ours(batch).loss.item() / len(batch.targets) == pytest.approx(found.loss.item(), rel=1e-6)


def test_gradients_agree(pair, corrupted, padded):
    ours, masked, _ = pair
    batch = corrupted(RECORD, Masked(), list(range(30, 36)), max_residues=200)
    tokens, real, labels = padded(batch)
    ours(batch).loss.backward()
    (masked(input_ids=tokens, attention_mask=real, labels=labels).loss * len(batch.targets)).backward()
    theirs = dict(masked.named_parameters())
    trained = {name: parameter.grad for name, parameter in ours.named_parameters() if parameter.requires_grad}
    largest = max(gradient.abs().max().item() for gradient in trained.values())
    for own, name in LAYOUT.names(ours.shape).items():
        if own in trained:
            assert (trained[own] - theirs[name].grad).abs().max() <= 1e-5 * largest, own
