"""Gradients made smaller before they cross the network: halved (fp16, bf16), or of low rank (PowerSGD). All of them are lossy.

A halved bucket is exchanged, not summed, in the narrow type: every rank gets one part of everybody's bucket, adds the
parts up in fp32, rounds once more and hands its sum to all. A gradient is rounded twice, whatever the number of ranks,
and as many bytes travel as in a ring that would round at every hop. Where nodes have several ranks, the sum within a node is taken
first, in fp32, as by reduction = "hierarchical", and only what crosses between the nodes is halved: each rank would send to
all ranks of the other nodes otherwise, more than a ring does. fp16 is scaled by a power of two, the same on all ranks, so that
the largest gradient of a bucket fits. Nothing is added up by the back end but fp32, so a back end that knows no bf16 can carry it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from .comm_reduction import Group, NodeGroups, Plain, Reduction, Steps, Sum, flat, hierarchical, pad
from .recipe_parallel import Parallel

_LARGEST_EXPONENT = 15
"""fp16 ends at 65,504, a little below 2^16."""
_SMALLEST_EXPONENT = -100
"""Of what is scaled up; below it fp32 itself could not hold the scale."""


def narrow(tensor: Tensor, group: Group, dtype: torch.dtype) -> Steps:
    """Sum in fp32 what travels as `dtype`. Infinite and undefined numbers arrive as such."""
    size = group.size
    if tensor.element_size() <= dtype.itemsize or size == 1:
        yield from flat(tensor, group)
        return
    exponent: Tensor | None = None
    if dtype == torch.float16:
        largest = tensor.abs().amax().reshape(1)
        yield group.all_reduce_max(largest)
        exponent = _LARGEST_EXPONENT - torch.frexp(largest).exponent.clamp(min=_SMALLEST_EXPONENT)
    sent = pad(torch.ldexp(tensor, exponent) if exponent is not None else tensor, size).to(dtype)
    received = torch.empty_like(sent)
    yield group.all_to_all(received, sent)
    part = received.view(size, -1).to(tensor.dtype).sum(dim=0)
    headroom = (size - 1).bit_length()  # the sum of n numbers below 2^15 fits after a division by 2^ceil(log2 n)
    rounded = (part * 2.0**-headroom if exponent is not None else part).to(dtype)
    yield group.all_gather(sent, rounded)
    summed = sent[: tensor.numel()].to(tensor.dtype)
    tensor.copy_(torch.ldexp(summed, headroom - exponent) if exponent is not None else summed)


def total(world: Group, groups: NodeGroups | None, part: Callable[..., Steps] = flat) -> Sum:
    """The sum over all ranks; `part` sums what crosses between the nodes."""
    if groups is None:
        return partial(part, group=world)
    return partial(hierarchical, groups=groups, between=partial(part, group=groups.between))


@dataclass
class _Bucket:
    """What is remembered of one bucket."""

    matrices: list[int]
    """Which of its gradients are compressed; the others are too small to gain by it."""
    second: list[Tensor]
    """For each an orthogonal matrix, columns x rank: where to look for the columns of the next gradient."""
    errors: list[Tensor]
    """What compression has left of this rank's gradients so far, rows x columns."""


