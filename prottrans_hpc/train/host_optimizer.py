"""The optimizer's state and its update in host memory, for `memory.optimizer_on = "host"`: weights and gradients stay on the GPU.

What lies on the host is the fp32 weights (the masters, where weights are half) and the optimizer's state, 12 bytes a parameter
of LAMB and Adam (Ren et al. 2021, ZeRO-Offload, section 4). Tensors go in groups: while one group is updated by the CPU
kernels, the gradients of the next arrive and the weights of the one before leave, each on a stream of their own from and
to page-locked memory. Where the parameters are on the host already there is nothing to move, and the usual optimizer is built.

Of parameters that are cut over ranks, each rank has its own pieces on its host, and updates them; norms are of whole tensors, summed over the ranks
group by group. All ranks form the same groups.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..memory import page_locked
from ..recipe import Recipe
from . import pieces
from .optim import Optimizer, SumOverRanks, build_optimizer, load_into, unsharded

GROUP_PARAMETERS = 1 << 24
"""Parameters that travel together, at most; a larger tensor goes alone."""
_NUM_BUFFERS = 2
"""Groups that have buffers at the same time: one is updated while the next arrives."""


@dataclass
class Mirror:
    """A parameter on the device and its fp32 weights on the host, cut alike."""

    parameter: Tensor
    weights: Tensor
    is_master: bool
    """Whether the fp32 weights are the truth; else they are read from the parameter when it has changed."""
    seen: tuple[int, int] | None = None
    """`state` of the parameter when both were the same."""

    @property
    def is_current(self) -> bool:
        """Whether the weights on the host need not be read again. Half weights without masters always are: they were rounded."""
        return self.is_master or (self.parameter.dtype == torch.float32 and self.seen == self.state)

    @property
    def state(self) -> tuple[int, int]:
        """Where this rank's part of the parameter lies, which FSDP may change, and torch's count of changes of it."""
        own = pieces.local(self.parameter)
        return own.data_ptr(), own._version


@dataclass
class Group:
    """Parameters that travel together, and the optimizer of their fp32 weights."""

    mirrors: list[Mirror]
    optimizer: Optimizer


class Direction:
    """Copies one way, on a stream of their own; on a CPU each is done when it returns."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call] # of torch

    @contextlib.contextmanager
    def copying(self) -> Iterator[None]:
        """Copies in here begin when the device has done what it was told before."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            yield

    def mark(self) -> Callable[[], None]:
        """A function that waits for the copies that were begun so far."""
        if self._stream is None:
            return lambda: None
        event = torch.cuda.Event()  # type: ignore[no-untyped-call] # of torch
        event.record(self._stream)
        return event.synchronize

    def join(self) -> None:
        """What the device is told from here on waits for the copies."""
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)


class HostOptimizer:
    """Updates parameters on a device by their fp32 weights on the host. Its state dict is that of the optimizer on the device."""

    def __init__(
        self, parameters: Mapping[str, Tensor], masters: Mapping[str, Tensor], build: Callable[[dict[str, Tensor]], Optimizer], *, group_parameters: int
    ) -> None:
        """`masters` are those of half parameters, on the host; `build` makes the optimizer of some fp32 weights by name."""
        device = next(iter(parameters.values())).device
        self._pins = device.type == "cuda"
        self._groups = [self._group(names, parameters, masters, build) for names in _shares(parameters, group_parameters)]
        self._arriving, self._leaving = Direction(device), Direction(device)
        self._buffers = [self._buffer(torch.float32) for _ in range(_NUM_BUFFERS)]
        half = {parameter.dtype for parameter in parameters.values()} - {torch.float32}
        self._coming = {dtype: [self._buffer(dtype) for _ in range(_NUM_BUFFERS)] for dtype in half}
        """Gradients, and weights that have no masters, as the device has them: what is no longer half there would come by a copy that waits."""
        bare = {mirror.parameter.dtype for group in self._groups for mirror in group.mirrors if not mirror.is_master} & half
        self._reading = {dtype: [self._buffer(dtype) for _ in range(_NUM_BUFFERS)] for dtype in bare}
        self._going = {dtype: [self._buffer(dtype) for _ in range(_NUM_BUFFERS)] for dtype in half}

    def _group(self, names: list[str], parameters: Mapping[str, Tensor], masters: Mapping[str, Tensor], build: Callable[..., Optimizer]) -> Group:
        weights = {name: masters[name] if name in masters else self._mirrored(parameters[name]) for name in names}
        return Group([Mirror(parameters[name], weights[name], is_master=name in masters) for name in names], build(weights))

    def _mirrored(self, parameter: Tensor) -> Tensor:
        return nn.Parameter(pieces.elsewhere(self._empty(pieces.local(parameter).shape), parameter))

    def _empty(self, shape: torch.Size | int, dtype: torch.dtype = torch.float32) -> Tensor:
        return page_locked.empty(shape, dtype, pinned=self._pins)

    def _buffer(self, dtype: torch.dtype) -> Tensor:
        return self._empty(max(sum(pieces.largest_numel(mirror.parameter) for mirror in group.mirrors) for group in self._groups), dtype)

    @torch.no_grad()
    def step(self, learning_rate: float, gradient_factor: float = 1.0) -> None:
        """One update; the host waits for the gradients, the device for the weights. Collective where parameters are cut."""
        arrivals = [self._fetch(0)]
        departures: list[Callable[[], None]] = []
        for index, group in enumerate(self._groups):
            if index + 1 < len(self._groups):
                arrivals.append(self._fetch(index + 1))
            arrivals[index]()
            self._widen(index)
            group.optimizer.step(learning_rate, gradient_factor)
            if self._going and index >= _NUM_BUFFERS:
                departures[index - _NUM_BUFFERS]()  # half weights leave from a buffer that this group takes now
            departures.append(self._send(index))
        self._leaving.join()

    def _fetch(self, index: int) -> Callable[[], None]:
        """Begin to copy what a group's update reads; returns how to wait for it."""
        with self._arriving.copying():
            for mirror, place, half in self._places(index, self._coming):
                gradient = None if mirror.parameter.grad is None else pieces.gradient(mirror.parameter)
                mirror.weights.grad = None if gradient is None else pieces.elsewhere(place, mirror.weights)
                if gradient is not None:
                    (place if half is None else half).copy_(gradient, non_blocking=True)
                if not mirror.is_current and mirror.parameter.dtype == torch.float32:
                    pieces.local(mirror.weights).copy_(pieces.local(mirror.parameter), non_blocking=True)
            for mirror, _, half in self._places(index, self._reading):
                if half is not None and not mirror.is_current:
                    half.copy_(pieces.local(mirror.parameter), non_blocking=True)
        return self._arriving.mark()

    def _widen(self, index: int) -> None:
        """What has arrived in half, as the update reads it."""
        for mirror, place, half in self._places(index, self._coming):
            if half is not None and mirror.parameter.grad is not None:
                place.copy_(half)
        for mirror, _, half in self._places(index, self._reading):
            if half is not None and not mirror.is_current:
                pieces.local(mirror.weights).copy_(half)

    def _send(self, index: int) -> Callable[[], None]:
        """Begin to copy a group's new weights to the device; returns how to wait for it."""
        places = list(self._places(index, self._going))
        for mirror, _, half in places:
            if half is not None:
                half.copy_(pieces.local(mirror.weights))
        with self._leaving.copying():
            for mirror, _, half in places:
                pieces.local(mirror.parameter).copy_(pieces.local(mirror.weights) if half is None else half, non_blocking=True)
                mirror.seen = mirror.state
                mirror.weights.grad = None
        return self._leaving.mark()

    def _places(self, index: int, halves: Mapping[torch.dtype, list[Tensor]]) -> Iterator[tuple[Mirror, Tensor, Tensor | None]]:
        """Each mirror of a group, where its fp32 gradient (this rank's part) lies, and for half parameters where half numbers come or go."""
        start, number = 0, index % _NUM_BUFFERS
        for mirror in self._groups[index].mirrors:
            own = pieces.local(mirror.parameter)
            piece = slice(start, start := start + own.numel())
            buffers = halves.get(own.dtype)
            half = None if buffers is None else buffers[number][piece].view(own.shape)
            yield mirror, self._buffers[number][piece].view(own.shape), half

    def state_dict(self) -> dict[str, Tensor]:
        """That of the optimizer; what the groups hold, together."""
        return {name: tensor for group in reversed(self._groups) for name, tensor in group.optimizer.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy a saved state in. Raises CheckpointError."""
        load_into(self.state_dict(), state, optimizer="the optimizer on the host")
        for group in self._groups:
            group.optimizer.load_state_dict({name: state[name] for name in group.optimizer.state_dict()})
            for mirror in group.mirrors:
                mirror.seen = None


def _shares(parameters: Mapping[str, Tensor], most: int) -> list[list[str]]:
    """Names by group, in order; what counts of a parameter that is cut is its largest piece, so that all ranks agree."""
    groups: list[list[str]] = [[]]
    total = 0
    for name, parameter in parameters.items():
        number = pieces.largest_numel(parameter)
        total += number
        if groups[-1] and total > most:
            groups.append([])
            total = number
        groups[-1].append(name)
    return groups


def moves(recipe: Recipe, device: torch.device) -> bool:
    """Whether the state goes to the host: on a CPU it is there already."""
    return recipe.memory.optimizer_on == "host" and device.type != "cpu"


def on_host(masters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """fp32 masters in page-locked host memory; a tied weight, which has several names, stays one tensor."""
    moved = {id(master): nn.Parameter(pieces.elsewhere(_locked(pieces.local(master)), master)) for master in masters.values()}
    return {name: moved[id(master)] for name, master in masters.items()}


@torch.no_grad()
def _locked(part: Tensor) -> Tensor:
    return page_locked.empty(part.shape, part.dtype, pinned=part.is_cuda).copy_(part)


def build_host_optimizer(module: nn.Module, masters: Mapping[str, Tensor], recipe: Recipe, sum_over_ranks: SumOverRanks = unsharded) -> Optimizer:
    """The recipe's optimizer, on the host, for all parameters that require gradients; allocates its state there."""
    trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}

    def build(weights: dict[str, Tensor]) -> Optimizer:
        return build_optimizer(weights.items(), recipe.optimizer, sum_over_ranks)

    return HostOptimizer(trained, masters, build, group_parameters=GROUP_PARAMETERS)
