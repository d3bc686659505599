"""A partition that fits in memory by the program's own count, found or proved absent by a MILP with cutting planes.

What a rank holds at an instruction is a sum over what is there (``memory.Holdings``): activations by stage and messages
by pair of stages, each times a count that depends only on the order of the program. So it is linear in the columns of
``fit_model``.

1. Rows that hold for every partition: what is there at each computation, no message before it must be.
2. A partition is found under these rows, its program made, and its memory counted. If it does not fit, the rows of its
   program are added, for all partitions with the same ways between stages: they have the same program. From 2 again.

Each set of ways is met at most once; a partition that its own rows do not exclude is excluded by itself. Exponential in
the worst case, stopped by a time limit. A graph with too many columns is made coarser, intervals of its order in place
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
from pipecompile.passes.partitioners.problem import ROUNDING, Problem

MOST = 10_000
"""Columns of a MILP that is made in less than a second and solved in some more."""


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
    flows: Flows
    ranks: Ranks
    known: dict[Ways, tuple[Demand, ...]] = field(default_factory=dict)
    refused: list[tuple[int, ...]] = field(default_factory=list)
    """Stages of groups: partitions that are excluded by themselves."""
    fit: Partition | None = None
    """The last that was found to fit in what ``any`` was asked for."""
    needed: float = math.inf
    """The least peak in bytes of a partition that did not fit."""
    bound: int = 0
    """A proved lower bound of every partition's peak, in bytes."""

    @staticmethod
    def of(graph: CostGraph, stages: int, ranks: Ranks) -> Fitting:
        problem = pose(graph, stages, state_factor=ranks.state_factor)
        flows, count = Flows.of(graph, problem, range(problem.nodes)), problem.nodes
        while flows.columns > MOST and count > 2 * stages:
            count = max(2 * stages, min(count - 1, int(count * MOST / flows.columns)))
            flows = Flows.of(graph, problem, intervals(problem, list(range(problem.nodes)), count))
        return Fitting(graph, flows, ranks)

    @property
    def exact(self) -> bool:
        """Whether what is proved of the groups holds for the graph."""
        return self.flows.problem.nodes == len(self.graph.nodes)

    def any(self, limit: int, seconds: float) -> Partition | None:
        """A partition that fits, if one is found; that there is none may be proved (``bound``)."""
        self.fit = self.fit or self._found(limit, seconds, lambda model: None)
        return self.fit

    def least(self, seconds: float) -> None:
        """Find partitions that need less memory, and better bounds of the least (``needed`` and ``bound``)."""
        clock = Clock.of(seconds)
        while clock.left() > 0 and self.flows.columns <= MOST and self.needed > self.bound * (1 + ROUNDING) + 1:
            solved = self._model(None).solve(clock.left())
            if solved.status == "infeasible":  # every partition that could need less has been seen
                self._bound(self.needed)
                break
            self._bound(math.ceil(solved.bound * (1 - ROUNDING)))
            if solved.stage is None:
                break
            found = self._partition(solved.stage)
            self._learn(found, solved.stage, self.ranks.peak(found))
            if solved.status != "optimal":
                break

    def better(self, start: Partition, limit: int, tolerance: float, seconds: float) -> Partition:
        """A partition that fits with a faster slowest stage, then with fewer bytes within the tolerance, if found."""

        def fast(model: FitModel) -> None:
            model.times(None)

        found = self._found(limit, seconds / 2, fast)
        quick = min((start, found or start), key=lambda one: one.bottleneck_ms)
        cap = (1 + tolerance) * quick.bottleneck_ms

        def small(model: FitModel) -> None:
            model.times(cap)
            model.bytes()

        found = self._found(limit, seconds / 2, small)
        within = [one for one in (start, quick, found) if one and one.bottleneck_ms <= cap * (1 + ROUNDING)]
        return min(within, key=lambda one: one.bytes)

    def _found(self, limit: int, seconds: float, aim: Callable[[FitModel], None]) -> Partition | None:
        clock = Clock.of(seconds)
        while clock.left() > 0 and self.flows.columns <= MOST:
            model = self._model(limit)
            aim(model)
            solved = model.solve(clock.left())
            if solved.stage is None:
                if solved.status == "infeasible" and self.fit is None:
                    self._bound(limit + 1)
                return None
            found = self._partition(solved.stage)
            peak = self.ranks.peak(found)
            if peak <= limit:
                return found
            self._learn(found, solved.stage, peak)
        return None

    def _model(self, limit: int | None) -> FitModel:
        model = FitModel(self.flows, self.ranks.placement, limit)
        model.demand(self.ranks.always)
        for ways, demands in self.known.items():
            model.demand(demands, ways)
        for stage in self.refused:
            model.exclude(stage)
        return model

    def _partition(self, stage: tuple[int, ...]) -> Partition:
        problem: Problem = self.flows.problem
        return evaluate(self.graph, self.flows.stage_of(stage), stages=problem.stages, bound_ms=problem.least_time())

    def _learn(self, found: Partition, stage: tuple[int, ...], peak: int) -> None:
        """Exclude a partition that does not fit: by the rows of its program, or by itself where these are known."""
        self.needed = min(self.needed, peak)
        ways = ways_of(found)
        if ways in self.known:
            self.refused.append(stage)
        else:
            self.known[ways] = self.ranks.in_program(found)

    def _bound(self, peak: float) -> None:
        if self.exact and math.isfinite(peak):
            self.bound = max(self.bound, int(min(peak, self.needed)))
