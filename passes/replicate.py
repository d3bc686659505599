"""Finds what every stage may compute for itself instead of receiving it: masks, position ids, rotary tables.

A node is replicable if no gradient flows through it, it makes nothing that is reported, it draws nothing at random, it reads no parameter and no buffer
that the step changes, it is cheap, and all that it reads is replicable or in the batch. Memory that is changed in place
is replicated as a whole, with all its writers, or not at all.
"""

from __future__ import annotations

import math

from pipecompile.ir import Graph, Node

CHEAP_FLOPS = 10_000_000
HEAVY = ("mm", "matmul", "linear", "conv", "attention", "einsum", "lstm", "gru", "rnn", "scan")


def replicable(graph: Graph) -> frozenset[str]:
    """Names of the operations that each reading stage can compute for itself."""
    written = {name for node in graph.nodes for name in node.written_buffers}
    asked = set(graph.reported.values())
    names = {
        node.name for node in graph.nodes if _may(node, written) and not any(v.name in asked for v in node.outputs)
    }
    producer = {value.name: node.name for node in graph.nodes for value in node.outputs}
    groups = _written_groups(graph)
    while True:
        bad = {
            node.name
            for node in graph.nodes
            if node.name in names and any(read in producer and producer[read] not in names for read in node.reads)
        }
        for group in groups:
            if not group <= names - bad:
                bad |= group & names
        if not bad:
            return frozenset(names)
        names -= bad


def _may(node: Node, written: set[str]) -> bool:
    if node.kind == "call" or node.random or node.parameters or node.written_buffers:
        return False
    if not node.target.startswith("aten."):
        return False
    if any(value.spec.gradient for value in node.outputs) or any(name in written for name in node.buffers):
        return False
    return not any(word in node.target for word in HEAVY) or _flops(node) <= CHEAP_FLOPS


def _flops(node: Node) -> int:
    """A rough upper estimate: every result element is a product along the longest dimension that the node makes."""
    size = max((math.prod(value.spec.shape) for value in node.outputs), default=0)
    longest = max((max(value.spec.shape, default=1) for value in node.outputs), default=1)
    return 2 * size * longest


def _written_groups(graph: Graph) -> list[set[str]]:
    """For each storage that is changed in place: the nodes that make, view or change it; of an input those that read it,
    and a mark."""
    root = {value.name: value.storage or value.name for node in graph.nodes for value in node.outputs}
    inputs = {value.name for value in graph.inputs}
    written = {root.get(name, name) for node in graph.nodes for name in node.writes}
    groups: dict[str, set[str]] = {name: {"an input"} if name in inputs else set() for name in written}
    for node in graph.nodes:
        touched = {root[value.name] for value in node.outputs} | {root.get(name, name) for name in node.writes}
        touched |= {root.get(name, name) for name in node.reads} & inputs
        for storage in touched & written:
            groups[storage].add(node.name)
    return list(groups.values())
