"""Lifts operations back to the calls of the model's own modules.

A module call is *closed* if every outside value that its operations read is among its inputs, and every value of its
operations that is read outside is among its results. A closed call becomes one node that calls the original module, so
that hooks, checkpointing, dropout and readable code survive. The outermost closed calls are lifted, except those opened.

Rules, referred to in comments below:
 R1  a call that must stay whole (custom autograd function, tensor hook, replaced buffer) is lifted or refused
 R2  what needs no gradient, draws nothing at random, reads no parameter and is cheap is computed by each reader: replicated
 R3  memory that is changed in place: its writers and later readers under older names stay in one stage
 R4  a call that eager mode gives None where it was traced with a tensor (a mask) is not opened where it uses that tensor:
     its inside is another computation, as a rule a slower one
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

from pipecompile.capture.naming import rename_call, rename_node, rename_value, unique_names
from pipecompile.errors import CaptureError, must_stay_whole
from pipecompile.expect import EXPECT_TARGET
from pipecompile.ir import AttributeInfo, Call, Graph, Node, Ref, Value
from pipecompile.passes.replicate import replicable
from pipecompile.passes.storage import storage_constraints
from pipecompile.passes.streams import with_streams


def lift(graph: Graph, opened: frozenset[str] = frozenset()) -> Graph:
    """The graph with its outermost closed calls as nodes; the calls whose keys are in ``opened`` give way to their inside.

    Dead nodes are dropped. Raises CaptureError for a call that must stay whole but cannot (R1).
    """
    cheap = replicable(graph)
    lifted = list(_lifted(graph, opened, closed_calls(graph), cheap))
    nodes = _drop_dead(graph, lifted)
    replicated = replicable(replace(graph, nodes=tuple(nodes))) & cheap
    nodes, drawn_together = with_streams(graph, nodes)
    together, order = storage_constraints(graph, nodes, replicated)
    found = replace(
        graph,
        nodes=tuple(nodes),
        replicated=replicated,
        together=(*together, *drawn_together),
        order=order,
        opened=tuple(call.key for call in graph.calls if call.key in opened),
        dropped=_dropped(lifted, nodes),
    )
    return renumber(found)


def renumber(graph: Graph) -> Graph:
    """The graph with its values numbered anew, those that a reader of the stages meets first."""
    inner = [value.name for node in graph.nodes for part in node.inside for value in part.outputs]
    order = [value.name for value in graph.inputs] + [value.name for node in graph.nodes for value in node.outputs]
    order = list(dict.fromkeys([*order, *(value.name for value in graph.dropped), *inner, *_mentioned(graph)]))
    names = unique_names({name: re.sub(r"_\d+$", "", name) for name in order}, order)

    def renamed(node: Node) -> Node:
        return replace(rename_node(node, names), inside=tuple(rename_node(part, names) for part in node.inside))

    return replace(
        graph,
        inputs=tuple(rename_value(value, names) for value in graph.inputs),
        nodes=tuple(map(renamed, graph.nodes)),
        dropped=tuple(rename_value(value, names) for value in graph.dropped),
        calls=tuple(rename_call(call, names) for call in graph.calls),
        loss=names[graph.loss],
        weight=names.get(graph.weight, ""),
        reported={name: names[value] for name, value in graph.reported.items()},
    )


def _mentioned(graph: Graph) -> Iterator[str]:
    """Values that only dead operations make, but that calls were given or gave."""
    for call in graph.calls:
        yield from call.passed
        yield from refs((call.args, dict(call.kwargs)))
        yield from (name for _, name in call.results)
    for node in graph.nodes:
        for part in (node, *node.inside):
            yield from part.reads
            yield from part.writes


def closed_calls(graph: Graph) -> set[str]:
    """Keys of the calls whose operations touch the outside only through the call's inputs and results."""
    made_at = {value.name: position for position, node in enumerate(graph.nodes) for value in node.outputs}
    read_last = {name: position for position, node in enumerate(graph.nodes) for name in node.reads}
    read_last |= dict.fromkeys((graph.loss, graph.weight, *graph.reported.values()), len(graph.nodes))

    def is_closed(call: Call) -> bool:
        results = {name for _, name in call.results}
        for node in graph.nodes[call.first : call.last]:
            if any(made_at.get(n, -1) < call.first and n not in call.passed for n in (*node.reads, *node.writes)):
                return False
            if any(read_last.get(v.name, -1) >= call.last and v.name not in results for v in node.outputs):
                return False
        return True

    return {call.key for call in graph.calls if not call.obstacle and is_closed(call)}


def openable(graph: Graph) -> dict[str, Call]:
    """The calls that have something inside to open, and whose inside is what eager mode runs, by key (R4)."""
    unlike = _unlike_eager(graph)
    return {
        call.key: call
        for index, call in enumerate(graph.calls)
        if call.last - call.first > 1 and not call.keep_whole and index not in unlike
    }


