"""What an exported operation says of itself: its dtype's name, its results, how they lie in memory, whether it is random."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from pipecompile.capture.sizes import contiguous
from pipecompile.ir import Path, Ref


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def memory_order(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...]:
    """The dimensions from the outermost to the innermost in memory; empty if that is their own order, or has gaps."""
    if contiguous(shape, strides):
        return ()
    order = sorted(range(len(shape)), key=lambda dimension: -strides[dimension])
    gapless = contiguous(tuple(shape[d] for d in order), tuple(strides[d] for d in order))
    return tuple(order) if gapless else ()


def rebuild_outputs(val: Any, refs: list[Ref]) -> Any:
    """What stands for an operation's result: one Ref, or a list of them as long as the result."""
    if isinstance(val, torch.Tensor):
        return refs[0]
    if isinstance(val, tuple | list):
        found = iter(refs)
        return [next(found) if isinstance(part, torch.Tensor) else part for part in val]
    return val


def is_random(node: fx.Node) -> bool:
    """Whether the operation draws random numbers (a dropout with probability 0 does not)."""
    if not isinstance(node.target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded not in node.target.tags:
        return False
    names = [argument.name for argument in node.target._schema.arguments]
    given: dict[str, Any] = dict(zip(names, node.args)) | node.kwargs
    for name in ("dropout_p", "dropout"):
        if name in names:
            return bool(given.get(name, 0.0))
    return True


def input_path(key_path: Any) -> Path:
    """Our steps for a pytree key path below the batch."""
    steps: list[tuple[str, Any]] = []
    for key in key_path:
        if hasattr(key, "key"):
            steps.append(("item", key.key))
        elif hasattr(key, "idx"):
            steps.append(("item", key.idx))
        else:
            steps.append(("attr", key.name))
    return tuple(steps)
