"""Cost graphs as JSON files, so that any tool can have its graphs cut.

    {"name", "unit", "nodes": [{"id", "name", "fwd", "bwd", "param_bytes"}], "edges": [[u, v], …],
     "tensors": [{"src": u, "bytes": n, "dst": [v, …], "kind": "F"}]}

Ids are 0 … n-1. They need not be a topological order: nodes are renumbered, and ``CostFile.position`` leads back. Nodes
may also have ``saved_bytes``, ``weight`` (ms) and ``parameters`` [{"name", "bytes", "trainable"}] (shared by name) in
place of ``param_bytes``; tensors ``name`` and ``gradient_bytes``.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipecompile.errors import CostError
from pipecompile.ir.json_text import LARGEST, parse, shortened
from pipecompile.ir.partition import CostGraph, CostNode, CostTensor, Parameter

Edge = tuple[int, int]


@dataclass(frozen=True, slots=True)
class CostFile:
    """A graph, and for each id of the file the node's position in the graph."""

    graph: CostGraph
    position: tuple[int, ...]

    def by_id(self, stage: Sequence[int]) -> list[int]:
        """A stage for each id of the file, from a stage for each node of the graph."""
        return [stage[at] for at in self.position]


def read_cost_graph(path: str | Path) -> CostFile:
    """Read a graph; CostError says what is wrong with it, and where in the file."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise CostError(
            f"the cost graph {str(path)!r} cannot be read: {error.strerror}; give the path of one"
        ) from error
    whole = parse(content, f"the cost graph {str(path)!r}", CostError, "mend it")
    try:
        return parse_cost_graph(whole)
    except CostError as error:
        raise CostError(f"{path}: {error}") from error


def write_cost_graph(graph: CostGraph, path: str | Path) -> None:
    """Write a graph so that ``read_cost_graph`` gives it back."""
    Path(path).write_text(json.dumps(cost_graph_to_json(graph)) + "\n", encoding="utf-8")


def parse_cost_graph(whole: Any) -> CostFile:
    """The graph that a parsed file describes."""
    nodes = _get(whole, "nodes", list, "the file")
    edges = [_edge(edge, k) for k, edge in enumerate(_get(whole, "edges", list, "the file"))]
    tensors = [_tensor(tensor, k) for k, tensor in enumerate(_get(whole, "tensors", list, "the file", []))]
    by_id = _by_id([_node(node, k) for k, node in enumerate(nodes)])
    flows = [(t.source, v) for t in tensors if t.kind == "F" for v in t.targets if v != t.source]
    _check_ids(len(by_id), edges, tensors)
    position = _topological(by_id, [*edges, *flows])
    order = sorted(range(len(by_id)), key=position.__getitem__)
    graph = CostGraph(
        _get(whole, "name", str, "the file", "graph"),
        tuple(by_id[k] for k in order),
        tuple((position[u], position[v]) for u, v in edges),
        tuple(
            CostTensor(
                t.name, position[t.source], tuple(position[v] for v in t.targets), t.bytes, t.gradient_bytes, t.kind
            )
            for t in tensors
        ),
        _get(whole, "unit", str, "the file", "ms"),
    )
    return CostFile(graph, tuple(position))


def cost_graph_to_json(graph: CostGraph) -> dict[str, Any]:
    """The file's content; what has its default is left out."""
    return {
        "name": graph.name,
        "unit": graph.unit,
        "nodes": [_node_to_json(k, node) for k, node in enumerate(graph.nodes)],
        "edges": [list(edge) for edge in graph.edges],
        "tensors": [
            {"name": t.name, "src": t.source, "bytes": t.bytes, "dst": list(t.targets), "kind": t.kind}
            | ({"gradient_bytes": t.gradient_bytes} if t.gradient_bytes else {})
            for t in graph.tensors
        ],
    }


def _node_to_json(k: int, node: CostNode) -> dict[str, Any]:
    whole: dict[str, Any] = {"id": k, "name": node.name, "fwd": node.forward_ms, "bwd": node.backward_ms}
    whole["param_bytes"] = node.parameter_bytes
    if node.parameters:
        whole["parameters"] = [_parameter_to_json(p) for p in node.parameters]
    if node.saved_bytes:
        whole["saved_bytes"] = node.saved_bytes
    if node.weight_ms:
        whole["weight"] = node.weight_ms
    return whole


def _parameter_to_json(p: Parameter) -> dict[str, Any]:
    master = {"master_bytes": p.master_bytes} if p.master_bytes else {}
    return {"name": p.name, "bytes": p.bytes, "trainable": p.trainable, **master}


def _get(whole: Any, key: str, kind: type, where: str, default: Any = None) -> Any:
    if not isinstance(whole, Mapping):
        raise CostError(f"{where} is {type(whole).__name__}, expected an object with {key!r}")
    value = whole.get(key, default)
    if value is None:
        raise CostError(f"{where} has no {key!r}; expected {'/'.join(map(str, whole))[:200] or 'nothing'} and {key}")
    if kind is float and type(value) is int and abs(value) < LARGEST:
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise CostError(f"{where}: {key!r} is {shortened(value)}, expected {kind.__name__}")
    return value


