"""Which storage a tensor is a view of, and what is known of that storage already: tensors that share one are handled together."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from .divided import local
from .hooks import Version


@dataclass(frozen=True)
class View:
    """How a tensor lies in its storage, in elements."""

    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, tensor: Tensor) -> View:
        """That of a tensor."""
        return cls(tensor.dtype, tuple(tensor.size()), tuple(tensor.stride()), int(tensor.storage_offset()))

    def on(self, storage: torch.UntypedStorage) -> Tensor:
        """The same view of another storage."""
        return torch.empty(0, dtype=self.dtype, device=storage.device).set_(storage, self.offset, self.size, self.stride)


def whole(tensor: Tensor) -> Tensor:
    """All elements of a tensor's storage in one row, sharing it."""
    storage = tensor.untyped_storage()
    return View(tensor.dtype, (storage.nbytes() // tensor.element_size(),), (1,), 0).on(storage)


class Origin:
    """A storage at one version of its contents. Keeps neither alive, but no other storage gets the address meanwhile."""

    def __init__(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self.address = storage._cdata
        self.version = Version.of(tensor)
        self._reference = StorageWeakRef(storage)  # type: ignore[no-untyped-call] # of torch

    def is_same(self, tensor: Tensor) -> bool:
        """Whether a tensor is a view of this storage with nothing written since."""
        return tensor.untyped_storage()._cdata == self.address and tensor._version == self.version.number == self.version.probe._version


class HasOrigin:
    """What is known of a storage; a subclass says what that is."""

    def __init__(self, origin: Origin) -> None:
        self.origin = origin


Known = TypeVar("Known", bound=HasOrigin)


class Catalogue(Generic[Known]):
    """What is known of storages, found by their tensors, as long as somebody else holds it. Safe on any thread."""

    def __init__(self) -> None:
        self._known: weakref.WeakValueDictionary[int, Known] = weakref.WeakValueDictionary()

    def find(self, tensor: Tensor) -> Known | None:
        """What is known of the tensor's storage as it is now."""
        known = self._known.get(tensor.untyped_storage()._cdata)
        return known if known is not None and known.origin.is_same(tensor) else None

    def add(self, known: Known) -> None:
        """From now on this is what is known of its storage."""
        self._known[known.origin.address] = known

    def __len__(self) -> int:
        return len(self._known)


class Parameters:
    """The storages of parameters, which no policy touches: a module's where one is given, and whatever looks like one.

    A model that is cut over ranks brings its weights together again and again, in storages that are emptied meanwhile: nothing of them may be moved
    later than it is saved, and whoever brings them together says so with `add`.
    """

    def __init__(self, parameters: Iterable[Tensor] = ()) -> None:
        self._given: dict[int, weakref.ref[Tensor]] = {}
        self._lock = threading.Lock()
        for parameter in parameters:
            self.add(parameter)

    @classmethod
    def of(cls, parameters: Iterable[Tensor] | Parameters) -> Parameters:
        """The same object where it is one already, to which tensors may be added later."""
        return parameters if isinstance(parameters, Parameters) else cls(parameters)

    def add(self, parameter: Tensor) -> None:
        """One more; of a DTensor, this rank's part."""
        part = local(parameter)
        if type(part) not in (Tensor, nn.Parameter):
            return
        address = part.untyped_storage()._cdata
        with self._lock:
            known = self._given.get(address)
            if known is None or known() is not part:
                self._given[address] = weakref.ref(part)

    def has(self, tensor: Tensor) -> bool:
        """Whether a tensor is a parameter, another leaf with a gradient, or a view of one."""
        base = tensor if tensor._base is None else tensor._base
        if isinstance(base, nn.Parameter) or (base.is_leaf and base.requires_grad):
            return True
        address = local(tensor).untyped_storage()._cdata
        with self._lock:
            given = self._given.get(address)
            if given is None:
                return False
            parameter = given()
            if parameter is None or parameter.untyped_storage()._cdata != address:  # `parameter.data = ...` gave it another
                del self._given[address]
                return False
            return True
