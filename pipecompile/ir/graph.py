"""The traced model: values, nodes in program order, and the module calls they belong to."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipecompile.ir.size import Condition

ITEM_BYTES = {"bool": 1, "uint8": 1, "int8": 1, "int16": 2, "float16": 2, "bfloat16": 2, "int32": 4, "float32": 4}


class AtMost(int):
    """A size that depends on what is in a tensor (``x[mask]``), by its largest value."""


@dataclass(frozen=True, slots=True)
class Spec:
    """Shape and dtype (a torch dtype's name, ``float32``) of a tensor, and whether a gradient flows back through it.

    ``order`` lists the dimensions as they lie in memory, the outermost first; empty where that is their own order.
    """

    shape: tuple[int, ...]
    dtype: str
    gradient: bool = False
    order: tuple[int, ...] = ()

    @property
    def known(self) -> bool:
        """Whether every size is known before the values are."""
        return not any(isinstance(size, AtMost) for size in self.shape)

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
    """A tensor in the graph. ``path`` says where in its producer's result (or in the batch) it sits.

    ``storage`` is the value (or ``attribute:FQN``) whose memory a view shares; the value's own name if nothing else does.
    """

    name: str
    spec: Spec
    path: Path = ()
    storage: str = ""


@dataclass(frozen=True, slots=True)
class Node:
    """One line of a graph: an operation (``kind`` "op") or the call of one of the model's modules ("call").

    ``target`` is ``aten.add.Tensor`` or the module's FQN. ``args`` and ``kwargs`` are Python structures with Ref and
    Attribute leaves. ``reads`` are the outside values that it is given. ``parameters`` and ``buffers`` are the FQNs of
    those whose contents it uses. ``writes`` are the values, and ``written_buffers`` the buffers, that it changes in place.
    ``context`` are the regions (autocast, no_grad) around it, outermost first, as Python expressions. ``module`` is the
    FQN of the module whose forward it belongs to, ``position`` its (first) operation's place in the trace; ``inside`` are
    a call's own operations. ``stream`` is the random stream that it starts to draw from, -1 if it draws none or goes on.
    ``place`` is the user's line, where it makes a value of unknown size.
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
    position: int = 0
    stream: int = -1
    inside: tuple[Node, ...] = ()
    place: str = ""


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a module while the model was traced: nodes ``first`` to ``last`` (exclusive) of the graph.

    ``key`` is ``fqn@k`` for the k-th call; ``parent`` the position of the enclosing call, -1 at the top. ``args`` and
    ``kwargs`` are what the module is called with in eager mode, ``passed`` the tensors that it was traced with, ``results``
    the tensors in what it returned. ``obstacle`` says why it cannot be one node, ``keep_whole`` why it must be one.
    """

    key: str
    fqn: str
    parent: int
    first: int
    last: int
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    passed: tuple[str, ...]
    results: tuple[tuple[Path, str], ...]
    context: tuple[str, ...] = ()
    obstacle: str = ""
    keep_whole: str = ""


@dataclass(frozen=True, slots=True)
class AttributeInfo:
    """A parameter or buffer of the model. ``canonical`` is the first FQN of the same tensor (tied weights share one);
    ``master`` the dtype of the copy that is trained in its place, empty if it is trained itself.
    """

    fqn: str
    canonical: str
    kind: str
    spec: Spec
    master: str = ""


@dataclass(frozen=True, slots=True)
class Graph:
    """A traced model: ``inputs`` are the batch's tensors, ``loss`` (and ``weight``, may be empty) name its results.

    ``replicated`` are nodes that every reading stage computes for itself; ``together`` are sets of nodes that no cut
    may separate. Both name nodes and are empty before lifting. ``dropped`` are values that no node makes any more: the
    inside of a call was traced with them, though eager mode passes None. ``sizes`` are the open sizes of a microbatch
    (``batch``, ``sequence``) with the values that were captured, ``fixed`` the others with what fixes them; ``conditions``
    are what other sizes must meet. Sizes in shapes and arguments that follow from open ones are of the class Size. ``reported`` are
    the values that the loss function returned besides the loss, by the names that it gave them.
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
    dropped: tuple[Value, ...] = ()
    reported: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    sizes: Mapping[str, int] = field(default_factory=dict)
    fixed: Mapping[str, str] = field(default_factory=dict)
    conditions: tuple[Condition, ...] = ()

    def __str__(self) -> str:
        lines = [f"input {value.name}: {value.spec}" for value in self.inputs]
        for node in self.nodes:
            results = ", ".join(f"{value.name}: {value.spec}" for value in node.outputs)
            mark = " replicated" if node.name in self.replicated else ""
            lines.append(f"{results} = {node.target}({', '.join(node.reads)}){mark}")
        return "\n".join([*lines, f"loss {self.loss}"])