def _size(whole: Any, key: str, where: str, default: int | None = None) -> int:
    value = _get(whole, key, float, where, default)
    if not 0 <= value < LARGEST:
        raise CostError(f"{where}: {key!r} is {value}, expected a number of bytes >= 0 and below {LARGEST}")
    return int(value)


def _node(whole: Any, k: int) -> tuple[int, CostNode]:
    where = f"nodes[{k}]"
    node_id = _get(whole, "id", int, where)
    name = str(whole.get("name", node_id))
    listed = [
        Parameter(
            _get(p, "name", str, where),
            _size(p, "bytes", where),
            bool(p.get("trainable", True)),
            _size(p, "master_bytes", where, 0),
        )
        for p in _get(whole, "parameters", list, where, [])
    ]
    own = _size(whole, "param_bytes", where, 0)
    if own and not listed:
        listed = [Parameter(f"{name}#{node_id}", own)]
    forward, backward = _get(whole, "fwd", float, where), _get(whole, "bwd", float, where, 0.0)
    saved, weight = _size(whole, "saved_bytes", where, 0), _get(whole, "weight", float, where, 0.0)
    try:
        node = CostNode(name, forward, backward, tuple(listed), saved, weight)
    except CostError as error:
        raise CostError(f"{where}: {error}") from error
    return node_id, node


def _edge(edge: Any, k: int) -> Edge:
    if not (isinstance(edge, list) and len(edge) == 2 and all(type(end) is int for end in edge)):
        raise CostError(f"edges[{k}] is {shortened(edge)}, expected two node ids [u, v]")
    return edge[0], edge[1]


def _tensor(whole: Any, k: int) -> CostTensor:
    where = f"tensors[{k}]"
    source = _get(whole, "src", int, where)
    targets = _get(whole, "dst", list, where)
    if not all(type(v) is int for v in targets):
        raise CostError(f"{where}: 'dst' is {shortened(targets)}, expected a list of node ids")
    kind = _get(whole, "kind", str, where, "F")
    if kind not in ("F", "B"):
        raise CostError(f"{where}: 'kind' is {shortened(kind)}, expected 'F' (activation) or 'B' (gradient)")
    name = str(whole.get("name", f"{kind}{source}"))
    gradient = _size(whole, "gradient_bytes", where, 0)
    return CostTensor(name, source, tuple(targets), _size(whole, "bytes", where), gradient, kind)


def _by_id(nodes: Sequence[tuple[int, CostNode]]) -> list[CostNode]:
    found = dict(nodes)
    for k, (node_id, node) in enumerate(nodes):
        if not 0 <= node_id < len(nodes):
            raise CostError(f"nodes[{k}]: id {node_id} of {node.name!r}, expected ids 0 to {len(nodes) - 1}")
        if found[node_id] is not node:
            raise CostError(f"nodes[{k}]: id {node_id} of {node.name!r} is also the id of {found[node_id].name!r}")
    return [found[k] for k in range(len(nodes))]


def _check_ids(count: int, edges: Sequence[Edge], tensors: Sequence[CostTensor]) -> None:
    for what, ends in (("edges", edges), ("tensors", [(t.source, *t.targets) for t in tensors])):
        for k, ids in enumerate(ends):
            missing = [v for v in ids if not 0 <= v < count]
            if missing:
                raise CostError(
                    f"{what}[{k}] names node {missing[0]}, which is not there; ids go from 0 to {count - 1}"
                )


def _topological(nodes: Sequence[CostNode], edges: Sequence[Edge]) -> list[int]:
    """The position of every id in a topological order, as near to the ids' own order as there is."""
    if all(u < v for u, v in edges):
        return list(range(len(nodes)))
    after: list[list[int]] = [[] for _ in nodes]
    waits = [0] * len(nodes)
    for u, v in edges:
        after[u].append(v)
        waits[v] += 1
    heap = [v for v, w in enumerate(waits) if w == 0]
    position = [-1] * len(nodes)
    for place in range(len(nodes)):
        if not heap:
            left = {v for v, at in enumerate(position) if at < 0}
            cycle = _cycle(left, edges)
            raise CostError(
                f"the graph has a cycle: {' > '.join(f'{nodes[v].name} ({v})' for v in cycle)}; "
                "it must be acyclic: remove one of these edges (a tensor of kind F is one too), or make them one node"
            )
        u = heapq.heappop(heap)
        position[u] = place
        for v in after[u]:
            waits[v] -= 1
            if waits[v] == 0:
                heapq.heappush(heap, v)
    return position


def _cycle(left: set[int], edges: Sequence[Edge]) -> list[int]:
    """A cycle among nodes that each have a predecessor among themselves: [a, b, …, a]."""
    before = {v: u for u, v in edges if u in left and v in left}
    seen: dict[int, int] = {}
    v = min(left)
    while v not in seen:
        seen[v] = len(seen)
        v = before[v]
    way = list(seen)[seen[v] :]
    return [v, *reversed(way[1:]), v]
