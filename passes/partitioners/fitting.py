"""A partition that fits in memory by the program's own count, found or proved absent by a MILP with cutting planes.

What a rank holds at an instruction is a sum over what is there (``memory.Holdings``): activations by stage and messages
by pair of stages, each times a count that depends only on the order of the program. So it is linear in

    x[v, s] = 1 if node v is in stage s         c[t, a, b] = 1 if tensor t goes from stage a to stage b

1. Rows that hold for every partition: what is there at each computation, no message before it must be.
2. A partition is found under these rows, its program made, and its memory counted. If it does not fit, the rows of its
   program are added, for all partitions with the same ways between stages: they have the same program. From 2 again.

Each set of ways is met at most once; a partition that its own rows do not exclude is excluded by itself. Exponential in
the worst case, stopped by a time limit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from pipecompile.ir import CostGraph, Partition, Routes
from pipecompile.memory import Column, Demand
from pipecompile.passes.partitioners import evaluate, pose
from pipecompile.passes.partitioners.clock import Clock
from pipecompile.passes.partitioners.milp import ONE, SCALE, Model, Terms
from pipecompile.passes.partitioners.problem import ROUNDING, Problem

Ways = frozenset[tuple[int, int, bool]]
"""The pairs of stages between which values go, and whether gradients come back."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """What the ranks hold: at best, in the program of a partition, and the most there (its peak), all in bytes."""

    placement: tuple[int, ...]
    always: tuple[Demand, ...]
    in_program: Callable[[Partition], tuple[Demand, ...]]
    peak: Callable[[Partition], int]
    state_factor: float


@dataclass(slots=True)
class Fitting:
    """The search for partitions of a graph that fit; what it has learned of the programs stays for the next question."""

    graph: CostGraph
    problem: Problem
    ranks: Ranks
    known: dict[Ways, tuple[Demand, ...]] = field(default_factory=dict)
    refused: list[tuple[int, ...]] = field(default_factory=list)
    """Partitions that are excluded by themselves."""
    lowest: float = math.inf
    """The least peak of a partition that did not fit."""

    @staticmethod
    def of(graph: CostGraph, stages: int, ranks: Ranks, tolerance: float) -> Fitting:
        problem = pose(graph, stages, tolerance=tolerance, state_factor=ranks.state_factor)
        return Fitting(graph, problem, ranks)

    def any(self, limit: int, seconds: float) -> tuple[Partition | None, bool]:
        """A partition that fits, if one is found, and whether the answer is proved."""
        return self._found(limit, seconds, lambda model: None)

    def least(self, seconds: float) -> tuple[float, float]:
        """The least memory for each rank that a partition was found for, and a proved lower bound of it."""
        clock, bound = Clock.of(seconds), 0
        while clock.left() > 0:
            solved = self._model(None).solve(clock.left())
            if solved.status == "infeasible":  # every partition that could need less has been seen
                return self.lowest, self.lowest
            bound = max(bound, math.ceil(solved.bound * (1 - ROUNDING)))
            if solved.stage is None:
                break
            found = self._partition(solved.stage)
            self._learn(found, self.ranks.peak(found))
            if solved.status != "optimal" or self.lowest <= bound * (1 + ROUNDING) + 1:
                break
        return self.lowest, min(bound, self.lowest)

    def better(self, start: Partition, limit: int, seconds: float) -> Partition:
        """A partition that fits with a faster slowest stage, then with fewer bytes within the tolerance, if found."""

        def fast(model: FitModel) -> None:
            model.times(None)

        found, _ = self._found(limit, seconds / 2, fast)
        quick = min((start, found or start), key=lambda one: one.bottleneck_ms)
        cap = (1 + self.problem.tolerance) * quick.bottleneck_ms

        def small(model: FitModel) -> None:
            model.times(cap)
            model.bytes()

        found, _ = self._found(limit, seconds / 2, small)
        within = [one for one in (start, quick, found) if one and one.bottleneck_ms <= cap * (1 + ROUNDING)]
        return min(within, key=lambda one: one.bytes)

    def _found(self, limit: int, seconds: float, aim: Callable[[FitModel], None]) -> tuple[Partition | None, bool]:
        clock = Clock.of(seconds)
        while clock.left() > 0:
            model = self._model(limit)
            aim(model)
            solved = model.solve(clock.left())
            if solved.stage is None:
                return None, solved.status == "infeasible"
            found = self._partition(solved.stage)
            peak = self.ranks.peak(found)
            if peak <= limit:
                return found, True
            self._learn(found, peak)
        return None, False

    def _model(self, limit: int | None) -> FitModel:
        model = FitModel(self.graph, self.problem, self.ranks.placement, limit)
        model.demand(self.ranks.always)
        for ways, demands in self.known.items():
            model.demand(demands, ways)
        for stage in self.refused:
            model.exclude(stage)
        return model

    def _partition(self, stage: Sequence[int]) -> Partition:
        return evaluate(self.graph, stage, stages=self.problem.stages, bound_ms=self.problem.least_time())

    def _learn(self, found: Partition, peak: int) -> None:
        """Exclude a partition that does not fit: by the rows of its program, or by itself where these are known."""
        self.lowest = min(self.lowest, peak)
        ways = ways_of(found)
        if ways in self.known:
            self.refused.append(found.stage)
        else:
            self.known[ways] = self.ranks.in_program(found)


def ways_of(partition: Partition) -> Ways:
    """Between which stages of a partition values go."""
    return frozenset((r.source, r.target, bool(r.gradients)) for r in Routes.of(partition).routes)


class FitModel(Model):
    """The MILP of a partition with a column for each tensor and pair of stages that it may go between.

    Without a ``limit`` of bytes for each rank it minimises the most that a rank holds.
    """

    def __init__(self, graph: CostGraph, problem: Problem, placement: Sequence[int], limit: int | None) -> None:
        last = problem.stages - 1
        super().__init__(problem, [0] * problem.nodes, [last] * problem.nodes)
        self.limit = limit or 0
        self.unit = SCALE / max(limit or sum(size for size, _ in problem.weights) + sum(problem.saved), 1)
        self.most = [] if limit is not None else [(self.column(1 / self.unit), -1.0)]
        self.sizes: dict[tuple[int, tuple[int, ...]], tuple[int, int]] = {}
        for t in graph.tensors:
            targets = tuple(sorted(set(t.targets) - {t.source}))
            if targets:
                size, back = self.sizes.get((t.source, targets), (0, 0))
                self.sizes[t.source, targets] = size + t.bytes, back + t.gradient_bytes
        self.crossing: dict[tuple[int, int], list[tuple[int, int, int]]] = {
            (a, b): list(self._crossing(a, b)) for a in range(last + 1) for b in range(a + 1, last + 1)
        }
        self.exists: dict[tuple[int, int, bool], Terms] = {}
        self.standing: list[Terms] = [[] for _ in range(max(placement) + 1)]
        for s, rank in enumerate(placement):
            for size, nodes in problem.weights:
                self.standing[rank] += self._any(nodes, s, size)

    def _crossing(self, a: int, b: int) -> Iterator[tuple[int, int, int]]:
        """Columns of the tensors that may go from stage a to stage b or back: (column, bytes, bytes of gradients)."""
        ordered = set(self.problem.edges)
        for (source, targets), (size, back) in self.sizes.items():
            down = [d for d in targets if (d, source) not in ordered]
            up = [d for d in targets if (source, d) not in ordered]
            if down:
                yield self._goes(source, down, a, b), size, back
            if up:
                yield self._goes(source, up, b, a), back, size

    def _goes(self, source: int, targets: Sequence[int], here: int, there: int) -> int:
        """A column that is 1 if the source is in one stage and one of the targets in the other, else 0."""
        column = self.column(0.0)
        for d in targets:
            self.row(self.x(source, here, 1.0) + self.x(d, there, 1.0) + [(ONE, -1.0), (column, -1.0)], 0.0)
        self.row([(column, 1.0), *self.x(source, here, -1.0)], 0.0)
        self.row([(column, 1.0), *(term for d in targets for term in self.x(d, there, -1.0))], 0.0)
        return column

    def bytes(self) -> None:
        """Minimise the bytes that cross."""
        for columns in self.crossing.values():
            for column, size, back in columns:
                self.objective[column] = float(size + back)

    def demand(self, demands: Iterable[Demand], ways: Ways | None = None) -> None:
        """Limit (or minimise) what the demands come to; with ``ways``, only where a partition has exactly these."""
        for one in demands:
            terms = self.standing[one.rank] + [term for column, count in one.held for term in self._held(column, count)]
            terms = [(column, factor * self.unit) for column, factor in terms]
            if ways is not None:
                terms += self._otherwise(ways, sum(factor for _, factor in terms if factor > 0))
            self.row(terms + self.most, self.limit * self.unit)

    def _held(self, column: Column, count: int) -> Terms:
        what, a, b = column
        if what == "saved":
            return [term for v, size in enumerate(self.problem.saved) if size for term in self.x(v, a, size * count)]
        pick = 1 if what == "forward" else 2
        return [(one[0], float(one[pick] * count)) for one in self.crossing[a, b] if one[pick]]

    def _otherwise(self, ways: Ways, large: float) -> Terms:
        """Terms of at most ``-large`` unless the ways of the partition are these."""
        terms: Terms = []
        pairs = {(a, b) for a, b, _ in ways}
        returns = {(a, b) for a, b, gradients in ways if gradients}
        for a, b in self.crossing:
            for gradients, present in ((False, (a, b) in pairs), (True, (a, b) in returns)):
                there = self._exists(a, b, gradients)
                sign = large if present else -large
                terms += [(column, sign * factor) for column, factor in there]
                terms += [(ONE, -large)] if present else []
        return terms

    def _exists(self, a: int, b: int, gradients: bool) -> Terms:
        """1 if any value goes from stage a to stage b (any gradient comes back), else 0."""
        key = (a, b, gradients)
        if key not in self.exists:
            columns = [column for column, _, back in self.crossing[a, b] if back or not gradients]
            whole = self.column(0.0)
            for column in columns:
                self.row([(column, 1.0), (whole, -1.0)], 0.0)
            self.row([(whole, 1.0), *((column, -1.0) for column in columns)], 0.0)
            self.row([(whole, 1.0)], 1.0)
            self.exists[key] = [(whole, 1.0)]
        return self.exists[key]

    def exclude(self, stage: Sequence[int]) -> None:
        """Exclude one stage map."""
        self.row([term for v, s in enumerate(stage) for term in self.x(v, s, 1.0)], len(stage) - 1.0)
