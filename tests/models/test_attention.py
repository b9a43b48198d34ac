"""Every attention back end is the same function of packed rows, and so are its gradients."""

from __future__ import annotations

import pytest
import torch

from prottrans_hpc.models import attention

CPU_BACKENDS = ["per_sequence", "bucketed", "products"]
LENGTHS = {
    "mixed": [30, 5, 77, 30, 200, 2, 64],
    "one": [129],
    "equal": [40, 40, 40],
    "shortest": [1, 1, 3],
    "block borders": [128, 256, 127, 1, 129],
}


def packed(lengths, *, heads=2, width=16, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(sum(lengths))
    parts = [torch.randn(sum(lengths), heads, width, generator=generator).to(device, dtype).requires_grad_() for _ in range(3)]
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=device)
    return parts, cu_seqlens


def outcome(backend, parts, cu_seqlens):
    """Result and gradients, for a loss that weighs every number of the result differently."""
    max_length = int(cu_seqlens.diff().max())
    attend = attention.prepare(cu_seqlens, max_length, dtype=parts[0].dtype, backend=backend)
    result = attend(*parts)
    weights = torch.randn(result.shape, generator=torch.Generator().manual_seed(1)).to(result)
    return [result.detach(), *torch.autograd.grad((result * weights).sum(), parts)]


def largest_difference(found, wanted):
    return max((a.float() - b.float()).abs().max().item() for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("width", [16, 32, 64])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_back_ends_agree_with_the_dense_definition(backend, lengths, width):
    parts, cu_seqlens = packed(lengths, width=width)
    assert largest_difference(outcome(backend, parts, cu_seqlens), outcome("dense", parts, cu_seqlens)) <= 1e-5


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_bf16_is_as_exact_as_bf16_can_be(backend):
    parts, cu_seqlens = packed(LENGTHS["mixed"])
    exact = outcome("dense", parts, cu_seqlens)
    narrow = [part.detach().bfloat16().requires_grad_() for part in parts]
    size = max(part.abs().max().item() for part in exact)
    assert largest_difference(outcome(backend, narrow, cu_seqlens), exact) <= 0.02 * size


def test_gradients_of_the_own_function_pass_a_numerical_check():
    parts, cu_seqlens = packed([3, 5, 1], width=4, dtype=torch.float64)
    attend = attention.prepare(cu_seqlens, 5, dtype=torch.float64, backend="products")
    assert torch.autograd.gradcheck(attend, parts)


@pytest.mark.parametrize("backend", [*CPU_BACKENDS, "dense"])
def test_no_sequence_sees_another(backend):
    lengths = [20, 31, 20]
    parts, cu_seqlens = packed(lengths)
    before = outcome(backend, parts, cu_seqlens)
    with torch.no_grad():
        for part in parts:
            part[20:51] = 1e3
    after = outcome(backend, parts, cu_seqlens)
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old[:20], new[:20])
        assert torch.equal(old[51:], new[51:])


@pytest.mark.parametrize("backend", [None, *attention.BACKENDS])
def test_an_empty_batch_gives_no_rows_connected_to_all_inputs(backend):
    parts = [torch.zeros(0, 2, 16, requires_grad=True) for _ in range(3)]
    attend = attention.prepare(torch.zeros(1, dtype=torch.int32), 0, dtype=torch.float32, backend=backend)
    result = attend(*parts)
    assert result.shape == (0, 2, 16)
    assert all(gradient is not None for gradient in torch.autograd.grad(result.sum(), parts))


@pytest.mark.parametrize(
    ("device", "dtype", "chosen"),
    [
        ("cpu", torch.float32, "per_sequence"),
        ("cpu", torch.bfloat16, "products"),
        ("cpu", torch.float16, "per_sequence"),
        ("cuda", torch.float32, "flex"),
        ("cuda", torch.bfloat16, "varlen"),
    ],
)
def test_the_back_end_follows_device_and_type(device, dtype, chosen):
    assert attention.has_varlen()
    assert attention.choose(device, dtype) == chosen


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_the_block_mask_from_the_borders_is_that_of_torch(lengths):
    flex = pytest.importorskip("torch.nn.attention.flex_attention")
    _, cu_seqlens = packed(lengths)
    num_tokens = sum(lengths)
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    wanted = flex.create_block_mask(lambda b, h, i, j: sequence[i] == sequence[j], None, None, num_tokens, num_tokens, device="cpu")
    mask = attention.flex_block_mask(cu_seqlens, num_tokens)
    assert torch.equal(mask.to_dense() > 0, wanted.to_dense() > 0)
    assert mask.shape == wanted.shape


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_flex_attention_with_that_mask_is_the_dense_definition(lengths):
    flex = pytest.importorskip("torch.nn.attention.flex_attention")
    parts, cu_seqlens = packed(lengths)
    mask = attention.flex_block_mask(cu_seqlens, sum(lengths))
    parts = [part.detach() for part in parts]  # the CPU has no backward pass for it
    result = flex.flex_attention(*(part.transpose(0, 1)[None] for part in parts), block_mask=mask)[0].transpose(0, 1)
    wanted = attention.prepare(cu_seqlens, max(lengths), dtype=torch.float32, backend="dense")(*parts)
    assert (result - wanted).abs().max() <= 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize("backend", ["flex", *CPU_BACKENDS])
def test_back_ends_agree_on_a_gpu_in_fp32(backend, lengths):
    parts, cu_seqlens = packed(lengths, width=64, device="cuda")
    assert largest_difference(outcome(backend, parts, cu_seqlens), outcome("dense", parts, cu_seqlens)) <= 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize("backend", ["varlen", "flex"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_back_ends_agree_on_a_gpu_in_half_precision(backend, lengths, dtype):
    parts, cu_seqlens = packed(lengths, width=64, device="cuda")
    exact = outcome("dense", parts, cu_seqlens)
    narrow = [part.detach().to(dtype).requires_grad_() for part in parts]
    size = max(part.abs().max().item() for part in exact)
    assert largest_difference(outcome(backend, narrow, cu_seqlens), exact) <= 0.02 * size


def test_dropout_leaves_the_mean_as_it_is_and_never_crosses_a_border():
    parts, cu_seqlens = packed([20, 31, 20])
    plain = attention.prepare(cu_seqlens, 31, dtype=torch.float32)(*parts)
    dropping = attention.prepare(cu_seqlens, 31, dtype=torch.float32, dropout=0.2)
    torch.manual_seed(1)
    drawn = torch.stack([dropping(*parts) for _ in range(400)])
    assert not torch.equal(drawn[0], drawn[1])
    error = drawn.std(dim=0) / 400**0.5
    assert ((drawn.mean(dim=0) - plain).abs() <= 6 * error).all()
    others = [torch.cat([part[:20].detach(), torch.full_like(part[20:], 1e3)]) for part in parts]
    torch.manual_seed(1)
    assert torch.equal(dropping(*others)[:20], drawn[0][:20])
