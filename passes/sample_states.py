"""How a value depends on the samples of a batch, and an operation's arguments in these terms."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from pipecompile.ir import Node


@dataclass(frozen=True, slots=True)
class State:
    """How a value depends on samples. Dimension ``dim`` holds them, each ``inner`` elements apart in it.

    ``learned``: a parameter has a part in it.
    """

    kind: str
    dim: int = -1
    inner: int = 1
    learned: bool = False


FREE = State("free")
COUPLED = State("coupled")


def samples(dim: int, inner: int = 1, learned: bool = True) -> State:
    return State("samples", dim, inner, learned)


@dataclass(frozen=True, slots=True)
class Operand:
    """A tensor among an operation's arguments."""

    state: State
    shape: tuple[int, ...]
    dtype: str

    @property
    def discrete(self) -> bool:
        return self.dtype == "bool" or "int" in self.dtype


Given = Mapping[str, Any]
"""An operation's arguments by name, tensors as Operands."""
Rule = Callable[[str, Given, tuple[int, ...], int], State]
"""The state of a result by the operation's name, its arguments, the result's shape and the number of samples."""


def arguments(node: Node, operand: Callable[[Any], Any]) -> dict[str, Any]:
    """The operation's arguments by name, tensors as Operands."""

    def convert(whole: Any) -> Any:
        if isinstance(whole, tuple | list):
            return [convert(part) for part in whole]
        return operand(whole)

    schema = schema_of(node.target)
    names = [argument.name for argument in schema.arguments] if schema else []
    names += [f"argument {i}" for i in range(len(names), len(node.args))]
    return {name: convert(part) for name, part in (*zip(names, node.args), *node.kwargs.items())}


def schema_of(target: str) -> Any:
    """The torch schema of ``aten.add.Tensor``, None for what is no operation of torch."""
    found: Any = torch.ops
    for part in target.split("."):
        found = getattr(found, part, None)
    return getattr(found, "_schema", None)


def operands(given: Any) -> Iterator[Operand]:
    if isinstance(given, Operand):
        yield given
    elif isinstance(given, Mapping):
        for part in given.values():
            yield from operands(part)
    elif isinstance(given, list):
        for part in given:
            yield from operands(part)


def merged(one: State, other: State) -> State:
    """The state of something that depends on both."""
    if COUPLED in (one, other) or {one.kind, other.kind} == {"samples", "total"}:
        return COUPLED
    if one.kind == other.kind == "samples":
        return one if one.dim == other.dim else COUPLED
    return one if other.kind == "free" else other


def first(given: Given) -> Operand:
    """The first tensor that holds samples."""
    return next(one for one in operands(given) if one.state.kind == "samples")


def same_place(name: str, given: Given, shape: tuple[int, ...], count: int) -> State:
    one = first(given)
    dim = one.state.dim
    if dim < len(shape) and shape[dim] == one.shape[dim]:
        return one.state
    if not shape:
        return State("total")
    place = next((d for d, size in enumerate(shape) if size % count == 0), None)
    return State("total") if place is None else samples(place, max(shape[place] // count, 1))
