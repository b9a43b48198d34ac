"""XLNet is the function of transformers' XLNetLMHeadModel: same weights, same real proteins, same numbers."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch.nn import functional

from prottrans_hpc.models.huggingface_xlnet import LAYOUT

transformers = pytest.importorskip("transformers", reason="the reference implementation: pip install 'prottrans-hpc[interop]'")


def twin_of(ours):
    """Theirs with the same weights; the layout's own configuration and names connect them."""
    theirs = transformers.XLNetLMHeadModel(transformers.XLNetConfig(**LAYOUT.write_config(ours.shape))).eval()
    state = ours.state_dict()
    absent = theirs.load_state_dict({name: state[own] for own, name in LAYOUT.names(ours.shape).items()}, strict=False)
    assert set(absent.missing_keys) <= set(LAYOUT.aliases)
    assert not absent.unexpected_keys
    theirs.tie_weights()
    return theirs


CHANGES = {
    "tiny": {},
    "deep": {"num_layers": 5, "hidden_size": 96, "num_heads": 3},
    "clamped": {"clamp_length": 20, "memory_length": 30},
}


@pytest.fixture(params=CHANGES)
def pair(request, make_xlnet):
    ours = make_xlnet("tiny", **CHANGES[request.param])
    return ours, twin_of(ours)


def sequences_of(batch):
    """For each sequence its tokens, its targets, and the mask and the mapping that transformers wants of them."""
    for start, end in zip(batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist(), strict=True):
        tokens, places = batch.tokens[start:end], batch.permutation[start:end]
        targets = batch.target_positions[(batch.target_positions >= start) & (batch.target_positions < end)] - start
        # As the authors' data_utils.py: a target does not see itself, any other token does.
        is_target = torch.zeros(len(tokens), dtype=torch.bool)
        is_target[targets] = True
        own_places = torch.where(is_target, places, places + 1)
        hidden = (own_places[:, None] <= places[None, :]) & (places >= 0)
        mapping = functional.one_hot(targets, len(tokens)).float()
        yield slice(start, end), tokens, targets, hidden.float(), mapping


def reference_loss(theirs, batch, memories=None):
    """The summed loss, all logits, and the memories by lane."""
    logits, targets, new = [], [], []
    for lane, (_, tokens, own, hidden, mapping) in enumerate(sequences_of(batch)):
        mems = None if memories is None else memories[lane]
        found = theirs(tokens[None], perm_mask=hidden[None], target_mapping=mapping[None], mems=mems, use_mems=True)
        logits.append(found.logits[0])
        targets.append(tokens[own])
        new.append(found.mems)
    scores = torch.cat(logits)
    return functional.cross_entropy(scores, torch.cat(targets), reduction="sum"), scores, new


def test_all_hidden_states_and_logits_agree_on_mixed_lengths(pair, xlnet_pack, states_of):
    ours, theirs = pair
    batch = xlnet_pack(list(range(8)))
    states = states_of(ours, ours.layers, batch)
    logits = ours.logits(states[-1])
    assert len(states) == ours.shape.num_layers + 1
    for here, tokens, *_ in sequences_of(batch):
        wanted = theirs(tokens[None], output_hidden_states=True)
        for state, reference in zip(states, wanted.hidden_states, strict=True):
            assert (state[here] - reference[0]).abs().max() <= 1e-5
        assert (logits[here] - wanted.logits[0]).abs().max() <= 1e-5


def test_the_loss_of_an_order_and_its_gradients_agree(pair, xlnet_pack):
    ours, theirs = pair
    batch = xlnet_pack(list(range(10, 16)))
    loss = ours(batch).loss
    loss.backward()
    wanted, *_ = reference_loss(theirs, batch)
    wanted.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    gradients = dict(theirs.named_parameters())
    trained = {name: parameter.grad for name, parameter in ours.named_parameters() if parameter.requires_grad}
    largest = max(gradient.abs().max().item() for gradient in trained.values())
    for own, name in LAYOUT.names(ours.shape).items():
        if own in trained:
            assert (trained[own] - gradients[name].grad).abs().max() <= 1e-5 * largest, own


def test_lanes_with_their_memories_agree_step_after_step(pair, xlnet_lanes):
    ours, theirs = pair
    memory = memories = None
    for step in range(4):
        batch = xlnet_lanes(step, [0, 1, 2], memory=memory)
        with torch.no_grad():
            result = ours(batch)
            wanted, _, memories = reference_loss(theirs, batch, memories)
        assert result.loss.item() == pytest.approx(wanted.item(), rel=1e-6)
        memory = result.memory
        for lane in range(3):
            reference = torch.stack([layer[:, 0] for layer in memories[lane]])
            assert (memory[lane] - reference).abs().max() <= 1e-5


def test_the_scores_of_targets_agree(make_xlnet, xlnet_pack):
    ours = make_xlnet()
    batch = xlnet_pack([4, 5])
    with mock.patch.object(functional, "cross_entropy", side_effect=functional.cross_entropy) as scored:
        result = ours(batch)
    _, wanted, _ = reference_loss(twin_of(ours), batch)
    assert (scored.call_args.args[0] - wanted).abs().max() <= 1e-5
    assert result.num_correct == (wanted.argmax(-1) == batch.targets).sum()
