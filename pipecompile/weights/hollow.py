"""Runs an initialiser while only some of its tensors have memory, and draws the same random numbers as if all had.

    rehearsal    every large tensor is hollow: it has a shape but no memory. Storages are numbered in the order in which
                 they appear, and each operation is noted: which numbers it reads, which it writes.
    performance  the numbers that are needed are real. A random operation on a hollow tensor gets memory while it runs,
                 so that the stream of random numbers goes on as it should; any other one is skipped.

Peak memory: what is needed, and the largest tensor once.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from pipecompile.weights.operators import (
    NeedsValues,
    changed_in_place,
    is_view,
    reads_metadata_only,
    shapes_of,
    tensors_in,
)

SMALL_BYTES = 1 << 16
"""Smaller tensors are always real: they cost little, and initialisers look at the values of such."""

RETURNED_BYTES = 1 << 24
"""After so many freed bytes the allocator is asked to return them."""


@dataclass(frozen=True, slots=True)
class Note:
    """One operation: the numbers of the storages that it reads and writes, and whether it draws random numbers."""

    reads: frozenset[int]
    writes: frozenset[int]
    random: bool


@dataclass(slots=True)
class Known:
    """A storage that was seen, ``made`` if by an operation: the others are not ours to take the memory of.

    The reference keeps its address from being given to another storage.
    """

    number: int
    bytes: int
    reference: StorageWeakRef
    made: bool
    hollow: bool = False


class Hollow(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is active, ``is_needed(number)`` says which storages get memory.

    ``draw`` is whether random operations on hollow tensors run. ``sizes`` are the bytes of the storages of the
    rehearsal, from which a performance must not deviate: NeedsValues, as for values that are asked for and missing.
    """

    def __init__(self, is_needed: Callable[[int], bool], draw: bool, sizes: list[int] | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sizes: list[int] = []
        self.notes: list[Note] = []
        self._is_needed = is_needed
        self._draw = draw
        self._expected = sizes
        self._known: dict[int, Known] = {}
        self._freed_bytes = 0

    def number(self, tensor: Tensor) -> int:
        """The number of the tensor's storage, -1 if it was never seen."""
        storage = _storage(tensor)
        known = self._known.get(storage._cdata) if storage is not None else None
        return known.number if known else -1

    def is_hollow(self, tensor: Tensor) -> bool:
        storage = _storage(tensor)
        known = self._known.get(storage._cdata) if storage is not None else None
        return known is not None and known.hollow

    def alive(self) -> set[int]:
        """The numbers of the storages that still exist."""
        return {
            known.number
            for known in self._known.values()
            if not known.reference.expired()  # type: ignore[no-untyped-call]
        }

    def left(self) -> int:
        """Bytes of the hollow storages that still exist."""
        alive = self.alive()
        return sum(known.bytes for known in self._known.values() if known.hollow and known.number in alive)

    def fill(self, tensor: Tensor) -> None:
        """Give a hollow tensor its memory for good; its values are whatever was there."""
        storage = tensor.untyped_storage()
        known = self._known[storage._cdata]
        if storage.nbytes() < known.bytes:
            storage.resize_(known.bytes)
        known.hollow = False

    def target_of(self, tensor: Tensor) -> Tensor | None:
        """Where the values of a random operation on ``tensor`` are drawn: None if it need not run."""
        with _disable_current_modes():
            known = self._meet([tensor])
            self.notes.append(Note(_numbers(known), _numbers(known), random=True))
            if not any(one.hollow for one in known):
                return tensor
            like = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
            return like if self._draw else None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = tensors_in((args, kwargs))
        read = [] if reads_metadata_only(func) else self._meet(given)
        hollow = any(known.hollow for known in read)
        with self._memory(given if hollow and self._is_run(func) else []):
            result = self._run(func, args, kwargs, hollow)
        written = self._meet(changed_in_place(func, args, kwargs))
        made = self._meet(tensors_in(result), made=True)
        for known in (*written, *made):
            known.hollow |= hollow
        self._drop(made)
        random = torch.Tag.nondeterministic_seeded in func.tags
        self.notes.append(Note(_numbers(read), _numbers((*written, *made)), random))
        return result

    def _is_run(self, func: Any) -> bool:
        """Whether an operation on hollow tensors is run all the same: it is random, or changes no values."""
        random = torch.Tag.nondeterministic_seeded in func.tags
        return (random and self._draw) or is_view(func)

    def _run(self, func: Any, args: Any, kwargs: Any, hollow: bool) -> Any:
        if not hollow or self._is_run(func):
            return func(*args, **kwargs)
        written = changed_in_place(func, args, kwargs)
        if written:
            returned = len(func._schema.returns)
            return None if not returned else written[0] if returned == 1 else tuple(written[:returned])
        return shapes_of(func, args, kwargs)

    def _meet(self, tensors: Iterable[Tensor], made: bool = False) -> list[Known]:
        """What is known of the tensors' storages; a new one gets the next number."""
        found = []
        for tensor in tensors:
            storage = _storage(tensor)
            if storage is None:
                continue
            known = self._known.get(storage._cdata)
            if known is None:
                reference = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
                known = Known(len(self.sizes), storage.nbytes(), reference, made)
                self._known[storage._cdata] = known
                self.sizes.append(known.bytes)
                self._compare(known)
            found.append(known)
        return found

    def _compare(self, known: Known) -> None:
        if self._expected is not None and self._expected[known.number : known.number + 1] != [known.bytes]:
            raise NeedsValues("it makes other tensors when it is run a second time")

    def _drop(self, made: list[Known]) -> None:
        """Take the memory of storages that are not needed."""
        for known in made:
            if known.made and known.bytes >= SMALL_BYTES and (known.hollow or not self._is_needed(known.number)):
                known.hollow = True
                self._empty(torch.UntypedStorage._new_with_weak_ptr(known.reference.cdata))

    @contextmanager
    def _memory(self, tensors: list[Tensor]) -> Iterator[None]:
        """Memory for hollow tensors while one operation runs."""
        inflated = []
        for tensor in tensors:
            storage = tensor.untyped_storage()
            known = self._known[storage._cdata]
            if known.hollow and storage.nbytes() < known.bytes:
                storage.resize_(known.bytes)
                inflated.append(storage)
        try:
            yield
        finally:
            for storage in inflated:
                self._empty(storage)

    def _empty(self, storage: torch.UntypedStorage) -> None:
        self._freed_bytes += storage.nbytes()
        storage.resize_(0)
        if self._freed_bytes >= RETURNED_BYTES:
            return_memory()
            self._freed_bytes = 0


def return_memory() -> None:
    """Give freed memory back to the system, which glibc otherwise keeps in pieces between what is in use."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def _storage(tensor: Tensor) -> Any:
    """The tensor's storage; None where it has none of its own that could be taken (meta, sparse)."""
    if tensor.device.type == "meta" or tensor.layout != torch.strided:
        return None
    return tensor.untyped_storage()


def _numbers(known: Iterable[Known]) -> frozenset[int]:
    return frozenset(one.number for one in known)
