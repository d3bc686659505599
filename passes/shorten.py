"""Shortens the simulated step: what counts in the end is the step under its schedule and links, not the slowest stage.

A partition with fewer bytes may have a slower bottleneck within the tolerance, and one with a faster bottleneck more to
send. Among the partitions of several tolerances the one with the shortest step is taken; then nodes next to a cut are moved
over it, one at a time, as long as the step gets shorter. A step that does not fit in memory counts as endless.

A schedule may be searched for its partition, which takes seconds. So a try is scored in the order made for the partition
known so far, and only where moves have shortened the step in that order is one made for where they led. What
counts is the step in the new order: moves after which it is no shorter are undone.

Each try costs one simulation, O(instructions); at most ``TRIES`` are made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from pipecompile.ir import CostGraph, Partition
from pipecompile.passes.partitioners import evaluate

TOLERANCES = (0.0, 0.01, 0.025)
TRIES = 60
WORTH = 5e-3
"""A step must be shorter by this share to be taken."""

Score = Callable[[Partition], float]
Order = Callable[[Partition], Score]
"""Makes the order for a partition; gives what scores partitions (ms of a step, infinite: impossible) in that order."""


def shorten(
    graph: CostGraph,
    found: Partition,
    order: Order,
    cut: Callable[[float], Partition] | None,
    tolerance: float,
    tries: int = TRIES,
) -> Partition:
    """The partition with the shortest step that is found from ``found``, each in the order that is made for it.

    ``cut`` partitions ``graph`` at a tolerance. No slowest stage gets slower than ``tolerance`` over the fastest's.
    Without ``cut`` (what a message takes is unknown) no bytes are added to the cuts.
    """
    others = [cut(finer) for finer in TOLERANCES if finer < tolerance] if cut else []
    slowest = (1 + tolerance) * min(other.bottleneck_ms for other in (found, *others))
    most = float("inf") if cut else found.bytes
    score = order(found)
    least = score(found)
    for other in others:
        if other.stage != found.stage and score(other) < (1 - WORTH) * least:
            its_score = order(other)
            if (step := its_score(other)) < (1 - WORTH) * least:
                found, score, least = other, its_score, step
    left = tries
    while trail := _descend(graph, found, score, least, slowest, most, left):
        left -= sum(tried for tried, _ in trail)
        for _, other in (trail[-1], trail[0])[: len(trail)]:
            its_score = order(other)
            if (step := its_score(other)) < (1 - WORTH) * least:
                found, score, least = other, its_score, step
                break
        else:
            break
    return found


def _descend(
    graph: CostGraph, found: Partition, score: Score, least: float, slowest: float, most: float, tries: int
) -> list[tuple[int, Partition]]:
    """The partitions on the way down in one order, a moved node each, and how many tries each took."""
    trail: list[tuple[int, Partition]] = []
    tried, options = 0, moves(graph, found.stage)
    while tries > 0 and (stage := next(options, None)):
        other = evaluate(graph, stage, stages=found.stages, bound_ms=found.bound_ms, bound_bytes=found.bound_bytes)
        if other.bottleneck_ms > slowest or other.bytes > most:
            continue
        tries, tried = tries - 1, tried + 1
        if (step := score(other)) < (1 - WORTH) * least:
            trail.append((tried, other))
            least, tried, options = step, 0, moves(graph, stage)
    return trail


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