def _unlike_eager(graph: Graph) -> set[int]:
    """Positions of the calls whose own operations read a tensor that eager mode does not pass them."""
    closed = closed_calls(graph)
    owner = [-1] * len(graph.nodes)
    for index, call in enumerate(graph.calls):
        if call.key in closed:
            owner[call.first : call.last] = [index] * (call.last - call.first)
    absent = [set(call.passed) - set(refs((call.args, call.kwargs))) for call in graph.calls]
    return {index for index, node in zip(owner, graph.nodes) if index >= 0 and not absent[index].isdisjoint(node.reads)}


def _lifted(graph: Graph, opened: frozenset[str], closed: set[str], cheap: frozenset[str]) -> Iterator[Node]:
    children: dict[int, list[int]] = {}
    for index, call in enumerate(graph.calls):
        children.setdefault(call.parent, []).append(index)

    def walk(first: int, last: int, inner: list[int]) -> Iterator[Node]:
        position = first
        for index in inner:
            call = graph.calls[index]
            yield from graph.nodes[position : call.first]
            position = call.last
            if call.first == call.last:
                continue
            if _is_lifted(graph, call, opened, closed, cheap):
                yield _call_node(graph, call)
                continue
            if call.keep_whole:  # R1
                raise CaptureError(must_stay_whole(call.fqn, call.keep_whole, call.obstacle))
            yield from walk(call.first, call.last, children.get(index, []))
        yield from graph.nodes[position:last]

    return walk(0, len(graph.nodes), children.get(-1, []))


def _is_lifted(graph: Graph, call: Call, opened: frozenset[str], closed: set[str], cheap: frozenset[str]) -> bool:
    if not call.fqn or call.key not in closed:
        return False
    if call.keep_whole:
        return True
    if all(node.name in cheap for node in graph.nodes[call.first : call.last]):
        return False
    return call.key not in opened


def _call_node(graph: Graph, call: Call) -> Node:
    inside = graph.nodes[call.first : call.last]
    produced = {value.name: value for node in inside for value in node.outputs}
    outputs: dict[str, Value] = {}
    for path, name in call.results:
        if name in produced:
            outputs.setdefault(name, replace(produced[name], path=path))
    own = [info for fqn, info in graph.attributes.items() if fqn.startswith(call.fqn + ".")]
    return Node(
        name=call.key,
        kind="call",
        target=call.fqn,
        args=call.args,
        kwargs=call.kwargs,
        outputs=tuple(outputs.values()),
        reads=tuple(dict.fromkeys(refs((call.args, call.kwargs)))),
        parameters=_attributes(own, inside, "parameter"),
        buffers=_attributes(own, inside, "buffer"),
        writes=tuple(dict.fromkeys(name for node in inside for name in node.writes if name not in produced)),
        written_buffers=tuple(dict.fromkeys(name for node in inside for name in node.written_buffers)),
        context=call.context,
        module=graph.calls[call.parent].fqn if call.parent >= 0 else "",
        random=any(node.random for node in inside),
        position=call.first,
        inside=inside,
    )


def _attributes(own: list[AttributeInfo], inside: tuple[Node, ...], kind: str) -> tuple[str, ...]:
    used = [name for node in inside for name in (node.parameters if kind == "parameter" else node.buffers)]
    return tuple(dict.fromkeys([info.fqn for info in own if info.kind == kind] + used))


def refs(whole: object) -> Iterator[str]:
    """The names of the values in arguments, in order."""
    if isinstance(whole, Ref):
        yield whole.name
    elif isinstance(whole, tuple | list):
        for part in whole:
            yield from refs(part)
    elif isinstance(whole, dict):
        yield from refs(tuple(whole.values()))
    elif isinstance(whole, slice):
        yield from refs((whole.start, whole.stop, whole.step))


def _drop_dead(graph: Graph, nodes: list[Node]) -> list[Node]:
    """Only nodes that the loss needs or that change a buffer, and of their results only those that are read."""
    storage = {v.name: v.storage or v.name for node in nodes for v in (*node.outputs, *_inner(node))}
    live = {graph.loss, graph.weight, *graph.reported.values()}
    live_storage = {storage.get(name, name) for name in live}
    kept: list[Node] = []
    for node in reversed(nodes):
        outputs = tuple(value for value in node.outputs if value.name in live)
        writes_live = any(storage.get(name, name) in live_storage for name in node.writes)
        if not (outputs or writes_live or node.written_buffers or node.target == EXPECT_TARGET):
            continue
        live.update(node.reads)
        live_storage.update(storage.get(name, name) for name in node.reads)
        kept.append(replace(node, outputs=outputs) if node.kind == "call" else node)
    return kept[::-1]


def _dropped(lifted: list[Node], nodes: list[Node]) -> tuple[Value, ...]:
    """The values that the inside of a kept call reads and that no kept node makes."""
    read = {name for node in nodes for inner in node.inside for name in inner.reads}
    kept = {node.name for node in nodes}
    return tuple(value for node in lifted if node.name not in kept for value in node.outputs if value.name in read)


def _inner(node: Node) -> list[Value]:
    return [value for inner in node.inside for value in inner.outputs]
