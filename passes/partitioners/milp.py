"""The mixed-integer linear program (MILP) of a partition problem: columns, rows, and HiGHS to solve it.

    y[v, s] = 1  if node v is in stage s or before             x[v, s] = y[v, s] - y[v, s-1]
    y[v, s] ≤ y[v, s+1],   y[v, s] ≤ y[u, s] for an edge u → v
    Σ load · x[v, s] ≤ speed[s] · cap                          (or T, which is then minimised)
    z[t, j] ≥ x[d, j] + y[source, j-1] - 1  for each reader d  (bytes that stage j receives from before)
    z'[t, j] ≥ x[d, j] - y[source, j]                          (from after: gradients)

A node that cannot leave stages low … high has constants in place of the other y, so that a neighbourhood of a known
partition is a small program. Unequal links add one z for every step in cost on the way to a stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from pipecompile.passes.partitioners.problem import Problem

SCALE = 1000.0
"""Rows of time and memory are scaled to this: HiGHS's absolute tolerance of 1e-6 is then 1e-9 of the limit."""

Terms = list[tuple[int, float]]
ONE = -1
"""The column that stands for the constant 1."""


@dataclass(frozen=True, slots=True)
class Solved:
    """``status``: "optimal", "infeasible" or "limit". ``value`` and ``stage`` are absent where nothing was found."""

    status: str
    stage: tuple[int, ...] | None
    bound: float


