"""Order and togetherness that in-place operations impose (rule R3 of the lift pass).

A value that an operation changes in place may be cut from its maker only if nobody later reads the old name: the reader's
stage then changes a copy of its own. Otherwise everything from the maker to the last writer stays in one stage, and
readers under old names come after the writers. Who reads before a write is in no later stage than the writer, which may
be the maker's. Every rank has a batch of its own, so what reads an old name of it stays with the writer. A buffer that the
step changes stays with all that use it.
"""

from __future__ import annotations

from pipecompile.ir import Graph, Node

Together = tuple[tuple[str, ...], ...]
Order = tuple[tuple[str, str], ...]


def storage_constraints(graph: Graph, nodes: list[Node], replicated: frozenset[str]) -> tuple[Together, Order]:
    """Sets of node names that one stage must hold, and pairs (earlier, later) beyond what the values say."""
    root = roots(graph, nodes)
    together = _buffer_groups(graph, nodes, root) + _of_unknown_size(nodes, replicated)
    order: list[tuple[str, str]] = []
    inputs = {value.name for value in graph.inputs}
    for storage, writers in _written(root, nodes, replicated).items():
        touching = _touching(nodes, root, storage)
        order += [(nodes[r].name, nodes[w].name) for w in writers for r in touching if r < w]
        late = _readers_of_old_names(nodes, root, storage, writers)
        if storage not in inputs and not late:
            continue
        last = max(writers)
        kept = [i for i in touching if i <= last or (storage in inputs and i in late)]
        together.append(tuple(nodes[i].name for i in kept if nodes[i].name not in replicated))
        order += [(nodes[w].name, nodes[r].name) for w in writers for r in touching if r > w]
    return tuple(group for group in together if len(group) > 1), tuple(dict.fromkeys(order))


def _of_unknown_size(nodes: list[Node], replicated: frozenset[str]) -> list[tuple[str, ...]]:
    """For each value whose size is unknown before it is made, its maker and its readers: nobody can await it."""
    found = []
    for node in nodes:
        unknown = {value.name for value in node.outputs if not value.spec.known}
        if unknown and node.name not in replicated:
            readers = [other.name for other in nodes if not unknown.isdisjoint(other.reads)]
            found.append((node.name, *(name for name in readers if name not in replicated)))
    return found


def roots(graph: Graph, nodes: list[Node]) -> dict[str, str]:
    """The storage of each value: the first name of its memory."""
    found = {value.name: value.name for value in graph.inputs}
    for node in nodes:
        for inner in (node, *node.inside):
            found |= {value.name: value.storage or value.name for value in inner.outputs}
    return found


def _buffer_groups(graph: Graph, nodes: list[Node], root: dict[str, str]) -> list[tuple[str, ...]]:
    """For each buffer that the step changes, the nodes that use it or a view of it."""
    canonical = {fqn: info.canonical for fqn, info in graph.attributes.items()}
    written = {canonical.get(name, name) for node in nodes for name in node.written_buffers}
    groups: dict[str, list[str]] = {name: [] for name in sorted(written)}
    for node in nodes:
        views = [root.get(name, name) for name in node.reads]
        viewed = [name.removeprefix("attribute:") for name in views if name.startswith("attribute:")]
        for name in {
            canonical.get(buffer, buffer) for buffer in (*node.buffers, *node.written_buffers, *viewed)
        } & written:
            groups[name].append(node.name)
    return [tuple(group) for group in groups.values()]


def _written(root: dict[str, str], nodes: list[Node], replicated: frozenset[str]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for index, node in enumerate(nodes):
        if node.name in replicated:
            continue
        for name in node.writes:
            found.setdefault(root.get(name, name), []).append(index)
    return found


def _touching(nodes: list[Node], root: dict[str, str], storage: str) -> list[int]:
    return [
        index
        for index, node in enumerate(nodes)
        if any(root.get(name, name) == storage for name in (*node.reads, *(value.name for value in node.outputs)))
    ]


def _readers_of_old_names(nodes: list[Node], root: dict[str, str], storage: str, writers: list[int]) -> set[int]:
    """The nodes that, after a write, read a name that was made before it."""
    found = set()
    for writer in writers:
        before = {storage} | {value.name for node in nodes[:writer] for value in node.outputs}
        for index, node in enumerate(nodes[writer + 1 :], writer + 1):
            if any(name in before and root.get(name, name) == storage for name in node.reads):
                found.add(index)
    return found