@dataclass
class LowRank:
    """PowerSGD with error feedback and warm start (Vogels et al. 2019, arXiv 1905.13727, algorithms 1 and 2), for sums.

    A gradient of n x m numbers travels as (n + m) x rank. It is torch's algorithm, but not its hook: that one divides by the
    world size and chains Python functions to the collectives, which `TorchComm.hold` forbids. What a rank's compression
    leaves is added to its next gradient; it lives in this process only, so a run that takes up a checkpoint, in a new process or
    in this one, begins with none.
    """

    rank: int
    world_size: int
    sum: Sum
    _buckets: dict[int, _Bucket] = field(default_factory=dict)

    def steps(self, index: int, buffer: Tensor, gradients: Sequence[Tensor]) -> Steps:
        """Two sums: of the first factors with what is not compressed, then of the second factors."""
        if index not in self._buckets:
            self._buckets[index] = self._remember(index, gradients)
        bucket = self._buckets[index]
        matrices = [_as_matrix(gradients[place]) for place in bucket.matrices]
        whole = [gradient.reshape(-1) for place, gradient in enumerate(gradients) if place not in bucket.matrices]
        for matrix, error in zip(matrices, bucket.errors, strict=True):
            matrix.add_(error)
        first = torch.cat([*((matrix @ second).reshape(-1) for matrix, second in zip(matrices, bucket.second, strict=True)), *whole])
        yield from self.sum(first)
        pieces = torch.split(first, [*(matrix.shape[0] * self.rank for matrix in matrices), *(piece.numel() for piece in whole)])
        bases = [_orthogonal(piece.view(-1, self.rank)) for piece in pieces[: len(matrices)]]
        for gradient, piece in zip(whole, pieces[len(matrices) :], strict=True):
            gradient.copy_(piece)
        if not matrices:
            return
        second = torch.cat([(matrix.T @ basis).reshape(-1) for matrix, basis in zip(matrices, bases, strict=True)])
        yield from self.sum(second)
        factors = [piece.view(-1, self.rank) for piece in torch.split(second, [matrix.shape[1] * self.rank for matrix in matrices])]
        self._put(bucket, matrices, bases, factors)

    def forget(self) -> None:
        """Drop what was left out, and where the next columns would be looked for: both belong to the weights of these steps."""
        self._buckets.clear()

    def _put(self, bucket: _Bucket, matrices: list[Tensor], bases: list[Tensor], factors: list[Tensor]) -> None:
        """The gradients from their factors, and what the next step has to know."""
        for place, (matrix, basis, factor) in enumerate(zip(matrices, bases, factors, strict=True)):
            approximation = basis @ factor.T
            # A step with infinite or undefined numbers is skipped, on all ranks, and must not be fed back into the next one.
            sound = approximation.isfinite().all()
            error = matrix - approximation / self.world_size
            bucket.errors[place] = torch.where(sound, error, torch.zeros_like(error))
            bucket.second[place] = torch.where(sound, _orthogonal(factor), bucket.second[place])
            matrix.copy_(approximation)

    def _remember(self, index: int, gradients: Sequence[Tensor]) -> _Bucket:
        places = [place for place, gradient in enumerate(gradients) if is_worth_it(gradient, self.rank)]
        shapes = [_as_matrix(gradients[place]).shape for place in places]
        drawn = [torch.randn(columns, self.rank, generator=torch.Generator().manual_seed(index * 10_000 + place)) for place, (_, columns) in enumerate(shapes)]
        like = gradients[0]
        return _Bucket(
            places,
            [_orthogonal(random.to(like)) for random in drawn],
            [torch.zeros(shape, dtype=like.dtype, device=like.device) for shape in shapes],
        )


def is_worth_it(gradient: Tensor, rank: int) -> bool:
    """Whether its factors have less than half of its numbers, which is torch's condition too."""
    if gradient.dim() < 2:
        return False
    rows, columns = gradient.shape[0], gradient.numel() // gradient.shape[0]
    return 2 * (rows + columns) * rank < rows * columns


def _as_matrix(gradient: Tensor) -> Tensor:
    return gradient.view(gradient.shape[0], -1)


def _orthogonal(matrix: Tensor) -> Tensor:
    basis: Tensor = torch.linalg.qr(matrix)[0]
    return basis


COMPRESSIONS: dict[str, Callable[[Parallel, Group, NodeGroups | None], Reduction]] = {
    "none": lambda parallel, world, groups: Plain(total(world, groups)),
    "fp16": lambda parallel, world, groups: Plain(total(world, groups, partial(narrow, dtype=torch.float16))),
    "bf16": lambda parallel, world, groups: Plain(total(world, groups, partial(narrow, dtype=torch.bfloat16))),
    "powersgd": lambda parallel, world, groups: LowRank(parallel.powersgd_rank, world.size, total(world, groups)),
}
"""parallel.compression -> what it makes of a bucket."""
