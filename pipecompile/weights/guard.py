"""What initialisers do that no dispatch sees: they read memory, copy it, or draw until the values fit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from pipecompile.weights.hollow import Hollow
from pipecompile.weights.operators import NeedsValues

RAW = {Tensor.numpy, Tensor.tolist, Tensor.data_ptr, Tensor.__array__, Tensor.__reduce_ex__, Tensor.__dlpack__}
"""Ways to a tensor's memory that no dispatch sees."""


@contextmanager
def truncated_normals(hollow: Hollow) -> Iterator[None]:
    """torch's trunc_normal_ draws again until all values fit: it is run as one operation, on real memory."""
    original = torch.nn.init._no_grad_trunc_normal_

    def draw(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        target = hollow.target_of(tensor)
        if target is not None:
            with _disable_current_modes():
                original(target, *args, **kwargs)
        return tensor

    torch.nn.init._no_grad_trunc_normal_ = draw
    try:
        yield
    finally:
        torch.nn.init._no_grad_trunc_normal_ = original


class Guard(TorchFunctionMode):
    """Refuses what would read the memory of a hollow tensor behind the dispatcher's back."""

    def __init__(self, hollow: Hollow) -> None:
        super().__init__()
        self._hollow = hollow

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        first = args[0] if args else None
        if func in RAW and isinstance(first, Tensor) and self._hollow.is_hollow(first):
            raise NeedsValues(f"it reads the values of a tensor {list(first.shape)} with {func.__name__}")
        if func is Tensor.__deepcopy__ and isinstance(first, Tensor) and not isinstance(first, nn.Parameter):
            return _copied(first, args[1])
        return func(*args, **(kwargs or {}))


def _copied(tensor: Tensor, memo: dict[int, Any]) -> Any:
    """A deep copy by an operation, where torch would copy the memory."""
    if id(tensor) not in memo:
        copy = tensor.detach().clone(memory_format=torch.preserve_format)
        memo[id(tensor)] = copy.requires_grad_(tensor.requires_grad)
    return memo[id(tensor)]
