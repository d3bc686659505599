"""Which stages a node can be in at all, given a time limit: most nodes of a deep graph turn out to have one or two.

Everything that leads to a node must fit in the stages up to its own, and everything that it leads to in the stages
from its own on. O(n · e / 64) for the sets of ancestors; beyond ``MOST`` nodes every stage stays open.
"""

from __future__ import annotations

import numpy as np

from pipecompile.passes.partitioners.problem import ROUNDING, Problem

MOST = 8000
Windows = tuple[list[int], list[int]]


def windows(problem: Problem, cap: float) -> Windows:
    """The first and the last possible stage of each node where no stage takes longer than ``cap``."""
    count, last = problem.nodes, problem.stages - 1
    if count > MOST or not np.isfinite(cap):
        return [0] * count, [last] * count
    reached = np.eye(count, dtype=bool)
    for u, v in sorted(problem.edges, key=lambda edge: edge[1]):
        reached[v] |= reached[u]
    load, speeds = np.array(problem.load), np.array(problem.speeds)
    room_before = np.cumsum(speeds) * cap * (1 + ROUNDING)
    room_after = np.cumsum(speeds[::-1]) * cap * (1 + ROUNDING)
    low = np.minimum(np.searchsorted(room_before, reached @ load), last)
    high = np.maximum(last - np.searchsorted(room_after, reached.T @ load), 0)
    return low.tolist(), high.tolist()


def least_possible(problem: Problem, known: float) -> float:
    """A lower bound of the slowest stage's time, up to the time ``known`` to be possible, by bisection.

    A time is refuted if some node has no stage left, or some range of stages less room than the nodes bound to it need.
    """
    low, high = problem.least_time(), known
    for _ in range(20 if problem.nodes <= MOST else 0):
        middle = (low + high) / 2
        low, high = (low, middle) if _possible(problem, middle) else (middle, high)
        if high - low < 1e-5 * high:
            break
    return min(low, known)


def _possible(problem: Problem, cap: float) -> bool:
    low, high = windows(problem, cap)
    bound = np.zeros((problem.stages, problem.stages))
    for v, (first, last) in enumerate(zip(low, high)):
        if first > last:
            return False
        bound[first, last] += problem.load[v]
    need = bound[::-1].cumsum(axis=0)[::-1].cumsum(axis=1)
    room = np.concatenate(([0.0], np.cumsum(problem.speeds))) * cap * (1 + ROUNDING)
    return all(need[i, j] <= room[j + 1] - room[i] for i in range(problem.stages) for j in range(i, problem.stages))


def within(both: Windows, stage: tuple[int, ...], first: int, last: int) -> Windows:
    """The neighbourhood of a partition in which only the nodes of stages ``first`` to ``last`` may move, among these."""
    low, high = list(stage), list(stage)
    for v, s in enumerate(stage):
        if first <= s <= last:
            low[v], high[v] = max(both[0][v], first), min(both[1][v], last)
    return low, high
