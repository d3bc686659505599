"""What an operation of torch does to its tensors: which it changes, whether it only looks at them another way, what it gives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

aten = torch.ops.aten
METADATA = {aten.set_, aten.resize_, aten.resize_as_}
"""Operations in place that change what a tensor is, not what it holds."""


class NeedsValues(Exception):
    """The initialiser looks at values that this rank does not have, or is not the same when it is run again."""


def tensors_in(values: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)]


def changed_in_place(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The tensors that an operation changes in place."""
    found: list[Tensor] = []
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            found += tensors_in(value)
    return found


def reads_metadata_only(func: Any) -> bool:
    name = func._schema.name.rpartition("::")[2]
    return bool(name.startswith("new_") or name.endswith("_like"))


def is_view(func: Any) -> bool:
    """Whether an operation changes what a tensor is and no values."""
    aliases = any(value.alias_info is not None and not value.alias_info.is_write for value in func._schema.returns)
    in_place = torch.Tag.inplace_view in func.tags or func.overloadpacket in METADATA
    return bool(aliases or in_place or func.overloadpacket is aten._unsafe_view)


def shapes_of(func: Any, args: Any, kwargs: Any) -> Any:
    """Results of the right shapes without values. NeedsValues for an operation whose result is no tensor."""
    device = next((t.device for t in tensors_in((args, kwargs))), torch.device("cpu"))
    wanted = torch.device(kwargs.get("device") or device)
    moved = kwargs | ({"device": torch.device("meta")} if kwargs.get("device") else {})
    try:
        shapes = func(*pytree.tree_map(_to_meta, args), **pytree.tree_map(_to_meta, moved))
    except RuntimeError as error:
        raise NeedsValues(f"{func} reads the values of a tensor") from error
    leaves, structure = pytree.tree_flatten(shapes)
    if not all(isinstance(leaf, Tensor) for leaf in leaves):
        raise NeedsValues(f"{func} reads the values of a tensor")
    empty = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=wanted) for t in leaves]
    return pytree.tree_unflatten(empty, structure)


def _to_meta(leaf: Any) -> Any:
    return leaf.to("meta") if isinstance(leaf, Tensor) else leaf
