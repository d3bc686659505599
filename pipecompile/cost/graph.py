"""From a traced model and the cost of each of its nodes to the graph that partitioning cuts.

A cost node is a graph node, or several that no cut may separate: the sets of ``Graph.together``, and whatever would
otherwise lie on a cycle with them (strongly connected components). O((nodes + edges) log nodes).

    a ─▶ b ─▶ c      together {a, c}      {a, b, c} ─▶ d
    └────────▶ d     ───────────────▶
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import networkx as nx

from pipecompile.errors import CostError
from pipecompile.ir import CostGraph, CostNode, CostTensor, Graph, Node, Parameter, Value


@dataclass(frozen=True, slots=True)
class NodeCost:
    """What one microbatch costs in one node of a Graph. ``weight_ms`` is the weight gradients' part of the backward."""

    forward_ms: float
    backward_ms: float
    saved_bytes: int = 0
    weight_ms: float = 0.0
    recomputed_bytes: int = 0

    def __post_init__(self) -> None:
        for what in ("forward_ms", "backward_ms", "weight_ms", "saved_bytes"):
            cost = getattr(self, what)
            if not (cost >= 0 and math.isfinite(cost)):
                raise CostError(f"{what} is {cost}, expected a finite number >= 0")

    def __add__(self, other: NodeCost) -> NodeCost:
        return NodeCost(
            self.forward_ms + other.forward_ms,
            self.backward_ms + other.backward_ms,
            self.saved_bytes + other.saved_bytes,
            self.weight_ms + other.weight_ms,
            self.recomputed_bytes + other.recomputed_bytes,
        )


@dataclass(frozen=True, slots=True)
class Costed:
    """A cost graph, and the graph nodes that each of its nodes stands for, in program order."""

    graph: CostGraph
    members: tuple[tuple[str, ...], ...]

    @property
    def cost_node(self) -> dict[str, int]:
        """The cost node of each graph node; replicated nodes have none."""
        return {name: index for index, names in enumerate(self.members) for name in names}


def cost_graph(graph: Graph, costs: Mapping[str, NodeCost], name: str) -> Costed:
    """Merge, order and connect the nodes of ``graph`` that a stage owns; CostError where a node has no cost.

    Replicated nodes and the batch are computed or read by every stage, so their values never count as tensors; a node
    that reads a replicated one depends on all that the replicated one depends on.
    """
    nodes = {node.name: node for node in graph.nodes if node.name not in graph.replicated}
    missing = [node for node in nodes if node not in costs]
    if missing:
        raise CostError(
            f"no cost for {len(missing)} of {len(nodes)} nodes, the first is {missing[0]!r}; "
            f"give it one in the cost file, or use --costs measure or --costs estimate"
        )
    reads = owned_reads(graph)
    producer = {value.name: node.name for node in nodes.values() for value in node.outputs}
    arcs = {(producer[value], node) for node, values in reads.items() for value in values}
    arcs |= {(u, v) for u, v in graph.order if u in nodes and v in nodes}
    members = _merge(list(nodes), arcs, _joined(graph, nodes))
    place = {node: index for index, names in enumerate(members) for node in names}
    edges = sorted({(place[u], place[v]) for u, v in arcs if place[u] != place[v]})
    return Costed(
        CostGraph(
            name,
            tuple(_cost_node(graph, [nodes[node] for node in names], costs) for names in members),
            tuple(edges),
            tuple(_tensors(nodes, reads, place)),
        ),
        members,
    )


def owned_reads(graph: Graph) -> dict[str, frozenset[str]]:
    """For each node that is not replicated, the values of other such nodes that it depends on.

    It depends on what it reads, and where that is the value of a replicated node, on all that this one depends on.
    """
    behind: dict[str, frozenset[str]] = {value.name: frozenset() for value in graph.inputs}
    reads: dict[str, frozenset[str]] = {}
    for node in graph.nodes:
        found = frozenset().union(*(behind.get(value, frozenset()) for value in node.reads))
        replicated = node.name in graph.replicated
        behind |= {value.name: found if replicated else frozenset({value.name}) for value in node.outputs}
        if not replicated:
            reads[node.name] = found
    return reads


def _joined(graph: Graph, nodes: Mapping[str, Node]) -> Iterator[tuple[str, str]]:
    """Pairs of owned nodes that no cut may separate."""
    known = {node.name for node in graph.nodes}
    for group in graph.together:
        strange = [node for node in group if node not in known]
        if strange:
            raise CostError(f"the graph keeps {strange[0]!r} together with others, but has no such node")
        owned = [node for node in group if node in nodes]
        yield from itertools.pairwise(owned)


def _merge(
    names: list[str], arcs: set[tuple[str, str]], joined: Iterable[tuple[str, str]]
) -> tuple[tuple[str, ...], ...]:
    """Groups of names without a cycle between them: topologically ordered, otherwise by their first name's position."""
    position = {name: index for index, name in enumerate(names)}
    net: nx.DiGraph[str] = nx.DiGraph()
    net.add_nodes_from(names)
    net.add_edges_from(arcs)
    for u, v in joined:
        net.add_edges_from(((u, v), (v, u)))
    merged = nx.condensation(net)
    first = {group: min(position[name] for name in data["members"]) for group, data in merged.nodes(data=True)}
    return tuple(
        tuple(sorted(merged.nodes[group]["members"], key=position.__getitem__))
        for group in nx.lexicographical_topological_sort(merged, key=first.__getitem__)
    )


def _cost_node(graph: Graph, nodes: list[Node], costs: Mapping[str, NodeCost]) -> CostNode:
    whole = NodeCost(0.0, 0.0)
    for node in nodes:
        whole += costs[node.name]
    return CostNode(
        nodes[0].name,
        whole.forward_ms,
        whole.backward_ms,
        _parameters(graph, nodes),
        whole.saved_bytes,
        whole.weight_ms,
        whole.recomputed_bytes,
    )


def _parameters(graph: Graph, nodes: list[Node]) -> tuple[Parameter, ...]:
    """Each parameter and buffer of the nodes once, by its canonical FQN; only parameters that get gradients train."""
    found: dict[str, Parameter] = {}
    for node in nodes:
        for fqn in (*node.parameters, *node.buffers):
            if fqn in graph.constants:
                continue
            if fqn not in graph.attributes:
                raise CostError(f"node {node.name!r} uses {fqn!r}, which is no parameter or buffer of the model")
            info = graph.attributes[fqn]
            trainable = fqn in node.parameters and info.spec.gradient
            master = replace(info.spec, dtype=info.master).bytes if trainable and info.master else 0
            found.setdefault(info.canonical, Parameter(info.canonical, info.spec.bytes, trainable, master))
    return tuple(found.values())


def _tensors(
    nodes: Mapping[str, Node], reads: Mapping[str, frozenset[str]], place: Mapping[str, int]
) -> Iterator[CostTensor]:
    """One tensor for each value that another cost node reads, in program order."""
    readers: dict[str, set[int]] = {}
    for reader, names in reads.items():
        for name in names:
            readers.setdefault(name, set()).add(place[reader])
    for node in nodes.values():
        for value in node.outputs:
            targets = readers.get(value.name, set()) - {place[node.name]}
            if targets:
                yield _tensor(value, place[node.name], targets)


def _tensor(value: Value, source: int, targets: set[int]) -> CostTensor:
    spec = value.spec
    return CostTensor(value.name, source, tuple(sorted(targets)), spec.bytes, spec.bytes if spec.gradient else 0)
