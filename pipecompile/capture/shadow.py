"""Eager mode on the meta device: tensors that no parameter has touched keep their contents.

A model on the meta device has shapes but no numbers, yet its code may ask for some: "is the mask all ones?". What such a
question is about (positions, masks, the batch) is made of small tensors that do not depend on any parameter. While
``Shadows`` is active each of them has a real twin on the CPU, and questions are answered by the twin.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

LARGEST = 1 << 22
"""Elements of the largest twin."""


class Shadows(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps the twins; ``batch`` are meta tensors whose contents count as ones."""

    def __init__(self, batch: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._twins = WeakTensorKeyDictionary()
        for leaf in pytree.tree_leaves(batch):
            if isinstance(leaf, torch.Tensor) and leaf.is_meta and leaf.numel() <= LARGEST:
                self._twins[leaf] = torch.ones(leaf.shape, dtype=leaf.dtype)

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        tensors = [leaf for leaf in pytree.tree_leaves((args, given)) if isinstance(leaf, torch.Tensor)]
        known = all(not t.is_meta or t in self._twins for t in tensors)
        if operation is torch.ops.aten._local_scalar_dense.default and known:
            return operation(self._twin(tensors[0]))
        result = operation(*args, **given)
        made = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        if known and any(t.is_meta for t in made) and all(math.prod(t.shape) <= LARGEST for t in made):
            self._remember(operation, args, given, made)
        return result

    def _twin(self, tensor: torch.Tensor) -> torch.Tensor:
        twin: torch.Tensor = self._twins[tensor] if tensor.is_meta else tensor
        return twin

    def _remember(self, operation: Any, args: Any, kwargs: dict[str, Any], made: list[torch.Tensor]) -> None:
        def real(leaf: Any) -> Any:
            if isinstance(leaf, torch.Tensor):
                return self._twin(leaf)
            return torch.device("cpu") if isinstance(leaf, torch.device) else leaf

        twins = operation(*pytree.tree_map(real, args), **pytree.tree_map(real, kwargs))
        for tensor, twin in zip(made, (leaf for leaf in pytree.tree_leaves(twins) if isinstance(leaf, torch.Tensor))):
            if tensor.is_meta:
                self._twins[tensor] = twin
