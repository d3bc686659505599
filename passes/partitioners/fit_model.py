"""The MILP of a partition within the memory of ranks that hold activations and messages, each a number of times.

    x[v, s] = 1 if node v is in stage s         c[t, a, b] = 1 if tensor t goes from stage a to stage b

Rows may hold for every partition, or only for those that have the same ways between stages.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from pipecompile.ir import CostGraph, Partition, Routes
from pipecompile.memory import Column, Demand
from pipecompile.passes.partitioners.milp import ONE, SCALE, Model, Terms
from pipecompile.passes.partitioners.problem import Problem, contract

Ways = frozenset[tuple[int, int, bool]]
"""The pairs of stages between which values go, and whether gradients come back."""


def ways_of(partition: Partition) -> Ways:
    """Between which stages of a partition values go."""
    return frozenset((r.source, r.target, bool(r.gradients)) for r in Routes.of(partition).routes)


@dataclass(frozen=True, slots=True, eq=False)
class Flows:
    """A problem whose nodes are groups of a graph's, and what goes between them: (source, targets) to bytes both ways.

    For each stage ``saved`` and ``again`` are the bytes that each group saves there, and makes again in its backward;
    ``at_once`` says whether it does so for all of its groups at once.
    """

    problem: Problem
    group: tuple[int, ...]
    sizes: dict[tuple[int, tuple[int, ...]], tuple[int, int]]
    saved: tuple[tuple[int, ...], ...]
    again: tuple[tuple[int, ...], ...]
    at_once: tuple[bool, ...]

    @staticmethod
    def of(graph: CostGraph, problem: Problem, group: Sequence[int]) -> Flows:
        sizes: dict[tuple[int, tuple[int, ...]], tuple[int, int]] = {}
        for t in graph.tensors:
            source = group[t.source]
            targets = tuple(sorted({group[v] for v in t.targets} - {source}))
            if targets:
                size, back = sizes.get((source, targets), (0, 0))
                sizes[source, targets] = size + t.bytes, back + t.gradient_bytes
        stages = range(problem.stages)
        at_once = tuple(graph.mode_of(s) == "stage" for s in stages)
        saved = tuple(_by_group(group, [n.saved_bytes for n in graph.nodes_in(s)], True) for s in stages)
        again = tuple(_by_group(group, [n.recomputed_bytes for n in graph.nodes_in(s)], at_once[s]) for s in stages)
        return Flows(contract(problem, group), tuple(group), sizes, saved, again, at_once)

    @property
    def columns(self) -> int:
        """About how many columns the MILP has."""
        stages = self.problem.stages
        return self.problem.nodes * (stages - 1) + len(self.sizes) * stages * (stages - 1) // 2

    @property
    def whole(self) -> bool:
        """Whether every group is a single node, so that what is proved of the groups holds for the graph."""
        return self.problem.nodes == len(self.group)


def _by_group(group: Sequence[int], sizes: Sequence[int], summed: bool) -> tuple[int, ...]:
    """The sum or the largest of the sizes in each group."""
    found = [0] * (max(group) + 1)
    for g, size in zip(group, sizes):
        found[g] = found[g] + size if summed else max(found[g], size)
    return tuple(found)


class FitModel(Model):
    """The MILP of a partition with a column for each tensor and pair of stages that it may go between.

    Without a ``limit`` of bytes for each rank it minimises the most that a rank holds. ``besides`` are bytes that each rank
    holds in every partition.
    """

    def __init__(self, flows: Flows, placement: Sequence[int], limit: int | None, besides: Sequence[int] = ()) -> None:
        problem, last = flows.problem, flows.problem.stages - 1
        super().__init__(problem, [0] * problem.nodes, [last] * problem.nodes)
        self.limit = limit or 0
        self.unit = SCALE / max(limit or sum(size for size, _ in problem.weights) + max(map(sum, flows.saved)), 1)
        self.most = [] if limit is not None else [(self.column(1 / self.unit), -1.0)]
        self.flows = flows
        self.crossing: dict[tuple[int, int], list[tuple[int, int, int]]] = {
            (a, b): list(self._crossing(a, b)) for a in range(last + 1) for b in range(a + 1, last + 1)
        }
        self.exists: dict[tuple[int, int, bool], Terms] = {}
        self.largest: dict[int, Terms] = {}
        self.standing: list[Terms] = [[(ONE, float(size))] for size in besides or [0] * (max(placement) + 1)]
        for s, rank in enumerate(placement):
            for size, nodes in problem.weights:
                self.standing[rank] += self._any(nodes, s, size)

    def _crossing(self, a: int, b: int) -> Iterator[tuple[int, int, int]]:
        """Columns of the tensors that may go from stage a to stage b or back: (column, bytes, bytes of gradients)."""
        ordered = set(self.problem.edges)
        for (source, targets), (size, back) in self.flows.sizes.items():
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
            return [term for v, size in enumerate(self.flows.saved[a]) if size for term in self.x(v, a, size * count)]
        if what == "again":
            return [(one, factor * count) for one, factor in self._again(a)]
        pick = 1 if what == "forward" else 2
        return [(one[0], float(one[pick] * count)) for one in self.crossing[a, b] if one[pick]]

    def _again(self, stage: int) -> Terms:
        """The bytes that a stage makes again in a backward: of all its groups, or of the largest."""
        sizes = self.flows.again[stage]
        if self.flows.at_once[stage]:
            return [term for v, size in enumerate(sizes) if size for term in self.x(v, stage, float(size))]
        if stage not in self.largest:
            most = max(sizes)
            share = self.column(0.0)
            for v, size in enumerate(sizes):
                if size:
                    self.row([*self.x(v, stage, size / most), (share, -1.0)], 0.0)
            self.row([(share, 1.0)], 1.0)
            self.largest[stage] = [(share, float(most))]
        return self.largest[stage]

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
