"""Topological orders of a problem's nodes: each turns cutting a graph into cutting a line. O(n + e) each, or · log n."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Sequence

from pipecompile.passes.partitioners.problem import Problem


def neighbours(problem: Problem) -> tuple[list[list[int]], list[list[int]]]:
    """Successors and predecessors of every node."""
    after: list[list[int]] = [[] for _ in problem.load]
    before: list[list[int]] = [[] for _ in problem.load]
    for u, v in problem.edges:
        after[u].append(v)
        before[v].append(u)
    return after, before


def depth_first(after: list[list[int]], before: list[list[int]], rank: Sequence[float]) -> list[int]:
    """Last ready, first taken: finishes a branch before it starts the next. ``rank`` breaks ties, low first."""
    waits = [len(p) for p in before]
    stack = sorted((v for v, w in enumerate(waits) if w == 0), key=rank.__getitem__, reverse=True)
    order = []
    while stack:
        u = stack.pop()
        order.append(u)
        ready = []
        for v in after[u]:
            waits[v] -= 1
            if waits[v] == 0:
                ready.append(v)
        stack += sorted(ready, key=rank.__getitem__, reverse=True)
    return order


def by_priority(after: list[list[int]], before: list[list[int]], rank: Sequence[float]) -> list[int]:
    """The ready node of lowest rank next."""
    waits = [len(p) for p in before]
    heap = [(rank[v], v) for v, w in enumerate(waits) if w == 0]
    heapq.heapify(heap)
    order = []
    while heap:
        _, u = heapq.heappop(heap)
        order.append(u)
        for v in after[u]:
            waits[v] -= 1
            if waits[v] == 0:
                heapq.heappush(heap, (rank[v], v))
    return order


def depths(neighbour: list[list[int]], sequence: Sequence[int]) -> list[float]:
    """The longest way (in nodes) to each node, along a sequence in which neighbours come first."""
    depth = [0.0] * len(neighbour)
    for v in sequence:
        depth[v] = 1 + max((depth[u] for u in neighbour[v]), default=-1)
    return depth


def orders(problem: Problem, shuffles: int = 2, seed: int = 0) -> list[list[int]]:
    """Different orders, no two alike: as numbered, depth first and by level from either end, and shuffled ones."""
    after, before = neighbours(problem)
    count = problem.nodes
    forward = list(range(count))
    backward = forward[::-1]
    early, late = depths(before, forward), depths(after, backward)
    ranks: list[Sequence[float]] = [forward, backward, late, [-x for x in late]]
    generator = random.Random(seed)
    for _ in range(shuffles):
        ranks.append([generator.random() for _ in forward])

    found = [forward, by_priority(after, before, early), by_priority(after, before, [-x for x in late])]
    walk: Callable[..., list[int]] = depth_first
    for rank in ranks:
        found.append(walk(after, before, rank))
        found.append(walk(before, after, rank)[::-1])
    return [list(order) for order in dict.fromkeys(map(tuple, found))]
