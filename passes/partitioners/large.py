"""Large graphs: cut a coarse line of intervals first, then cut again with single nodes around the boundaries.

    order      ....................................................    n nodes
    coarse     [--][---][-][--][---][--][-][---][--][-][--][--][-]     intervals that end where few bytes cross
    fine       [------------]..........[------]..........[-------]     single nodes near each boundary, the rest in one

Contracting intervals of a topological order keeps the graph acyclic. This is one coarsening step of a multilevel method,
as in J. Herrmann et al. (2019), with an order in place of matchings. O(n + e) for each order and contraction, besides
the cuts of graphs of at most ``COARSE`` nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from pipecompile.passes.partitioners.clock import Clock
from pipecompile.passes.partitioners.contiguous import cheapest, fastest, line
from pipecompile.passes.partitioners.orders import orders
from pipecompile.passes.partitioners.problem import Answer, Problem, contract, time_cap

LARGE = 1500
"""Graphs of more nodes are cut this way."""
COARSE = 600
ROUNDS = 2
Stages = tuple[int, ...]


def cut_large(problem: Problem, inner: Callable[[Problem], Answer | None]) -> Answer | None:
    """A partition of a large graph, by a partitioner of small ones; only the bound of the time holds for the whole."""
    clock = Clock.of(problem.time_limit)
    stage, cap, order, groups = coarse_cut(problem)
    if stage is None:
        found = inner(replace(contract(problem, groups), time_limit=clock.left() / 2))
        if found is None:
            return None
        stage = tuple(found.stage[g] for g in groups)
        cap = time_cap(problem, Answer(stage, problem.least_time()))
    for left in range(ROUNDS, 0, -1):
        groups = around_boundaries(problem, stage, order)
        small = replace(contract(problem, groups), time_limit=max(clock.left() / left / 2, 0.5), cap=cap)
        found = inner(small)
        better = tuple(found.stage[g] for g in groups) if found else stage
        if problem.traffic(better) >= problem.traffic(stage) or not problem.valid(better, cap):
            break
        stage = better
    return Answer(stage, problem.least_time())


def coarse_cut(problem: Problem) -> tuple[Stages | None, float, list[int], list[int]]:
    """The best split of a few orders at places where few bytes cross: stages, time cap, the order, and its groups."""
    known = []
    for order in orders(problem, shuffles=0):
        groups = intervals(problem, order, COARSE)
        small = contract(problem, groups)
        on = line(small, list(range(small.nodes)))
        known.append((fastest(small, on), order, groups, small, on))
    (least, boundaries), order, groups, small, on = min(known, key=lambda one: one[0][0])
    if least == float("inf"):
        return None, least, order, groups
    cap = time_cap(small, Answer(on.stages_of(boundaries), problem.least_time()))
    splits = [(cheapest(small, on, cap), order, groups, on) for _, order, groups, small, on in known]
    (_, boundaries), order, groups, on = min(splits, key=lambda one: one[0][0])
    coarse = on.stages_of(boundaries)
    return tuple(coarse[g] for g in groups), cap, order, groups


def _crossing(problem: Problem, order: Sequence[int]) -> np.ndarray:
    """Bytes that cross after each position of an order."""
    position = np.empty(len(order), dtype=np.int64)
    position[list(order)] = np.arange(len(order))
    change = np.zeros(len(order) + 1)
    for source, targets, size in problem.tensors:
        where = [position[source], *(position[v] for v in targets)]
        change[min(where)] += size
        change[max(where)] -= size
    return change.cumsum()[:-1]


def intervals(problem: Problem, order: Sequence[int], count: int) -> list[int]:
    """Groups: about ``count`` intervals of an order of like load, the end of each moved to where the fewest bytes cross."""
    crossing = _crossing(problem, order)
    load = np.cumsum([problem.load[v] for v in order])
    goals = np.linspace(0, load[-1], count + 1)[1:]
    edges = np.unique(np.searchsorted(load, goals).clip(0, len(order) - 1))
    starts = np.concatenate(([0], edges[:-1] + 1))
    places = {int(start + crossing[start : end + 1].argmin()) for start, end in zip(starts, edges)}
    return _in_groups(problem, order, sorted(places | {len(order) - 1}))


def _in_groups(problem: Problem, order: Sequence[int], ends: Sequence[int]) -> list[int]:
    """The interval of each node, numbered in the order's direction."""
    number = np.searchsorted(np.array(ends), np.arange(len(order)))
    groups = [0] * problem.nodes
    for position, node in enumerate(order):
        groups[node] = int(number[position])
    return groups


def around_boundaries(problem: Problem, stage: Stages, order: list[int]) -> list[int]:
    """Groups: single nodes near each boundary of a partition, what is farther in its stage in one.

    ``order`` is sorted by stage in place, so that boundaries are places in it.
    """
    order.sort(key=stage.__getitem__)
    near = max(1, COARSE // (2 * max(1, problem.stages - 1)))
    sizes = np.bincount(stage, minlength=problem.stages)
    single = np.zeros(len(order), dtype=bool)
    for boundary in sizes.cumsum()[:-1]:
        single[max(0, boundary - near) : boundary + near] = True
    change = single.copy()
    change[:-1] |= single[1:]
    change[sizes.cumsum() - 1] = True
    return _in_groups(problem, order, np.flatnonzero(change).tolist())