class Model:
    """Columns and rows of a problem whose node v may be in stages ``low[v]`` to ``high[v]``."""

    def __init__(self, problem: Problem, low: Sequence[int], high: Sequence[int]) -> None:
        self.problem, self.low, self.high = problem, low, high
        self.objective: list[float] = []
        self.first = []  # the column of y[v, low[v]]
        for v in range(problem.nodes):
            self.first.append(len(self.objective))
            self.objective += [0.0] * (high[v] - low[v])
        self.binaries = len(self.objective)
        self.fixed_cost = 0.0
        self.entries: tuple[list[int], list[int], list[float]] = ([], [], [])
        self.above: list[float] = []
        self._order()
        self._filled()

    def column(self, cost: float) -> int:
        """A new continuous column from 0 upwards."""
        self.objective.append(cost)
        return len(self.objective) - 1

    def row(self, terms: Terms, most: float) -> None:
        """A row Σ coefficient · column ≤ most; rows without a column are dropped."""
        if all(column == ONE for column, _ in terms):
            return
        rows, columns, values = self.entries
        for column, value in terms:
            if column == ONE:
                most -= value
            else:
                rows.append(len(self.above))
                columns.append(column)
                values.append(value)
        self.above.append(most)

    def y(self, v: int, s: int, factor: float) -> Terms:
        """``factor · y[v, s]``."""
        if s < self.low[v]:
            return []
        return [(ONE if s >= self.high[v] else self.first[v] + s - self.low[v], factor)]

    def x(self, v: int, s: int, factor: float) -> Terms:
        """``factor`` if node v is in stage s."""
        if not self.low[v] <= s <= self.high[v]:
            return []
        return self.y(v, s, factor) + self.y(v, s - 1, -factor)

    def _order(self) -> None:
        for v, (low, high) in enumerate(zip(self.low, self.high)):
            for s in range(low, high - 1):
                self.row(self.y(v, s, 1.0) + self.y(v, s + 1, -1.0), 0.0)
        for u, v in self.problem.edges:
            for s in range(self.low[v], self.high[u]):
                self.row(self.y(v, s, 1.0) + self.y(u, s, -1.0), 0.0)

    def _filled(self) -> None:
        for s in range(self.problem.stages):
            terms = [term for v in range(self.problem.nodes) for term in self.x(v, s, -1.0)]
            self.row(terms, -1.0)

    def memory(self, excess: bool = False) -> None:
        """Limit every rank's memory, or (with ``excess``) minimise the most bytes that any rank is over its limit."""
        limits = self.problem.limits
        if limits is None:
            return
        unit = SCALE / max(*limits.memory, 1)
        rows: list[Terms] = [[] for _ in limits.memory]
        for s, rank in enumerate(limits.rank):
            for v, saved in enumerate(self.problem.saved):
                rows[rank] += self.x(v, s, saved * limits.in_flight[s] * unit) if saved else []
            for size, nodes in self.problem.weights:
                rows[rank] += self._any(nodes, s, size * unit)
        over = [(self.column(1 / unit), -1.0)] if excess else []
        for terms, limit in zip(rows, limits.memory):
            self.row(terms + over, limit * unit)

    def _any(self, nodes: Sequence[int], s: int, factor: float) -> Terms:
        """``factor`` if any of the nodes is in stage s."""
        here = [v for v in nodes if self.low[v] <= s <= self.high[v]]
        if len(here) < 2:
            return self.x(here[0], s, factor) if here else []
        column = self.column(0.0)
        for v in here:
            self.row(self.x(v, s, 1.0) + [(column, -1.0)], 0.0)
        return [(column, factor)]

    def times(self, cap: float | None) -> None:
        """Limit every stage's time, or (without a cap) minimise the slowest."""
        problem = self.problem
        unit = SCALE / (cap or problem.least_time() or 1.0)
        slowest = self.column(1.0 / unit) if cap is None else ONE
        for s, speed in enumerate(problem.speeds):
            terms = [term for v, load in enumerate(problem.load) if load for term in self.x(v, s, load / speed * unit)]
            self.row(terms + [(slowest, -1.0 if cap is None else -SCALE)], 0.0)

    def traffic(self) -> None:
        """Minimise the bytes that cross, each times what its link costs."""
        ordered = set(self.problem.edges)
        for source, targets, size in self.problem.tensors:
            down = [d for d in targets if (d, source) not in ordered]
            up = [d for d in targets if (source, d) not in ordered]
            for j in range(self.problem.stages):
                if down and j > self.low[source]:
                    self._from_before(source, down, j, size)
                if up and j < self.high[source]:
                    self._from_after(source, up, j, size)

    def _from_before(self, source: int, readers: list[int], j: int, size: int) -> None:
        link = self.problem.link
        here = [d for d in readers if self.low[d] <= j <= self.high[d]]
        for i in range(self.low[source], j):
            step = link(i, j) - link(i + 1, j)
            if here and step:
                terms = [self.x(d, j, 1.0) + self.y(source, i, 1.0) + [(ONE, -1.0)] for d in here]
                self._pay(terms, size * step)

    def _from_after(self, source: int, readers: list[int], j: int, size: int) -> None:
        link = self.problem.link
        here = [d for d in readers if self.low[d] <= j <= self.high[d]]
        for i in range(j + 1, self.high[source] + 1):
            step = link(j, i) - link(j, i - 1)
            if here and step:
                self._pay([self.x(d, j, 1.0) + self.y(source, i - 1, -1.0) for d in here], size * step)

    def _pay(self, alternatives: list[Terms], cost: float) -> None:
        """Pay ``cost`` if any of the 0-1 terms is 1."""
        if any(all(column == ONE for column, _ in terms) and sum(f for _, f in terms) > 0 for terms in alternatives):
            self.fixed_cost += cost
            return
        column = self.column(cost)
        for terms in alternatives:
            self.row(terms + [(column, -1.0)], 0.0)

    def solve(self, seconds: float, below: float | None = None, gap: float = 0.0) -> Solved:
        """Minimise; ``below`` asks for a better objective than a known one ("infeasible" then proves the known one)."""
        scale = SCALE / max(max(self.objective, default=0.0), 1e-300)
        if below is not None:
            paid = [(column, cost * scale) for column, cost in enumerate(self.objective) if cost]
            self.row(paid, (below - self.fixed_cost) * scale)
        count = len(self.objective)
        if not count:
            return Solved("optimal", tuple(self.low), self.fixed_cost)
        rows, columns, values = self.entries
        matrix = coo_array((values, (rows, columns)), shape=(len(self.above), count)).tocsr()
        whole = np.zeros(count)
        whole[: self.binaries] = 1
        upper = np.where(whole, 1.0, np.inf)
        found = milp(
            np.array(self.objective) * scale,
            constraints=LinearConstraint(matrix, -np.inf, self.above),
            integrality=whole,
            bounds=Bounds(0.0, upper),
            options={"time_limit": max(seconds, 0.1), "mip_rel_gap": gap},
        )
        bound = found.mip_dual_bound
        status = {0: "optimal", 2: "infeasible"}.get(found.status, "limit")
        stage = None if found.x is None else self._stage(found.x)
        proved = self.fixed_cost + bound / scale if bound is not None and np.isfinite(bound) else 0.0
        return Solved(status, stage, proved)

    def _stage(self, solution: np.ndarray) -> tuple[int, ...]:
        stage = []
        for v, first in enumerate(self.first):
            size = self.high[v] - self.low[v]
            stage.append(self.high[v] - int(np.rint(solution[first : first + size]).sum()))
        return tuple(stage)
