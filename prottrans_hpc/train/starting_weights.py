"""Starting weights of a model that no rank holds whole: drawn one parameter at a time, of which a rank keeps its piece.

An architecture draws its weights in `initialise(seed)`, one after another from one generator, so a rank has to draw all of
them to know its own; it need not keep them. Here a module without memory (on torch's meta device) is told to `initialise`,
and each operation that would write into one of its parameters is done on memory that is there while that parameter is being
written. Then the parameter is handed on and forgotten. So the very same code draws the very same bits as for a whole
model, and host memory holds one whole parameter, or the two of a copy.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Set
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from ..architecture import Architecture
from ..errors import ConfigError
from ..stage import find
from . import pieces

Take = Callable[[str, Tensor], None]
"""`(name, whole tensor)`; the tensor may be kept in part only."""


def build_without_memory(record: Architecture, shape: Any) -> Any:
    """An architecture's modules on the meta device."""
    with torch.device("meta"):
        return find(record.build)(shape)


@torch.no_grad()
def draw(record: Architecture, shape: Any, seed: int, take: Take) -> None:
    """Have every parameter and buffer of a model drawn, and give each to `take` once, in the order in which they are drawn.

    Raises ConfigError for an architecture whose `initialise` leaves one out, or comes back to one.
    """
    module = build_without_memory(record, shape)
    named: dict[str, Tensor] = dict(_tensors_of(module))
    drawing = _Drawing(record.name, named, take)
    with drawing:
        module.initialise(seed)
    drawing.hand_on()
    missing = sorted(named.keys() - drawing.taken)
    if missing:
        raise ConfigError(
            f"the architecture {record.name} cannot be cut over ranks: its initialise(seed) gives no value to {', '.join(missing[:3])}, "
            f"{len(missing)} of {len(named)} parameters and buffers"
        )


@torch.no_grad()
def put_starting_weights(module: nn.Module, masters: Mapping[str, Tensor], record: Architecture, shape: Any, seed: int) -> bytes:
    """Draw the starting weights into a module and its fp32 masters, of cut ones this rank's pieces.

    Returns the SHA-256 over the names and bits of all that was drawn, which is the same on ranks that drew the same.
    """
    own, digest = dict(_tensors_of(module)), hashlib.sha256()

    def take(name: str, whole: Tensor) -> None:
        digest.update(name.encode())
        digest.update(whole.contiguous().view(-1).view(torch.uint8).numpy().data)
        for target in (own[name], *([masters[name]] if name in masters else [])):
            pieces.local(target).copy_(pieces.cut_out(whole, target))

    draw(record, shape, seed, take)
    return digest.digest()


def _tensors_of(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


class _Drawing(TorchDispatchMode):  # type: ignore[no-untyped-call] # of torch
    """In here what is written to tensors without memory is written to memory of their own, for as long as nothing else is written to."""

    def __init__(self, architecture: str, named: Mapping[str, Tensor], take: Take) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # of torch
        self._architecture, self._named, self._take = architecture, named, take
        self._names = {_storage(tensor): name for name, tensor in named.items()}  # views of a parameter are known by it, and `.data` is
        self._open: dict[str, Tensor] = {}
        self.taken: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        given, structure = tree_flatten((args, kwargs or {}))
        names = [self._names.get(_storage(value)) if isinstance(value, Tensor) else None for value in given]
        if not func._schema.is_mutable or not any(names):
            return func(*args, **(kwargs or {}))  # also what only looks at shapes
        self._begin({name for name in names if name})
        real = [value if name is None else self._memory_of(name, value) for name, value in zip(names, given, strict=True)]
        before = {id(mine): value for mine, value in zip(real, given, strict=True)}
        real_args, real_kwargs = tree_unflatten(real, structure)
        try:
            result = func(*real_args, **real_kwargs)
        except NotImplementedError as error:
            raise ConfigError(
                f"the architecture {self._architecture} cannot be cut over ranks: its initialise(seed) reads one parameter for another"
            ) from error
        return tree_map(lambda value: before.get(id(value), value), result)

    def _begin(self, names: set[str]) -> None:
        self.hand_on(besides=names)
        again = sorted(names & self.taken)
        if again:
            raise ConfigError(
                f"the architecture {self._architecture} cannot be cut over ranks: its initialise(seed) comes back to {again[0]} when it has begun another"
            )
        for name in names - self._open.keys():
            like = self._named[name]
            self._open[name] = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device="cpu")

    def _memory_of(self, name: str, view: Tensor) -> Tensor:
        return self._open[name].as_strided(view.shape, view.stride(), view.storage_offset())

    def hand_on(self, *, besides: Set[str] = frozenset()) -> None:
        """Give away what is finished, which is all that nothing is written to now."""
        for name in sorted(self._open.keys() - besides):
            self.taken.add(name)
            self._take(name, self._open.pop(name))


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
