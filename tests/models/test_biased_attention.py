"""Attention with a bias for the distance: every back end is the definition, gradients of the bias included."""

from __future__ import annotations

import pytest
import torch

from prottrans_hpc.models import attention, biased_attention
from prottrans_hpc.models.biased_attention import bias_of, biased_score, choose, prepare_biased, prepare_cross, sum_of_distances

LENGTHS = {"mixed": [30, 5, 77, 30, 140, 2, 64], "one": [129], "shortest": [1, 1, 3], "block borders": [128, 127, 1, 129]}


def packed(lengths, *, heads=2, width=16, dtype=torch.float32):
    generator = torch.Generator().manual_seed(sum(lengths))
    parts = [torch.randn(sum(lengths), heads, width, generator=generator).to(dtype).requires_grad_() for _ in range(3)]
    bias = torch.randn(heads, 2 * max(lengths) - 1, generator=generator, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    return parts, bias.requires_grad_(), torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def outcome(backend, lengths, *, causal, dtype=torch.float32):
    """Result and gradients, for a loss that weighs every number of the result differently."""
    parts, bias, cu_seqlens = packed(lengths, dtype=dtype)
    result = prepare_biased(cu_seqlens, bias, causal=causal, backend=backend)(*parts)
    weights = torch.randn(result.shape, generator=torch.Generator().manual_seed(1)).to(result)
    return [result.detach(), *torch.autograd.grad((result * weights).sum(), [*parts, bias])]


def largest_difference(found, wanted):
    return max((a.float() - b.float()).abs().max().item() for a, b in zip(found, wanted, strict=True))


def test_the_matrix_of_a_sequence_is_a_view_of_the_distances_and_sums_go_back():
    bias = torch.arange(-6, 7.0)[None].repeat(2, 1)
    matrix = bias_of(bias, 4)
    assert matrix.untyped_storage().data_ptr() == bias.untyped_storage().data_ptr()
    assert matrix[1].flip(0).tolist() == [[key - query for key in range(4)] for query in range(4)]
    assert sum_of_distances(torch.ones(3, 4, 4)).tolist() == [[1, 2, 3, 4, 3, 2, 1]] * 3
    assert sum_of_distances(torch.ones(1, 2, 4)).tolist() == [[1, 2, 2, 2, 1]]
    other = torch.randn(2, 4, 4)
    assert torch.allclose((bias_of(bias, 4) * other).sum(), (bias[:, 3:10] * sum_of_distances(other)).sum())


@pytest.fixture(params=[None, 20_000, 300, 1], ids=["one block", "a head a block", "rows of a head", "a row"])
def room(request, monkeypatch):
    """Numbers of a block of scores."""
    if request.param:
        monkeypatch.setattr(biased_attention, "_ROOM", request.param)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_products_agree_with_the_dense_definition(lengths, causal, room):
    assert largest_difference(outcome("products", lengths, causal=causal), outcome("dense", lengths, causal=causal)) <= 2e-5


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_the_fused_kernel_agrees_where_nothing_is_trained(lengths, causal):
    parts, bias, cu_seqlens = packed(lengths)
    with torch.no_grad():
        found, wanted = (prepare_biased(cu_seqlens, bias, causal=causal, backend=name)(*parts) for name in (None, "dense"))
    assert (found - wanted).abs().max() <= 1e-5
    assert choose("cpu", trains=False) == "per_sequence" and choose("cpu", trains=True) == "products" and choose("cuda", trains=True) == "flex"


@pytest.mark.parametrize("causal", [False, True])
def test_gradients_pass_a_numerical_check(causal, room):
    parts, bias, cu_seqlens = packed([3, 5, 1], width=4, dtype=torch.float64)

    def attend(query, key, value, bias):
        return prepare_biased(cu_seqlens, bias, causal=causal, backend="products")(query, key, value)

    assert torch.autograd.gradcheck(attend, (*parts, bias))


def test_dropping_weights_leaves_the_mean_and_passes_a_numerical_check(monkeypatch):
    monkeypatch.setattr(biased_attention, "_ROOM", 10)  # two rows of a head, of the longest one
    parts, bias, cu_seqlens = packed([3, 5, 1], width=4, dtype=torch.float64)

    def attend(query, key, value, bias):
        torch.manual_seed(3)
        return prepare_biased(cu_seqlens, bias, causal=False, dropout=0.3)(query, key, value)

    assert torch.autograd.gradcheck(attend, (*parts, bias))
    plain, dropping = prepare_biased(cu_seqlens, bias, causal=False, backend="products"), prepare_biased(cu_seqlens, bias, causal=False, dropout=0.3)
    drawn = torch.stack([dropping(*parts).detach() for _ in range(400)])
    assert not torch.equal(drawn[0], drawn[1])
    assert ((drawn.mean(dim=0) - plain(*parts)).abs() <= 6 * drawn.std(dim=0) / 400**0.5 + 1e-9).all()


def test_bf16_is_as_exact_as_bf16_can_be():
    lengths = LENGTHS["mixed"]
    exact = outcome("dense", lengths, causal=False)
    narrow = outcome("products", lengths, causal=False, dtype=torch.bfloat16)
    for found, wanted in zip(narrow, exact, strict=True):
        assert (found.float() - wanted).abs().max() <= 0.03 * wanted.abs().max()


@pytest.mark.parametrize("backend", ["products", "dense"])
def test_no_sequence_sees_another_and_no_token_its_future(backend):
    parts, bias, cu_seqlens = packed([20, 31, 20])
    attend = prepare_biased(cu_seqlens, bias, causal=True, backend=backend)
    before = attend(*parts)
    changed = [part.detach().clone() for part in parts]
    for part in changed:
        part[40:51] = 1e3
    after = attend(*changed)
    assert torch.equal(before[:40], after[:40]) and torch.equal(before[51:], after[51:])
    assert not torch.allclose(before[40:51], after[40:51])


def test_cross_attention_is_the_definition_and_stays_within_its_sequence():
    generator = torch.Generator().manual_seed(5)
    lengths, other = [3, 40, 1], [50, 7, 2]
    query = torch.randn(44, 2, 16, generator=generator, requires_grad=True)
    key, value = (torch.randn(59, 2, 16, generator=generator, requires_grad=True) for _ in range(2))
    borders = [torch.tensor([0, *torch.tensor(some).cumsum(0)], dtype=torch.int32) for some in (lengths, other)]
    found = prepare_cross(*borders, (40, 50), dtype=torch.float32)(query, key, value)
    first, second = (torch.repeat_interleave(torch.arange(3), torch.tensor(some)) for some in (lengths, other))
    scores = torch.einsum("qhd,khd->hqk", query, key).masked_fill(first[:, None] != second[None, :], -torch.inf)
    wanted = torch.einsum("hqk,khd->qhd", scores.softmax(-1), value)
    plain = prepare_cross(*borders, (40, 50), dtype=torch.float32, backend="dense")(query, key, value)
    assert (found - wanted).abs().max() <= 1e-5 and (plain - wanted).abs().max() <= 1e-5
    for one, two in zip(torch.autograd.grad(found.sum(), [query, key, value]), torch.autograd.grad(wanted.sum(), [query, key, value]), strict=True):
        assert (one - two).abs().max() <= 1e-5


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize("causal", [False, True])
def test_flex_attention_with_that_score_and_mask_is_the_dense_definition(lengths, causal):
    flex = pytest.importorskip("torch.nn.attention.flex_attention")
    parts, bias, cu_seqlens = packed(lengths)
    parts = [part.detach() for part in parts]  # the CPU has no backward pass for it
    with torch.no_grad():
        mask = attention.flex_block_mask(cu_seqlens, sum(lengths), causal=causal)
        rows = (part.transpose(0, 1)[None] for part in parts)
        result = flex.flex_attention(*rows, score_mod=biased_score(bias), block_mask=mask, scale=1.0)[0].transpose(0, 1)
        wanted = prepare_biased(cu_seqlens, bias, causal=causal, backend="dense")(*parts)
    assert (result - wanted).abs().max() <= 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_flex_agrees_on_a_gpu(lengths, causal):
    parts, bias, cu_seqlens = packed(lengths, width=64)
    wanted = prepare_biased(cu_seqlens, bias, causal=causal, backend="dense")(*parts)
    parts, bias = [part.detach().cuda().requires_grad_() for part in parts], bias.detach().cuda().requires_grad_()
    found = prepare_biased(cu_seqlens.cuda(), bias, causal=causal)(*parts)
    assert (found.cpu() - wanted).abs().max() <= 1e-4
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(found.sum(), [*parts, bias]))


def test_an_empty_batch_gives_no_rows_connected_to_all_inputs():
    parts, bias = [torch.zeros(0, 2, 16, requires_grad=True) for _ in range(3)], torch.zeros(2, 1, requires_grad=True)
    borders = torch.zeros(1, dtype=torch.int32)
    for result, inputs in (
        (prepare_biased(borders, bias, causal=True)(*parts), [*parts, bias]),
        (prepare_cross(borders, borders, (0, 0), dtype=torch.float32)(*parts), parts),
    ):
        assert result.shape == (0, 2, 16)
        assert all(gradient is not None for gradient in torch.autograd.grad(result.sum(), inputs))
