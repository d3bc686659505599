"""Python structures of tensors: finding the tensors in arguments and results, and how to reach each again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from pipecompile.ir import Attribute, Path, Ref
from pipecompile.ir.size import Size

PLAIN = (type(None), bool, int, float, complex, str, torch.dtype, torch.device, torch.layout, torch.memory_format)

SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)
"""Numbers that stand for a size while a model is traced."""


class Unrenderable(Exception):
    """An argument that cannot be written down as Python source; the message names its type."""


def leaves(whole: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Every leaf of nested tuples, lists, mappings and dataclasses with the steps that reach it."""
    if isinstance(whole, Mapping):
        for key, part in whole.items():
            yield from leaves(part, (*path, ("item", key)))
    elif isinstance(whole, tuple | list) and not isinstance(whole, torch.Size):
        for index, part in enumerate(whole):
            yield from leaves(part, (*path, ("item", index)))
    elif dataclasses.is_dataclass(whole) and not isinstance(whole, type | Ref | Attribute | Tensor):
        for field in dataclasses.fields(whole):
            yield from leaves(getattr(whole, field.name), (*path, ("attr", field.name)))
    else:
        yield path, whole


def tensors(whole: Any) -> list[tuple[Path, torch.Tensor]]:
    return [(path, leaf) for path, leaf in leaves(whole) if isinstance(leaf, torch.Tensor)]


def reach(whole: Any, path: Path) -> Any:
    """The leaf of ``whole`` at the end of ``path``."""
    for kind, step in path:
        whole = whole[step] if kind == "item" else getattr(whole, step)
    return whole


def rebuild(whole: Any, leaf: Callable[[Any], Any]) -> Any:
    """The same structure of plain tuples, lists and dicts with ``leaf`` applied to what is not a container.

    Raises Unrenderable for a container or an object that cannot be written down as Python source.
    """
    if type(whole) in (tuple, list):
        return type(whole)(rebuild(part, leaf) for part in whole)
    if type(whole) is dict:
        if not all(isinstance(key, str | int) for key in whole):
            raise Unrenderable("a dict whose keys are neither str nor int")
        return {key: rebuild(part, leaf) for key, part in whole.items()}
    if isinstance(whole, torch.Size):
        return tuple(map(leaf, whole))
    if isinstance(whole, slice):
        return slice(*(rebuild(part, leaf) for part in (whole.start, whole.stop, whole.step)))
    if isinstance(whole, (*PLAIN, *SYMBOLIC, torch.Tensor)) or whole is Ellipsis:
        return leaf(whole)
    raise Unrenderable(f"an argument of type {type(whole).__module__}.{type(whole).__qualname__}")


def snapshot(whole: Any) -> Any:
    """The same with lists and dicts of its own, which a module may change (a cache that it is given)."""
    if type(whole) in (tuple, list):
        return type(whole)(map(snapshot, whole))
    if type(whole) is dict:
        return {key: snapshot(part) for key, part in whole.items()}
    return whole


def containers(whole: Any) -> Iterator[tuple[Any, list[Any]]]:
    """Every list and dict with what it holds now."""
    if isinstance(whole, list | dict):
        yield whole, held(whole)
    if isinstance(whole, tuple | list | dict):
        for part in whole.values() if isinstance(whole, dict) else whole:
            yield from containers(part)


def held(container: Any) -> list[Any]:
    """What a list or dict holds, its keys included."""
    return [*container.keys(), *container.values()] if isinstance(container, dict) else list(container)


@dataclasses.dataclass(frozen=True, slots=True)
class Tensor:
    """Stands for a tensor in remembered arguments and results; ``dtype`` and ``device`` by their names, ``gradient``
    whether it requires one.
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str
    device: str
    gradient: bool = False

    @staticmethod
    def of(tensor: torch.Tensor) -> Tensor:
        dtype = str(tensor.dtype).removeprefix("torch.")
        stride = tensor.stride() if tensor.layout == torch.strided else ()
        return Tensor(tuple(tensor.shape), stride, dtype, str(tensor.device), tensor.requires_grad)


def merge(traced: Any, eager: Any) -> Any:
    """The traced arguments, where eager mode passed None or another constant: that.

    Raises Unrenderable where the two differ in structure, or a tensor stands only on the eager side.
    """
    if isinstance(eager, Tensor):
        if isinstance(traced, Ref | Attribute):
            return traced
        raise Unrenderable("an argument that is a tensor in eager mode but not while tracing")
    if isinstance(eager, tuple | list | dict):
        if type(traced) is not type(eager) or len(traced) != len(eager):
            raise Unrenderable("an argument of another structure in eager mode")
        if isinstance(eager, dict):
            return {key: merge(traced[key], part) for key, part in eager.items()}
        return type(eager)(merge(a, b) for a, b in zip(traced, eager))
    return traced if isinstance(traced, Size) else eager
