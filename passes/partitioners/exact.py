"""The proved optimum, by mixed-integer programming (HiGHS), from the partition that the min-cut search found.

    1. the least time: minimise T, every node inside the window that the known T leaves it
    2. cap = (1 + tolerance) · T; neighbourhoods of the known partition (two, then three, then four stages in a row free)
    3. the whole with what time is left: proves the bytes, or gives a bound

Exponential in the worst case; what is known when the time limit comes is given, with the bounds proved so far.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

from pipecompile.passes.partitioners import partitioner
from pipecompile.passes.partitioners.milp import Model
from pipecompile.passes.partitioners.problem import Answer, Problem
from pipecompile.passes.partitioners.windows import Windows, windows, within

CLOSE = 1e-6
"""A relative gap that counts as none."""
SMALL = 1000
"""So many free columns are solved at once, without looking at neighbourhoods first."""


@dataclass(frozen=True, slots=True)
class Clock:
    """A deadline."""

    end: float

    @staticmethod
    def of(seconds: float) -> Clock:
        return Clock(time.monotonic() + seconds)

    def left(self) -> float:
        return self.end - time.monotonic()


@partitioner("exact")
def exact(problem: Problem) -> Answer | None:
    """The optimum, found and proved by the solver alone."""
    return polish(problem, None)


def polish(problem: Problem, start: Answer | None) -> Answer | None:
    """The optimum, or the best found in the problem's time limit, from a known partition or from nothing."""
    clock = Clock.of(problem.time_limit)
    quick = least_time(problem, start, clock.left() * 0.3)
    if quick is None:
        return None
    cap = time_cap(problem, quick)
    known = [a.stage for a in (start, quick) if a is not None and problem.valid(a.stage, cap)]
    best = min(known, key=problem.traffic)
    open_windows = windows(problem, cap)
    if sum(open_windows[1]) - sum(open_windows[0]) > SMALL:
        best = neighbourhoods(problem, best, cap, open_windows, clock.left() * 0.6)
    best, bound = least_traffic(problem, best, cap, open_windows, clock.left())
    return Answer(best, quick.bound_ms, bound)


def time_cap(problem: Problem, quick: Answer) -> float:
    """The time that every stage may take: with a nearly closed gap, safe whatever the true optimum is."""
    found, tolerance = max(problem.times(quick.stage)), 1 + problem.tolerance
    if quick.bound_ms >= found * (1 - CLOSE):
        return found * tolerance
    return max(found, quick.bound_ms * tolerance) if quick.bound_ms >= 0.995 * found else found * tolerance


def least_time(problem: Problem, start: Answer | None, seconds: float) -> Answer | None:
    """A partition of the least time of the slowest stage, and the bound that was proved."""
    known = max(problem.times(start.stage)) if start else float("inf")
    floor = problem.least_time()
    if start and known <= floor * (1 + CLOSE):
        return replace(start, bound_ms=known)
    model = Model(problem, *windows(problem, known))
    model.times(None)
    found = model.solve(seconds, below=known * (1 + 1e-4) if start else None, gap=CLOSE)
    if found.status == "infeasible" and not start:
        return None
    stage = start.stage if start else None
    if found.stage and problem.fits(found.stage) and max(problem.times(found.stage)) < known:
        stage = found.stage
    if stage is None:
        return None
    took = max(problem.times(stage))
    bound = took if found.status == "optimal" else max(floor, min(found.bound, took))
    return Answer(stage, bound)


def neighbourhoods(
    problem: Problem, best: tuple[int, ...], cap: float, open_windows: Windows, seconds: float
) -> tuple[int, ...]:
    """Free a few stages in a row at a time, and again while that finds anything."""
    clock = Clock.of(seconds)
    for width in range(2, min(5, problem.stages) + 1):
        improved = True
        while improved and clock.left() > 0:
            improved = False
            for first in range(problem.stages - width + 1):
                model = Model(problem, *within(open_windows, best, first, first + width - 1))
                model.times(cap)
                model.traffic()
                known = problem.traffic(best)
                found = model.solve(min(clock.left(), seconds / 6), below=known * (1 + 1e-4)).stage
                if found and problem.valid(found, cap) and problem.traffic(found) < known:
                    best, improved = found, True
    return best


def least_traffic(
    problem: Problem, best: tuple[int, ...], cap: float, open_windows: Windows, seconds: float
) -> tuple[tuple[int, ...], float]:
    """The fewest bytes under the cap, and the bound that was proved."""
    model = Model(problem, *open_windows)
    model.times(cap)
    model.traffic()
    known = problem.traffic(best)
    found = model.solve(seconds, below=known * (1 + 1e-4))
    if found.stage and problem.valid(found.stage, cap) and problem.traffic(found.stage) < known:
        best = found.stage
    cost = problem.traffic(best)
    return best, cost if found.status == "optimal" else min(found.bound, cost)
