"""Where to cut between two stages: minimum cuts of a flow network whose source sides are closed sets.

    edge u → v      arc v → u, infinite: with v, everything that leads to v is on the source side
    tensor t of u   arc u → t of its bytes, arcs t → reader, infinite: paid once if any reader is on the other side
                    (the mirror image for gradients; the readers of a tensor from elsewhere pay for being split)

The closed set must also hold a load inside a window: H. Yang, D. Wong, "Efficient network flow based min-cut balanced
partitioning" (1996) grow the side that is too small, with a node more at a time, and cut again; so every cut on the way
is a minimum cut, and they are nested. One flow is O(V² · E) in theory and close to linear here: ~2 ms for 300 nodes.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import networkx as nx
import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import breadth_first_order, maximum_flow

from pipecompile.passes.partitioners.problem import Problem

SOURCE, SINK = "source", "sink"
EMPTY: frozenset[int] = frozenset()
INFINITY = float("inf")
INFINITE = 2**30
FINITE = 2**29
"""Capacities are scaled so that all finite ones together stay under this: scipy's flows are int32."""
SMALL = 40
"""Networks of so few nodes are left to networkx."""


def cut_network(
    problem: Problem, stage: Sequence[int], first: int, second: int, inside: Set[int] = EMPTY, outside: Set[int] = EMPTY
) -> nx.DiGraph:
    """The network of the cut between two stages, all other stages fixed; its nodes are those of the two.

    Nodes of ``inside`` and ``outside`` are the source and the sink themselves.
    """
    graph = nx.DiGraph()
    place: dict[int, Hashable] = {v: v for v, s in enumerate(stage) if s in (first, second)}
    place |= dict.fromkeys(inside, SOURCE) | dict.fromkeys(outside, SINK)
    graph.add_nodes_from((SOURCE, SINK, *place.values()))

    def arc(u: Hashable, v: Hashable, capacity: float) -> None:
        if capacity > 0 and u != v and u != SINK and v != SOURCE:
            known = graph[u][v]["capacity"] if graph.has_edge(u, v) else 0.0
            graph.add_edge(u, v, capacity=known + capacity)

    for u, v in problem.edges:
        if u in place and v in place:
            arc(place[v], place[u], INFINITY)
    for t, (source, targets, size) in enumerate(problem.tensors):
        readers = {place[v] for v in targets if v in place}
        if source in place:
            elsewhere = {stage[v] for v in targets} - {first, second}
            later = sum(problem.link(second, s) - problem.link(first, s) for s in elsewhere) * size
            arc(SOURCE, place[source], later)  # paid if the source is on the sink side
            arc(place[source], SINK, -later)
        if readers and source in place:
            _made_here(arc, t, place[source], readers, size * problem.link(first, second))
        elif readers:
            here, there = (size * problem.link(stage[source], s) for s in (first, second))
            if len(readers) > 1 or here != there:
                _read_here(arc, t, readers, here, there)
    return graph


def _made_here(
    arc: Callable[[Hashable, Hashable, float], None], t: int, source: Hashable, readers: Set[Hashable], cost: float
) -> None:
    """Pay if any reader is on the other side than the source."""
    if not readers - {source}:
        return
    forward, back = ("to", t), ("from", t)
    arc(source, forward, cost)
    arc(back, source, cost)
    for v in readers:
        arc(forward, v, INFINITY)
        arc(v, back, INFINITY)


def _read_here(
    arc: Callable[[Hashable, Hashable, float], None], t: int, readers: Set[Hashable], here: float, there: float
) -> None:
    """Pay ``here`` if any reader is on the source side, ``there`` if any is on the sink side."""
    inside, outside = ("in", t), ("out", t)
    arc(inside, SINK, here)
    arc(SOURCE, outside, there)
    for v in readers:
        arc(v, inside, INFINITY)
        arc(outside, v, INFINITY)


