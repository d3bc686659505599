"""The best split of a topological order into contiguous stages, by dynamic programming over the stage boundaries.

    order   a b c | d e | f g h          stage (i, j] holds positions i+1 … j;   boundaries 0, 3, 5, 8

What a stage receives depends on its own nodes alone (a tensor pays where it is read, if it is not made there), so bytes
add up over stages and the best boundary i before j needs only the table ``received[i, j]``. For one order: the table is
filled as rectangles by a two-dimensional prefix sum in O(n² + tensors), the recursion is O(S · n²), both in numpy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipecompile.passes.partitioners import partitioner
from pipecompile.passes.partitioners.orders import orders
from pipecompile.passes.partitioners.problem import ROUNDING, Answer, Problem

Table = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Line:
    """An order with its tables: prefix sums of load and saved bytes, and for each (i, j] bytes received and held."""

    order: list[int]
    load: Table
    saved: Table
    received: Table
    held: Table

    def stages_of(self, boundaries: Sequence[int]) -> tuple[int, ...]:
        """The stage map that boundaries (one past the last position of each stage) give."""
        stage = [0] * len(self.order)
        start = 0
        for s, end in enumerate(boundaries):
            for node in self.order[start:end]:
                stage[node] = s
            start = end
        return tuple(stage)


def _touching(size: int, where: list[int], corners: Table) -> None:
    """Add ``size`` for every (i, j] that holds at least one of the positions ``where`` (ascending, from 1)."""
    previous = 0
    for p in where:
        corners[previous, p] += size
        corners[p, p] -= size
        previous = p


def line(problem: Problem, order: list[int]) -> Line:
    """The tables of an order."""
    count = problem.nodes
    position = [0] * count
    for p, node in enumerate(order):
        position[node] = p + 1
    received = np.zeros((count + 2, count + 1))
    for source, targets, size in problem.tensors:
        at = position[source]
        where = sorted(position[v] for v in targets)
        _touching(size, where, received)
        before = max((p for p in where if p < at), default=0)
        after = min((p for p in where if p > at), default=0)
        if before:  # made and read inside: (i, j] with i < before and j ≥ at
            received[0, at] -= size
            received[before, at] += size
        if after:
            received[0, after] -= size
            received[at, after] += size
        if before and after:
            received[0, after] += size
            received[before, after] -= size
    held = np.zeros((count + 2, count + 1) if problem.limits else (0, 0))
    if problem.limits:
        for size, nodes in problem.weights:
            _touching(size, sorted(position[v] for v in nodes), held)
    return Line(
        order,
        np.concatenate(([0.0], np.cumsum([problem.load[v] for v in order]))),
        np.concatenate(([0.0], np.cumsum([float(problem.saved[v]) for v in order]))),
        received.cumsum(axis=0).cumsum(axis=1)[: count + 1],
        held.cumsum(axis=0).cumsum(axis=1)[: count + 1],
    )


def _stage_times(problem: Problem, on: Line, s: int) -> Table:
    """The time of (i, j] as stage s; infinite where it is empty or too large for its share of the rank's memory."""
    took = (on.load[None, :] - on.load[:, None]) / problem.speeds[s]
    took[np.tri(problem.nodes + 1, dtype=bool)] = np.inf
    if problem.limits:
        rank = problem.limits.rank[s]
        room = problem.limits.memory[rank] / problem.limits.rank.count(rank)
        held = on.held + problem.limits.in_flight[s] * (on.saved[None, :] - on.saved[:, None])
        took[held > room] = np.inf
    return took


def _kind(problem: Problem, s: int) -> tuple[float, ...]:
    """What tells one stage's table from another's."""
    limits = problem.limits
    return (problem.speeds[s], *((limits.rank[s], limits.in_flight[s]) if limits else ()))


def _back(choices: list[npt.NDArray[np.int64]], end: int) -> list[int]:
    boundaries = [end]
    for choice in reversed(choices[1:]):
        boundaries.append(int(choice[boundaries[-1]]))
    return boundaries[::-1]


def fastest(problem: Problem, on: Line) -> tuple[float, list[int]]:
    """The least time of the slowest stage over all splits of the order, and its boundaries; infinite if none fits."""
    best = np.where(np.arange(problem.nodes + 1) == 0, 0.0, np.inf)
    choices = []
    kind: tuple[float, ...] = ()
    for s in range(problem.stages):
        if kind != _kind(problem, s):
            kind, took = _kind(problem, s), _stage_times(problem, on, s)
        through = np.maximum(best[:, None], took)
        choices.append(through.argmin(axis=0))
        best = through.min(axis=0)
    return float(best[-1]), _back(choices, problem.nodes)


def cheapest(problem: Problem, on: Line, cap: float) -> tuple[float, list[int]]:
    """The least bytes over all splits of the order whose stages take at most ``cap``, and the boundaries."""
    best = np.where(np.arange(problem.nodes + 1) == 0, 0.0, np.inf)
    choices = []
    kind: tuple[float, ...] = ()
    for s in range(problem.stages):
        into = problem.links[s - 1] if s else 1.0
        if kind != (into, *_kind(problem, s)):
            kind = (into, *_kind(problem, s))
            cost = np.where(_stage_times(problem, on, s) > cap * (1 + ROUNDING), np.inf, into * on.received)
        through = best[:, None] + cost
        choices.append(through.argmin(axis=0))
        best = through.min(axis=0)
    return float(best[-1]), _back(choices, problem.nodes)


@partitioner("contiguous")
def contiguous(problem: Problem) -> Answer | None:
    """The best contiguous split over a handful of topological orders."""
    lines = [line(problem, order) for order in orders(problem)]
    least = min(fastest(problem, on)[0] for on in lines)
    if least == np.inf:
        return None
    cap = max(least, min((1 + problem.tolerance) * least, problem.cap))
    found = []
    for on in lines:
        cost, boundaries = cheapest(problem, on, cap)
        if cost < np.inf:
            stage = on.stages_of(boundaries)
            found.append((problem.traffic(stage), max(problem.times(stage)), stage))
    return Answer(min(found)[2], bound_ms=problem.least_time())
