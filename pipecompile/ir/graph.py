"""The traced model: values, nodes in program order, and the module calls they belong to."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

ITEM_BYTES = {"bool": 1, "uint8": 1, "int8": 1, "int16": 2, "float16": 2, "bfloat16": 2, "int32": 4, "float32": 4}


@dataclass(frozen=True, slots=True)
class Spec:
    """Shape and dtype (a torch dtype's name, ``float32``) of a tensor, and whether a gradient flows back through it."""

    shape: tuple[int, ...]
    dtype: str
    gradient: bool = False

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES.get(self.dtype, 16 if self.dtype == "complex128" else 8)

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True, slots=True)
class Ref:
    """An argument that is a value of the graph."""

    name: str


@dataclass(frozen=True, slots=True)
class Attribute:
    """An argument that is a parameter, buffer or constant of the model, by its fully qualified name (FQN)."""

    fqn: str


Path = tuple[tuple[str, Any], ...]
"""How to reach a leaf in a Python structure: ``("item", key)`` and ``("attr", name)`` steps."""


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor in the graph. ``path`` says where in its producer's result (or in the batch) it sits."""

    name: str
    spec: Spec
    path: Path = ()


@dataclass(frozen=True, slots=True)
class Node:
    """One line of a graph: an operation (``kind`` "op") or the call of one of the model's modules ("call").

    ``target`` is ``aten.add.Tensor`` or the module's FQN. ``args`` and ``kwargs`` are Python structures with Ref and
    Attribute leaves. ``reads`` are the outside values whose contents the node depends on. ``context`` are the regions
    (autocast, no_grad, checkpoint) around it, outermost first, as Python expressions. ``inside`` are a call's own operations.
    """

    name: str
    kind: str
    target: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    outputs: tuple[Value, ...]
    reads: tuple[str, ...]
    parameters: tuple[str, ...] = ()
    buffers: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    written_buffers: tuple[str, ...] = ()
    context: tuple[str, ...] = ()
    module: str = ""
    random: bool = False
    inside: tuple[Node, ...] = ()


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a module while the model was traced: nodes ``first`` to ``last`` (exclusive) of the graph.

    ``key`` is ``fqn@k`` for the k-th call. ``args``/``kwargs`` are what the module was called with, ``results`` the
    tensors in what it returned; ``obstacle`` says why the call cannot be one node, empty if it can.
    """

    key: str
    fqn: str
    parent: int
    first: int
    last: int
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    results: tuple[tuple[Path, str], ...]
    obstacle: str = ""
    keep_whole: str = ""


@dataclass(frozen=True, slots=True)
class AttributeInfo:
    """A parameter or buffer of the model. ``canonical`` is the first FQN of the same tensor (tied weights share one)."""

    fqn: str
    canonical: str
    kind: str
    spec: Spec


@dataclass(frozen=True, slots=True)
class Graph:
    """A traced model: ``inputs`` are the batch's tensors, ``loss`` (and ``weight``, may be empty) name its results.

    ``replicated`` are nodes that every reading stage computes for itself; ``together`` are sets of nodes that no cut
    may separate. Both name nodes and are empty before lifting.
    """

    inputs: tuple[Value, ...]
    nodes: tuple[Node, ...]
    attributes: Mapping[str, AttributeInfo]
    loss: str
    weight: str = ""
    calls: tuple[Call, ...] = ()
    constants: Mapping[str, Any] = field(default_factory=dict)
    replicated: frozenset[str] = frozenset()
    together: tuple[tuple[str, ...], ...] = ()
    order: tuple[tuple[str, str], ...] = ()
    opened: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"input {value.name}: {value.spec}" for value in self.inputs]
        for node in self.nodes:
            results = ", ".join(f"{value.name}: {value.spec}" for value in node.outputs)
            mark = " replicated" if node.name in self.replicated else ""
            lines.append(f"{results} = {node.target}({', '.join(node.reads)}){mark}")
        return "\n".join([*lines, f"loss {self.loss}"])