@dataclass(frozen=True)
class Network:
    """A flow network whose integer nodes can be fixed to either side between one minimum cut and the next."""

    graph: nx.DiGraph

    @cached_property
    def members(self) -> list[int]:
        return sorted(v for v in self.graph if isinstance(v, int))

    @cached_property
    def index(self) -> dict[Hashable, int]:
        return {v: k for k, v in enumerate(self.graph)}

    @cached_property
    def matrix(self) -> tuple[csr_array, dict[tuple[str, int], int]]:
        """Integer capacities, and where in its data the arcs are that fix a node to a side (0 unless it is fixed)."""
        total = sum(c for _, _, c in self.graph.edges(data="capacity") if c < INFINITY)
        scale = FINITE / max(total, 1e-300)
        count = len(self.index)
        entries: dict[tuple[int, int], int] = {}
        for u, v, c in self.graph.edges(data="capacity"):
            at = self.index[u], self.index[v]
            entries[at] = INFINITE if c == INFINITY else max(1, round(c * scale))
            entries.setdefault(at[::-1], 0)
        for v in self.members:
            for at in ((self.index[SOURCE], self.index[v]), (self.index[v], self.index[SINK])):
                entries.setdefault(at, 0)
                entries.setdefault(at[::-1], 0)
        rows, columns = np.array(list(entries), dtype=np.int32).reshape(-1, 2).T
        numbered = coo_array((np.arange(1, len(entries) + 1), (rows, columns)), shape=(count, count)).tocsr()
        values = np.array(list(entries.values()), dtype=np.int32)
        place = np.empty(len(entries) + 1, dtype=np.int64)
        place[numbered.data] = np.arange(len(entries))
        number = {at: k + 1 for k, at in enumerate(entries)}
        anchors = {(SOURCE, v): int(place[number[self.index[SOURCE], self.index[v]]]) for v in self.members}
        anchors |= {(SINK, v): int(place[number[self.index[v], self.index[SINK]]]) for v in self.members}
        capacities = csr_array((values[numbered.data - 1], numbered.indices, numbered.indptr), shape=(count, count))
        return capacities, anchors

    def cut(self, inside: set[int], outside: set[int]) -> tuple[set[int], set[int]]:
        """The smallest and the largest source side of a minimum cut with ``inside`` on it and ``outside`` not."""
        if len(self.graph) <= SMALL:
            return self._cut_small(inside, outside)
        base, anchors = self.matrix
        data: npt.NDArray[Any] = base.data.copy()
        data[[anchors[SOURCE, v] for v in inside]] = INFINITE
        data[[anchors[SINK, v] for v in outside]] = INFINITE
        capacity = csr_array((data, base.indices, base.indptr), shape=base.shape)
        flow = maximum_flow(capacity, self.index[SOURCE], self.index[SINK]).flow
        rest = capacity - flow
        rest.data = np.maximum(rest.data, 0)
        rest.eliminate_zeros()
        reached = set(breadth_first_order(rest, self.index[SOURCE], return_predecessors=False).tolist())
        reaching = set(breadth_first_order(rest.T.tocsr(), self.index[SINK], return_predecessors=False).tolist())
        smallest = {v for v in self.members if self.index[v] in reached}
        return smallest, {v for v in self.members if self.index[v] not in reaching}

    def _cut_small(self, inside: set[int], outside: set[int]) -> tuple[set[int], set[int]]:
        graph = self.graph.copy()
        graph.add_edges_from(((SOURCE, v) for v in inside), capacity=INFINITY)
        graph.add_edges_from(((v, SINK) for v in outside), capacity=INFINITY)
        residual = nx.algorithms.flow.boykov_kolmogorov(graph, SOURCE, SINK)
        open_arcs = [(u, v) for u, v, arc in residual.edges(data=True) if arc["flow"] < arc["capacity"]]
        rest = nx.DiGraph(open_arcs)
        rest.add_nodes_from((SOURCE, SINK))
        reached, reaching = nx.descendants(rest, SOURCE), nx.ancestors(rest, SINK)
        return {v for v in self.members if v in reached}, {v for v in self.members if v not in reaching}


def balanced_cut(
    network: Network,
    load: Sequence[float],
    least: float,
    most: float,
    generator: random.Random,
) -> set[int] | None:
    """The source side of a minimum cut whose load is from ``least`` to ``most``, both sides grown at random until then."""
    everything = set(network.members)
    before = {v: [u for u in network.graph.successors(v) if isinstance(u, int)] for v in everything}
    after = {v: [u for u in network.graph.predecessors(v) if isinstance(u, int)] for v in everything}
    total = sum(load[v] for v in everything)
    inside: set[int] = set()
    outside: set[int] = set()
    while True:
        smallest, largest = network.cut(inside, outside)
        low, high = sum(load[v] for v in smallest), sum(load[v] for v in largest)
        if least <= low <= most:
            return smallest
        if least <= high <= most:
            return largest
        if high < least or (low < least and generator.random() < 0.5):
            start, goal = (largest, high) if high < least else (smallest, low)
            side = _grow(start, outside, before, after, load, most - goal, (least - goal) / 8, generator)
            if len(side) == len(inside):
                return None
            inside = side
        else:
            start, goal = (smallest, low) if low > most else (largest, high)
            room, want = total - least - (total - goal), (goal - most) / 8
            side = _grow(everything - start, inside, after, before, load, room, want, generator)
            if len(side) == len(outside):
                return None
            outside = side


def _grow(
    side: set[int],
    other: set[int],
    before: dict[int, list[int]],
    after: dict[int, list[int]],
    load: Sequence[float],
    room: float,
    want: float,
    generator: random.Random,
) -> set[int]:
    """A side with one node more, or as many as bring ``want``, without more than ``room``; ``before`` come first."""
    side = set(side)
    ready = sorted(v for v in before if v not in side and v not in other and side.issuperset(before[v]))
    gained = 0.0
    while ready and (gained < want or gained == 0):
        near = [v for v in ready if not side.isdisjoint(before[v])] or ready
        v = generator.choice(near)
        ready.remove(v)
        if gained + load[v] > room:
            continue
        side.add(v)
        gained += load[v]
        ready += [u for u in after[v] if u not in other and side.issuperset(before[u])]
    return side
