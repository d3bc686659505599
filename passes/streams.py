"""Which random stream each node draws from, so that a model draws the same numbers however it is cut.

A module that draws random numbers in its own forward starts a new stream whenever it is called (see the runtime's random
module). A stage that calls or opens such a module must begin at the same stream:

    call of a random module     starts at the number of such calls before it
    operation of an opened one  the same, if it is the first to draw after a module was entered; otherwise it goes on
                                where the node that drew before it stopped, and stays with that node
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import replace

from pipecompile.ir import Graph, Node


def random_modules(graph: Graph) -> tuple[str, ...]:
    """FQNs of the modules whose own forward draws random numbers, in the order of the trace."""
    return tuple(dict.fromkeys(node.module for node in graph.nodes if node.random))


def with_streams(graph: Graph, nodes: list[Node]) -> tuple[list[Node], list[tuple[str, ...]]]:
    """The nodes with their streams, and the pairs of nodes that must stay in one stage.

    ``graph`` is the traced graph, whose operations tell which modules draw; ``nodes`` are the lifted ones.
    """
    drawing = set(random_modules(graph))
    if not drawing:
        return nodes, []
    order = _entries(graph)
    entered = {key: count for count, key in enumerate(key for key, fqn, _ in order if fqn in drawing)}
    firsts = sorted(first for _, fqn, first in order if fqn in drawing)
    before = _entries_before(order, drawing)
    done: list[Node] = []
    together: list[tuple[str, ...]] = []
    last: Node | None = None
    last_stream = -1
    for node in nodes:
        if not node.random:
            done.append(node)
            continue
        if node.kind == "call":
            stream = entered.get(node.name, before[node.name])
            done.append(replace(node, stream=stream))
        else:
            stream = bisect_right(firsts, node.position)
            goes_on = last is not None and last_stream == stream
            if goes_on and last is not None:
                together.append((last.name, node.name))
            done.append(node if goes_on else replace(node, stream=stream))
        last, last_stream = node, _stream_after(node, firsts, stream)
    return done, together


def _stream_after(node: Node, firsts: list[int], stream: int) -> int:
    """The stream at the end of a node's last operation."""
    if node.kind == "op":
        return stream
    return bisect_right(firsts, max((part.position for part in node.inside if part.random), default=node.position))


def _entries(graph: Graph) -> list[tuple[str, str, int]]:
    """(key, fqn, first position) of every call in the order in which they are entered."""
    children: dict[int, list[int]] = {}
    for index, call in enumerate(graph.calls):
        children.setdefault(call.parent, []).append(index)
    found: list[tuple[str, str, int]] = []
    todo = children.get(-1, [])[::-1]
    while todo:
        index = todo.pop()
        call = graph.calls[index]
        found.append((call.key, call.fqn, call.first))
        todo += sorted(children.get(index, []), key=lambda i: (graph.calls[i].first, i))[::-1]
    return found


def _entries_before(order: list[tuple[str, str, int]], drawing: set[str]) -> dict[str, int]:
    """For each call the number of drawing modules entered before it."""
    found: dict[str, int] = {}
    count = 0
    for key, fqn, _ in order:
        found[key] = count
        count += fqn in drawing
    return found
