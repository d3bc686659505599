"""What makes two stages take the same time and memory: the key of what is known of one.

Two stages share a key if they run the same nodes (``cost/key.py``), wired alike, on values of the same shapes, and pass
on as much in the same direction. Names, and which of many equal layers they hold, do not matter.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from pipecompile.cost.key import node_key, specs
from pipecompile.ir import AFTER_HALF, SENDS, Attribute, Graph, Node, Port, Ref, Use
from pipecompile.passes.assemble import StageBody, held

PEERS = (*SENDS, AFTER_HALF)


def stage_keys(graph: Graph, bodies: tuple[StageBody, ...], model: nn.Module, around: str) -> tuple[str, ...]:
    """The key of each stage; ``around`` is what it depends on besides."""
    known = specs(graph)
    nodes = {
        node.name: node_key(node, graph, model, known, around)
        for body in bodies
        for node in (*body.replicated, *body.nodes)
    }
    return tuple(_key(graph, body, nodes, around) for body in bodies)


def relative(use: Use, stage: int) -> Use:
    """The use with its peer counted from its own stage."""
    return _moved(use, -stage)


def absolute(use: Use, stage: int) -> Use:
    """The inverse of ``relative``."""
    return _moved(use, stage)


def _moved(use: Use, by: int) -> Use:
    if use.op not in PEERS:
        return use
    return Use(use.op, use.after, use.peak, use.ms, use.first, use.peer + by)


def _key(graph: Graph, body: StageBody, nodes: Mapping[str, str], around: str) -> str:
    lines = [around, *_Wires(graph, body).lines(nodes)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class _Wires:
    """A stage's values and tensors by number, in the order in which they are met."""

    graph: Graph
    body: StageBody
    numbers: dict[str, int] = field(default_factory=dict)

    def lines(self, nodes: Mapping[str, str]) -> Iterator[str]:
        plan = self.body.plan
        for value in self.body.batch:
            yield f"batch {value.path} {self._number(value.name)}"
        for port in plan.inputs:
            yield f"from {port.source - plan.index} {self._port(port)}"
        for node in (*self.body.replicated, *self.body.nodes):
            again = node.name in self.body.recomputed
            made = [(self._number(value.name), value.path) for value in node.outputs]
            yield f"{nodes[node.name]} {again} {self._read(node)} > {made}"
        for port in plan.outputs:
            result = [port.name == self.graph.loss, port.name == self.graph.weight]
            yield f"to {[target - plan.index for target in port.targets]} {result} {self._port(port)}"
        yield f"{plan.recompute} copies {[self._number(name) for name in self.body.copied]}"
        yield f"holds {sorted(self._held())}"

    def _held(self) -> Iterator[str]:
        """Every tensor that the stage holds: those that it never reads have no gradients."""
        for fqn in held(self.graph, self.body.plan):
            info = self.graph.attributes[fqn]
            if info.canonical == fqn:
                yield f"{info.kind} {info.spec} {info.spec.gradient}"

    def _read(self, node: Node) -> list[int]:
        """The numbers of what a node reads: its arguments in order, then all of a called module's tensors."""
        found: list[int] = []

        def look(whole: Any) -> None:
            if isinstance(whole, Ref):
                found.append(self._number(whole.name))
            elif isinstance(whole, Attribute):
                found.append(self._tensor(whole.fqn))
            elif isinstance(whole, tuple | list):
                for part in whole:
                    look(part)
            elif isinstance(whole, Mapping):
                look(tuple(whole.values()))

        look((node.args, node.kwargs))
        return found + [self._tensor(fqn) for fqn in (*node.parameters, *node.buffers)]

    def _number(self, name: str) -> int:
        return self.numbers.setdefault(name, len(self.numbers))

    def _tensor(self, fqn: str) -> int:
        info = self.graph.attributes.get(fqn)
        return self._number(f"tensor {info.canonical if info else fqn}")

    def _port(self, port: Port) -> str:
        return f"{self._number(port.name)} {port.spec} {port.spec.gradient} {port.spec.order}"
