"""Gradients in buckets: each is handed over to be summed as soon as the backward pass has filled it and those before it.

Not DistributedDataParallel. It loads torch's compiler when it is made, with half of the processor time and a thousand of
the files of a rank's start, which thousands of ranks would ask one file system for; it divides by the world size, which rounds; and
it lays its buckets out anew after its first backward pass, so that a resumed run would differ in the last bit in its first step.
Here the buckets are laid out once, by the list of parameters.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor


class Bucket:
    """Gradients that lie side by side in one buffer and are summed together."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = parameters
        self.buffer = torch.zeros(sum(p.numel() for p in parameters), dtype=parameters[0].dtype, device=parameters[0].device)
        pieces = torch.split(self.buffer, [p.numel() for p in parameters])
        self.views = [piece.view_as(p) for piece, p in zip(pieces, parameters, strict=True)]
        self.num_ready = 0
        self.adopt()

    @property
    def is_full(self) -> bool:
        """Whether all of its gradients are complete."""
        return self.num_ready == len(self.parameters)

    def adopt(self) -> None:
        """Make every `.grad` a view of the buffer; a gradient that lies elsewhere is copied in."""
        for parameter, view in zip(self.parameters, self.views, strict=True):
            if parameter.grad is None:
                view.zero_()
            elif parameter.grad.data_ptr() != view.data_ptr():
                view.copy_(parameter.grad)
            parameter.grad = view


class Buckets:
    """All buckets of a model, in the order in which they are handed over: the same on all ranks."""

    def __init__(self, layout: Sequence[Sequence[Tensor]], start: Callable[[int, Bucket], None]) -> None:
        self.buckets = [Bucket(parameters) for parameters in layout]
        self._start = start
        self._num_started = 0
        self._accumulates_only = False
        for bucket in self.buckets:
            for parameter in bucket.parameters:
                parameter.register_post_accumulate_grad_hook(partial(self._on_gradient, bucket))  # type: ignore[no-untyped-call]

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backward passes in here only add to the gradients."""
        before, self._accumulates_only = self._accumulates_only, True
        try:
            yield
        finally:
            self._accumulates_only = before

    def start_rest(self) -> None:
        """Hand over what no gradient completed, and be ready for the next step."""
        while self._num_started < len(self.buckets):
            self._start_next()
        self._num_started = 0
        for bucket in self.buckets:
            bucket.num_ready = 0

    def zero(self) -> None:
        """One sweep over the buffers."""
        for bucket in self.buckets:
            bucket.buffer.zero_()
            bucket.adopt()

    def _on_gradient(self, bucket: Bucket, parameter: Tensor) -> None:
        if self._accumulates_only:
            return
        bucket.num_ready += 1
        while self._num_started < len(self.buckets) and self.buckets[self._num_started].is_full:
            self._start_next()

    def _start_next(self) -> None:
        index = self._num_started
        self.buckets[index].adopt()
        self._num_started += 1
        self._start(index, self.buckets[index])


def lay_out(parameters: Sequence[Tensor], bucket_bytes: int) -> list[list[Tensor]]:
    """Parameters from the last to the first, about the order in which a backward pass completes their gradients.

    A bucket takes parameters of one type until it holds `bucket_bytes` or more. With three or more ranks the place of a
    number in its bucket decides in which order its parts are added: another layout gives other last bits.
    """
    layout: list[list[Tensor]] = []
    filling: dict[torch.dtype, list[Tensor]] = {}
    held = Counter[torch.dtype]()
    for parameter in reversed(parameters):
        filling.setdefault(parameter.dtype, []).append(parameter)
        held[parameter.dtype] += parameter.nbytes
        if held[parameter.dtype] >= bucket_bytes:
            layout.append(filling.pop(parameter.dtype))
            held[parameter.dtype] = 0
    return [*layout, *filling.values()]
