"""Nested minimum cuts, found together: many families of closed sets, a dynamic program over them, and cutting again.

    closed sets  C1 ⊂ C2 ⊂ … ⊂ C7       stage s = C(s+1) \\ C(s)

    1. families: boundaries of the best splits of many topological orders, and of recursive minimum cuts of the graph
    2. every boundary is cut again by minimum cuts between its fixed neighbours, then single nodes are moved
    3. families are joined: nodes ordered by how many of the closed sets leave them out. That is a topological order in
       which every nested choice of the sets is a split, so one dynamic program picks the best of them all together
    4. from 2 again, until nothing gets better or the time is over. No solver is used

Graphs so narrow that all their closed sets can be listed are solved by that alone (see ``closed_sets``). One round costs
S flows (see ``cuts``) and O(S · n²) for the dynamic program. How much is tried depends on the size of the graph, not on
the clock, so that the answer is the same on every machine unless the time limit is met.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pipecompile.passes.partitioners import partitioner
from pipecompile.passes.partitioners.clock import Clock
from pipecompile.passes.partitioners.closed_sets import optimum
from pipecompile.passes.partitioners.contiguous import Line, cheapest, fastest, line
from pipecompile.passes.partitioners.cuts import Network, balanced_cut, cut_network
from pipecompile.passes.partitioners.moves import descend, even_out
from pipecompile.passes.partitioners.orders import orders
from pipecompile.passes.partitioners.problem import ROUNDING, Answer, Problem, time_cap
from pipecompile.passes.partitioners.windows import Windows, least_possible, windows

NEAR = 1.1
"""A cut this little worse than the one it replaces is given to the moves."""
Stages = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Effort:
    """How many families are kept and joined, and how many rounds that find nothing end the search."""

    families: int
    idle: int


THOROUGH = Effort(6, 6)
BRIEF = Effort(2, 1)
"""Enough for a solver to go on from."""


@partitioner("mincut")
def mincut(problem: Problem) -> Answer | None:
    """The best nested family of minimum cuts that was found, without a solver."""
    known = optimum(problem)
    if known is not None:
        return known
    clock = Clock.of(problem.time_limit)
    lines = lines_of(problem)
    quick = quickest(problem, lines)
    if quick is None:
        return None
    cap = time_cap(problem, quick)
    return Answer(few_bytes(problem, lines, cap, windows(problem, cap), quick.stage, clock, THOROUGH), quick.bound_ms)


def lines_of(problem: Problem) -> list[Line]:
    """Topological orders with their tables: more of them for smaller graphs."""
    shuffles = min(32, max(2, 20_000_000 // (problem.stages * problem.nodes**2)))
    return [line(problem, order) for order in orders(problem, shuffles)]


def few_bytes(
    problem: Problem,
    lines: Sequence[Line],
    cap: float,
    open_windows: Windows,
    fallback: Stages,
    clock: Clock,
    effort: Effort,
) -> Stages:
    """The fewest bytes found under a time cap, no more than the fallback's."""
    return Search(problem, cap, open_windows, random.Random(0), clock, effort).run(lines, fallback)


def quickest(problem: Problem, lines: Sequence[Line]) -> Answer | None:
    """The least time found: the best splits of the orders, made more even by moves; and a bound of it."""
    splits = []
    for on in lines:
        least, boundaries = fastest(problem, on)
        if least < float("inf"):
            splits.append((least, on.stages_of(boundaries)))
    if not splits:
        return None
    moved = [even_out(problem, stage) for _, stage in sorted(splits)[: THOROUGH.families]]
    best = min(moved, key=lambda stage: max(problem.times(stage)))
    return Answer(best, least_possible(problem, max(problem.times(best))))


