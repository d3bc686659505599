"""A partition that fits in memory by the program's own count, found or proved absent by a MILP with cutting planes.

What a rank holds at an instruction is a sum over what is there (``memory.Holdings``): activations by stage and messages
by pair of stages, each times a count that depends only on the order of the program. So it is linear in the columns of
``fit_model``.

1. Rows that hold for every partition: what is there at each computation, no message before it must be.
2. A partition is found under these rows, its program made, and its memory counted. If it does not fit, the rows of its
   program are added, for all partitions with the same ways between stages: they have the same program. From 2 again.

Each set of ways is met at most once; a partition that its own rows do not exclude is excluded by itself. Exponential in
the worst case, stopped by a time limit. A graph with many columns is made coarser first, intervals of its order in place
of nodes: what is found then fits all the same, but nothing is proved of what is not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from pipecompile.ir import CostGraph, Partition
from pipecompile.memory import Demand
from pipecompile.passes.partitioners import evaluate, pose
from pipecompile.passes.partitioners.clock import Clock
from pipecompile.passes.partitioners.fit_model import FitModel, Flows, Ways, ways_of
from pipecompile.passes.partitioners.large import intervals
from pipecompile.passes.partitioners.problem import ROUNDING

MOST = 10_000
"""Columns of a MILP that is made in less than a second, and that may be solved in some more."""

FEW = 1_500
"""Columns of one that most often is solved in seconds."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """What the ranks hold: at best, in the program of a partition, and the most there (its peak), all in bytes."""

    placement: tuple[int, ...]
    always: Callable[[], tuple[Demand, ...]]
    in_program: Callable[[Partition], tuple[Demand, ...]]
    peak: Callable[[Partition], int]
    state_factor: float
    besides: tuple[int, ...] = ()
    """Bytes that each takes beyond what is counted (empty: none); the peak has them."""
    near: float = 0.0
    """A share of the least memory that a partition may need more and still be the least."""


@dataclass(slots=True)
class Fitting:
    """The search for partitions of a graph that fit; what it has learned of the programs stays for the next question."""

    graph: CostGraph
    grains: tuple[Flows, ...]
    """Groups of the graph's nodes to cut: coarse ones, then single nodes, where there are not too many for the solver."""
    stages: int
    ranks: Ranks
    known: dict[Ways, tuple[Demand, ...]] = field(default_factory=dict)
    refused: list[tuple[int, ...]] = field(default_factory=list)
    """Partitions that are excluded by themselves."""
    fit: Partition | None = None
    """The last that was found to fit in what ``any`` was asked for."""
    lightest: Partition | None = None
    """The one with the least peak of those that were seen."""
    needed: float = math.inf
    """Its peak in bytes."""
    bound: int = 0
    """A proved lower bound of every partition's peak, in bytes."""

    @staticmethod
    def of(graph: CostGraph, stages: int, ranks: Ranks) -> Fitting:
        problem = pose(graph, stages, state_factor=ranks.state_factor)
        whole, count = Flows.of(graph, problem, range(problem.nodes)), problem.nodes
        coarse = whole
        while coarse.columns > FEW and count > 2 * stages:
            count = max(2 * stages, min(count - 1, int(count * FEW / coarse.columns)))
            coarse = Flows.of(graph, problem, intervals(problem, list(range(problem.nodes)), count))
        grains = tuple(flows for flows in dict.fromkeys((coarse, whole)) if flows.columns <= MOST)
        return Fitting(graph, grains, stages, ranks)

    def any(self, limit: int, seconds: float) -> Partition | None:
        """A partition that fits, if one is found; that there is none may be proved (``bound``)."""
        clock = Clock.of(seconds)
        for left, flows in zip(range(len(self.grains), 0, -1), self.grains):
            self.fit = self.fit or self._found(flows, limit, clock.left() / left, lambda model: None)
        return self.fit

    def least(self, seconds: float) -> None:
        """Find partitions that need less memory, and better bounds of the least (``needed`` and ``bound``)."""
        clock = Clock.of(seconds)
        for left, flows in zip(range(len(self.grains), 0, -1), self.grains):
            self._least(flows, clock.left() / left)

    def see(self, found: Partition) -> None:
        """Remember what a partition needs."""
        peak = self.ranks.peak(found)
        if peak < self.needed:
            self.needed, self.lightest = peak, found

    def better(self, start: Partition, limit: int, tolerance: float, seconds: float) -> Partition:
        """A partition that fits with a faster slowest stage, then with fewer bytes within the tolerance, if found."""

        def fast(model: FitModel) -> None:
            model.times(None)

        flows = self.grains[-1]
        found = self._found(flows, limit, seconds / 2, fast)
        quick = min((start, found or start), key=lambda one: one.bottleneck_ms)
        cap = (1 + tolerance) * quick.bottleneck_ms

        def small(model: FitModel) -> None:
            model.times(cap)
            model.bytes()

        found = self._found(flows, limit, seconds / 2, small)
        within = [one for one in (start, quick, found) if one and one.bottleneck_ms <= cap * (1 + ROUNDING)]
        return min(within, key=lambda one: one.bytes)

    def _least(self, flows: Flows, seconds: float) -> None:
        clock = Clock.of(seconds)
        near = self.ranks.near
        while clock.left() > 0 and self.needed > self.bound * (1 + near + ROUNDING) + 1:
            solved = self._model(flows, None).solve(clock.left(), gap=near / 2)
            if solved.status == "infeasible":  # every partition that could need less has been seen
                self._bound(flows, self.needed)
                break
            self._bound(flows, math.ceil(solved.bound * (1 - ROUNDING)))
            if solved.stage is None:
                break
            found = self._partition(flows, solved.stage)
            self._learn(found)
            if solved.status != "optimal":
                break

    def _found(self, flows: Flows, limit: int, seconds: float, aim: Callable[[FitModel], None]) -> Partition | None:
        clock = Clock.of(seconds)
        while clock.left() > 0:
            model = self._model(flows, limit)
            aim(model)
            solved = model.solve(clock.left())
            if solved.stage is None:
                if solved.status == "infeasible" and self.fit is None:
                    self._bound(flows, limit + 1)
                return None
            found = self._partition(flows, solved.stage)
            if self.ranks.peak(found) <= limit:
                return found
            self._learn(found)
        return None

    def _model(self, flows: Flows, limit: int | None) -> FitModel:
        model = FitModel(flows, self.ranks.placement, limit, self.ranks.besides)
        model.demand(self.ranks.always())
        for ways, demands in self.known.items():
            model.demand(demands, ways)
        for stage in self.refused:
            groups = dict(zip(flows.group, stage))
            if all(groups[g] == s for g, s in zip(flows.group, stage)):
                model.exclude([groups[g] for g in range(len(groups))])
        return model

    def _partition(self, flows: Flows, stage: tuple[int, ...]) -> Partition:
        whole = [stage[g] for g in flows.group]
        return evaluate(
            self.graph,
            whole,
            stages=self.stages,
            bound_ms=flows.problem.least_time() if flows.whole and not self.graph.staged else 0,
        )

    def _learn(self, found: Partition) -> None:
        """Exclude a partition that does not fit: by the rows of its program, or by itself where these are known."""
        self.see(found)
        ways = ways_of(found)
        if ways in self.known:
            self.refused.append(found.stage)
        else:
            self.known[ways] = self.ranks.in_program(found)

    def _bound(self, flows: Flows, peak: float) -> None:
        if flows.whole and math.isfinite(peak):
            self.bound = max(self.bound, int(min(peak, self.needed)))
