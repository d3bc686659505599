"""Shortens the simulated step: what counts in the end is the step under its schedule and links, not the slowest stage.

A partition with fewer bytes may have a slower bottleneck within the tolerance, and one with a faster bottleneck more to
send. Among the partitions of several tolerances the one with the shortest step is taken; then nodes next to a cut are moved
over it, one at a time, as long as the step gets shorter. A step that does not fit in memory counts as endless.

Each try costs one simulation, O(instructions); at most ``TRIES`` are made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from pipecompile.ir import CostGraph, Partition
from pipecompile.passes.partitioners import evaluate

TOLERANCES = (0.0, 0.01, 0.025)
TRIES = 60
WORTH = 5e-3

Score = Callable[[Partition], float]


def shorten(
    graph: CostGraph,
    found: Partition,
    score: Score,
    cut: Callable[[float], Partition],
    tolerance: float,
    tries: int = TRIES,
) -> Partition:
    """The partition with the shortest step that is found from ``found``; ``score`` gives a partition's step.

    ``cut`` partitions ``graph`` at a tolerance. No slowest stage gets slower than ``tolerance`` over the fastest's.
    """
    best, least = found, score(found)
    others = [cut(finer) for finer in TOLERANCES if finer < tolerance]
    slowest = (1 + tolerance) * min(other.bottleneck_ms for other in (found, *others))
    for other in others:
        if other.stage != best.stage and (step := score(other)) < (1 - WORTH) * least:
            best, least = other, step
    left = tries
    moved = True
    while moved and left > 0:
        moved = False
        for stage in moves(graph, best.stage):
            if left == 0:
                break
            left -= 1
            other = evaluate(graph, stage, stages=best.stages, bound_ms=best.bound_ms, bound_bytes=best.bound_bytes)
            if other.bottleneck_ms <= slowest and (step := score(other)) < (1 - WORTH) * least:
                best, least, moved = other, step, True
                break
    return best


def moves(graph: CostGraph, stage: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """The stage maps with one node moved over the cut that it lies at; no edge goes back, no stage gets empty."""
    before: dict[int, list[int]] = {}
    after: dict[int, list[int]] = {}
    for u, v in graph.edges:
        before.setdefault(v, []).append(u)
        after.setdefault(u, []).append(v)
    last = max(stage)
    total = [stage.count(s) for s in range(last + 1)]
    heavy = sorted(
        range(len(stage)), key=lambda n: graph.nodes[n].forward_ms + graph.nodes[n].backward_ms, reverse=True
    )
    for node in heavy:
        here = stage[node]
        if total[here] == 1:
            continue
        if here < last and all(stage[v] > here for v in after.get(node, ())):
            yield _with(stage, node, here + 1)
        if here > 0 and all(stage[u] < here for u in before.get(node, ())):
            yield _with(stage, node, here - 1)


def _with(stage: Iterable[int], node: int, there: int) -> tuple[int, ...]:
    moved = list(stage)
    moved[node] = there
    return tuple(moved)
