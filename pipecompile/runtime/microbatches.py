"""Splits a batch into microbatches along dim 0 of its tensors."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from itertools import accumulate
from typing import Any

from torch import Tensor

from pipecompile.errors import BatchError


def split(batch: Any, microbatches: int, uneven: bool = False) -> list[Any]:
    """``microbatches`` structures like ``batch`` (nested dicts, mappings, lists, tuples, dataclasses), in order.

    Tensors with a dim 0 are views of an equal share of its rows; 0-dim tensors and everything else are passed whole.
    BatchError if the tensors disagree on their rows, or the rows do not divide; with ``uneven`` the first microbatches
    have one row more than the others then (``torch.tensor_split``), and those that would have none are left out.
    """
    tensors = [(name, leaf) for name, leaf in _leaves(batch, "batch") if isinstance(leaf, Tensor) and leaf.dim()]
    whole = _rows(tensors, microbatches, uneven)
    count = min(microbatches, whole) if tensors else microbatches
    rows, more = divmod(whole, count)
    sizes = [rows + (index < more) for index in range(count)]
    shares = {id(tensor): _shares(tensor, sizes) for _, tensor in tensors}

    def share(index: int) -> Callable[[Any], Any]:
        return lambda leaf: shares[id(leaf)][index] if id(leaf) in shares else leaf

    return [rebuild(batch, share(index)) for index in range(count)]


def _shares(tensor: Tensor, sizes: list[int]) -> Sequence[Tensor]:
    """Rows of a tensor, in turn; a stage may change its share in place, which autograd forbids for the views of ``split``."""
    if tensor.requires_grad:
        starts = accumulate(sizes, initial=0)
        return [tensor.narrow(0, start, size) for start, size in zip(starts, sizes)]
    return tensor.unsafe_split_with_sizes(sizes)


def _rows(tensors: list[tuple[str, Tensor]], microbatches: int, uneven: bool) -> int:
    """How many rows the batch has."""
    if not tensors:
        if microbatches > 1:
            raise BatchError(
                f"the batch has no tensor to split into {microbatches} microbatches; "
                "put one with a dim 0 into it, or use 1 microbatch"
            )
        return 0
    first, leading = tensors[0]
    whole = leading.shape[0]
    for name, tensor in tensors:
        if tensor.shape[0] != whole:
            raise BatchError(
                f"{name} has {tensor.shape[0]} rows in dim 0, but {first} has {whole}; "
                "every tensor of a batch must have one row for each sample"
            )
    if not whole or (whole % microbatches and not uneven):
        below = max(whole // microbatches, 1) * microbatches
        raise BatchError(
            f"{first} has {whole} rows in dim 0, which do not divide into {microbatches} microbatches; "
            f"use a batch of {below} rows or another multiple of {microbatches}, or another number of microbatches"
        )
    return whole


def _leaves(node: Any, name: str) -> Iterator[tuple[str, Any]]:
    """The leaves of a structure, each with the expression that reaches it."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from _leaves(value, f"{name}[{key!r}]")
    elif isinstance(node, (list, tuple)):
        for index, value in enumerate(node):
            yield from _leaves(value, f"{name}[{index}]")
    elif dataclasses.is_dataclass(node) and not isinstance(node, type):
        for field in dataclasses.fields(node):
            yield from _leaves(getattr(node, field.name), f"{name}.{field.name}")
    else:
        yield name, node


def rebuild(node: Any, change: Callable[[Any], Any]) -> Any:
    """The same structure with every leaf changed."""
    if isinstance(node, Mapping):
        changed = {key: rebuild(value, change) for key, value in node.items()}
        if type(node) is dict or not isinstance(node, MutableMapping):
            return changed
        like = copy.copy(node)
        like.update(changed)
        return like
    if isinstance(node, tuple) and hasattr(node, "_fields"):
        return type(node)(*(rebuild(value, change) for value in node))
    if isinstance(node, (list, tuple)):
        return type(node)(rebuild(value, change) for value in node)
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        names = [field.name for field in dataclasses.fields(node) if field.init]
        return dataclasses.replace(node, **{name: rebuild(getattr(node, name), change) for name in names})
    return change(node)
