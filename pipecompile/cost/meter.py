"""Bytes that tensors hold while operations run: each storage once, from when it is made until the last reference goes.

On CPU every operation is seen as it is dispatched, in autograd's backward too; what a kernel takes and gives back inside
of itself is not. On an accelerator the allocator keeps the count.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Meter(Protocol):
    """``live`` are the bytes held now, ``peak`` the most since ``begin``; it counts while it is entered."""

    @property
    def live(self) -> int: ...

    @property
    def peak(self) -> int: ...

    def begin(self) -> None: ...

    def __enter__(self) -> Any: ...

    def __exit__(self, *error: Any) -> Any: ...


class TensorMeter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the storages that operations make; those that were there before count if they are given to ``add``.

    Each takes a multiple of ``block`` bytes; ``workspace`` is what an operation takes besides while it runs.
    """

    def __init__(self, block: int = 1, workspace: Callable[[Any, Sequence[Any]], int] | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._block, self._workspace = block, workspace
        self._known: dict[int, weakref.ref[Any]] = {}

    def begin(self) -> None:
        self.peak = self.live

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Count tensors that exist already."""
        for tensor in tensors:
            self._count(tensor.untyped_storage())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        given = None
        for storage in _storages(result):
            if id(storage) not in self._known:
                if given is None:
                    given = set(map(id, _storages((args, kwargs))))
                if id(storage) not in given:  # else a view of what was there before
                    self._count(storage)
        if self._workspace is not None:
            self.peak = max(self.peak, self.live + self._workspace(func, args))
        return result

    def _count(self, storage: Any) -> None:
        key, size = id(storage), -(-storage.nbytes() // self._block) * self._block
        if size and key not in self._known:
            self._known[key] = weakref.ref(storage, self._forget(key, size))
            self.live += size
            self.peak = max(self.peak, self.live)

    def _forget(self, key: int, size: int) -> Callable[[Any], None]:
        def gone(_: Any) -> None:
            del self._known[key]
            self.live -= size

        return gone


class AllocatorMeter:
    """What the caching allocator of a CUDA device has given out."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    @property
    def live(self) -> int:
        return torch.cuda.memory_allocated(self._device)

    @property
    def peak(self) -> int:
        return torch.cuda.max_memory_allocated(self._device)

    def begin(self) -> None:
        torch.cuda.reset_peak_memory_stats(self._device)

    def __enter__(self) -> AllocatorMeter:
        return self

    def __exit__(self, *error: Any) -> None:
        pass


def meter_of(device: torch.device) -> Meter:
    """What counts the bytes on ``device``."""
    return AllocatorMeter(device) if device.type == "cuda" else TensorMeter()


def _storages(whole: Any) -> Iterator[Any]:
    """The storages of the tensors in a structure; a sparse tensor has those of its rows and of their places."""
    for tensor in tree_leaves(whole):
        if isinstance(tensor, Tensor):
            for part in (tensor._indices(), tensor._values()) if tensor.is_sparse else (tensor,):
                yield part.untyped_storage()
