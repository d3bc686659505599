"""The proved optimum, by mixed-integer programming (HiGHS), from the partition that the min-cut search found.

    1. the least time: minimise T, every node inside the window that the known T leaves it
    2. cap = (1 + tolerance) · T; neighbourhoods of the known partition (two, then three, then four stages in a row free)
    3. the whole with what time is left: proves the bytes, or gives a bound

Exponential in the worst case; what is known when the time limit comes is given, with the bounds proved so far.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

from pipecompile.errors import MemoryLimitError
from pipecompile.passes.partitioners import partitioner
from pipecompile.passes.partitioners.milp import Model
from pipecompile.passes.partitioners.problem import Answer, Problem
from pipecompile.passes.partitioners.windows import Windows, windows, within

CLOSE = 1e-6
"""A relative gap that counts as none."""
SLACK = 1e-4
"""The solver is asked for no worse than what is known, with this much room: at the edge it would fight rounding."""
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
    """The optimum, or the best found in the problem's time limit, from a known partition or from nothing.

    MemoryLimitError says by how much memory is short where it is proved, or looks, too small for any partition.
    """
    clock = Clock.of(problem.time_limit)
    if start is None and problem.limits:
        start = into_memory(problem, clock.left() / 2)
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


def into_memory(problem: Problem, seconds: float) -> Answer:
    """Any partition that fits in the memory; MemoryLimitError where the least excess that is found is more than none."""
    count, last = problem.nodes, problem.stages - 1
    model = Model(problem, [0] * count, [last] * count)
    model.memory(excess=True)
    found = model.solve(seconds)
    limits = problem.limits
    if found.stage and problem.fits(found.stage):
        return Answer(found.stage)
    if limits is None or found.stage is None:
        raise MemoryLimitError(f"no partition that fits in memory was found in {seconds:.0f} s; raise the time limit")
    held = problem.held(found.stage)
    rank = max(range(len(held)), key=lambda r: held[r] - limits.memory[r])
    raise MemoryLimitError(
        f"no partition into {problem.stages} stages fits in memory: the nearest needs {held[rank]} bytes on rank {rank}, "
        f"{held[rank] - limits.memory[rank]} more than its {limits.memory[rank]}; "
        "give more memory, use more ranks, or keep fewer microbatches in flight"
    )


def least_time(problem: Problem, start: Answer | None, seconds: float) -> Answer | None:
    """A partition of the least time of the slowest stage, and the bound that was proved."""
    known = max(problem.times(start.stage)) if start else float("inf")
    floor = problem.least_time()
    if start and known <= floor * (1 + CLOSE):
        return replace(start, bound_ms=known)
    model = Model(problem, *windows(problem, known))
    model.memory()
    model.times(None)
    found = model.solve(seconds, below=known * (1 + SLACK) if start else None, gap=CLOSE)
    stage = start.stage if start else None
    if found.stage and problem.fits(found.stage) and max(problem.times(found.stage)) < known:
        stage = found.stage
    if stage is None:
        return None
    took = max(problem.times(stage))
    return Answer(stage, took if found.status == "optimal" else max(floor, min(found.bound, took)))


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
                near = within(open_windows, best, first, first + width - 1)
                better, _ = least_traffic(problem, best, cap, near, min(clock.left(), seconds / 6))
                improved |= better != best
                best = better
    return best


def least_traffic(
    problem: Problem, best: tuple[int, ...], cap: float, open_windows: Windows, seconds: float
) -> tuple[tuple[int, ...], float]:
    """The fewest bytes under the cap, no worse than the best known, and the bound that was proved."""
    model = Model(problem, *open_windows)
    model.memory()
    model.times(cap)
    model.traffic()
    known = problem.traffic(best)
    found = model.solve(seconds, below=known * (1 + SLACK))
    if found.stage and problem.valid(found.stage, cap) and problem.traffic(found.stage) < known:
        best = found.stage
    cost = problem.traffic(best)
    return best, cost if found.status == "optimal" else min(found.bound, cost)