@dataclass(frozen=True, slots=True)
class Search:
    """The search for few bytes under a time cap."""

    problem: Problem
    cap: float
    windows: Windows
    generator: random.Random
    clock: Clock
    effort: Effort

    def run(self, lines: Sequence[Line], fallback: Stages) -> Stages:
        """Steps 1 to 4."""
        pool: dict[Stages, float] = {fallback: self.problem.traffic(fallback)}
        for stage in self.families(lines):
            better = self.improve(stage)
            pool[better] = self.problem.traffic(better)
        idle = 0
        while idle < self.effort.idle and len(pool) > 1 and self.clock.left() > 0:
            pool = dict(sorted(pool.items(), key=lambda one: one[1])[: self.effort.families])
            joined = self.join(list(pool))
            idle = idle + 1 if joined in pool or self.problem.traffic(joined) >= min(pool.values()) else 0
            pool[joined] = self.problem.traffic(joined)
        return min(pool, key=pool.__getitem__)

    def families(self, lines: Sequence[Line]) -> Iterator[Stages]:
        """The best splits of the orders, as many again from recursive cuts."""
        splits: dict[Stages, float] = {}
        for on in lines:
            cost, boundaries = cheapest(self.problem, on, self.cap)
            if cost < float("inf"):
                splits[on.stages_of(boundaries)] = cost
        yield from sorted(splits, key=splits.__getitem__)[: self.effort.families]
        for _ in range(self.effort.families):
            order = sorted(range(self.problem.nodes), key=self.nested().__getitem__)
            on = line(self.problem, order)
            cost, boundaries = cheapest(self.problem, on, self.cap)
            if cost < float("inf"):
                yield on.stages_of(boundaries)

    def nested(self) -> Stages:
        """Closed sets by recursive bisection of the range of stages, each a balanced minimum cut inside the last."""
        stage = (0,) * self.problem.nodes
        ranges = [(0, self.problem.stages)]
        while ranges:
            first, last = ranges.pop()
            if last - first > 1:
                middle = self.generator.randint(first + 1, last - 1)
                stage = self.cut(stage, first, middle, last) or stage
                ranges += [(first, middle), (middle, last)]
        return stage

    def cut(self, stage: Stages, first: int, second: int, end: int) -> Stages | None:
        """The nodes of stages ``first`` and ``second`` divided anew; they stand for all up to the next and ``end``."""
        problem, (low, high) = self.problem, self.windows
        both = [v for v, s in enumerate(stage) if s in (first, second)]
        inside, outside = {v for v in both if high[v] < second}, {v for v in both if low[v] >= second}
        network = Network(cut_network(problem, stage, first, second, inside, outside))
        fixed, free = sum(problem.load[v] for v in inside), sum(problem.load[v] for v in network.members)
        most = self.cap * sum(problem.speeds[first:second]) - fixed
        least = free + sum(problem.load[v] for v in outside) - self.cap * sum(problem.speeds[second:end])
        found = balanced_cut(network, problem.load, least, most, self.generator)
        if found is None:
            return None
        divided = list(stage)
        for v in both:
            divided[v] = first if v in found or v in inside else second
        return tuple(divided)

    def improve(self, stage: Stages) -> Stages:
        """Cut every boundary again between its fixed neighbours, and move single nodes, while that helps."""
        problem = self.problem
        cost = problem.traffic(stage)
        waiting = set(range(problem.stages - 1))
        while waiting and self.clock.left() > 0:
            k = min(waiting)
            waiting.remove(k)
            again = self.cut(stage, k, k + 1, k + 2)
            if again is None:
                continue
            if problem.valid(again, self.cap) and problem.traffic(again) < NEAR * cost:
                again = descend(problem, again, self.cap)
            if problem.valid(again, self.cap) and problem.traffic(again) < cost * (1 - ROUNDING):
                changed = {s for v, s in enumerate(stage) if s != again[v]} | {
                    s for v, s in enumerate(again) if s != stage[v]
                }
                waiting |= {b for s in changed for b in (s - 1, s) if 0 <= b < problem.stages - 1}
                stage, cost = again, problem.traffic(again)
        return descend(problem, stage, self.cap)

    def join(self, pool: Sequence[Stages]) -> Stages:
        """The best split of an order in which the closed sets of a few families of the pool are prefixes."""
        chosen = self.generator.sample(pool, min(len(pool), self.generator.randint(2, 4)))
        order = sorted(range(self.problem.nodes), key=lambda v: sum(stage[v] for stage in chosen))
        on = line(self.problem, order)
        cost, boundaries = cheapest(self.problem, on, self.cap)
        return self.improve(on.stages_of(boundaries) if cost < float("inf") else chosen[0])
