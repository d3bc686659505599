"""The proved optimum, by mixed-integer programming (HiGHS), from nothing or from the partition that a search found.

    1. the least time: minimise T, every node inside the window that the known T leaves it
    2. cap = (1 + tolerance) · T; neighbourhoods of the known partition (two, then three, then four stages in a row free)
    3. the whole with what time is left: proves the bytes, or gives a bound

Exponential in the worst case; what is known when the time limit comes is given, with the bounds proved so far.
"""

from __future__ import annotations

from dataclasses import replace

from pipecompile.errors import MemoryLimitError
from pipecompile.passes.partitioners import partitioner
from pipecompile.passes.partitioners.clock import Clock
from pipecompile.passes.partitioners.milp import Model
from pipecompile.passes.partitioners.problem import CLOSE, Answer, Problem, time_cap
from pipecompile.passes.partitioners.windows import Windows, windows, within

SLACK = 1e-4
"""The solver is asked for no worse than what is known, with this much room: at the edge it would fight rounding."""
WORTH = 0.004
"""A smaller relative gap of the least time is not worth a large program."""
SMALL = 1000
"""So many free columns are solved at once, without looking at neighbourhoods first."""


@partitioner("exact")
def exact(problem: Problem) -> Answer | None:
    """The optimum, found and proved by the solver alone, or the best found in the problem's time limit."""
    clock = Clock.of(problem.time_limit)
    start = into_memory(problem, clock.left() / 2) if problem.limits else None
    quick = least_time(problem, start, clock.left() * 0.3)
    if quick is None:
        return None
    cap = time_cap(problem, quick)
    open_windows = windows(problem, cap)
    best = quick.stage
    if columns(open_windows) > SMALL:
        best = neighbourhoods(problem, best, cap, open_windows, clock.left() * 0.6)
    best, bound = least_traffic(problem, best, cap, open_windows, clock.left())
    return Answer(best, quick.bound_ms, bound)


def columns(open_windows: Windows) -> int:
    """How many 0-1 columns the program has."""
    return sum(open_windows[1]) - sum(open_windows[0])


def into_memory(problem: Problem, seconds: float) -> Answer:
    """Any partition that fits in the memory; MemoryLimitError says by how much the nearest that is found does not."""
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
    floor = max(problem.least_time(), start.bound_ms if start else 0.0)
    if start and known <= floor * (1 + CLOSE):
        return replace(start, bound_ms=known)
    open_windows = windows(problem, known)
    if start and known <= floor * (1 + WORTH) and columns(open_windows) > SMALL // 2:
        return start
    model = Model(problem, *open_windows)
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
    """Free a few stages in a row at a time, and again where something changed, until nothing more is found."""
    clock = Clock.of(seconds)
    for width in range(2, min(5, problem.stages) + 1):
        waiting = list(range(problem.stages - width + 1))
        while waiting and clock.left() > 0:
            first = waiting.pop(0)
            near = within(open_windows, best, first, first + width - 1)
            better, _ = least_traffic(problem, best, cap, near, min(clock.left(), seconds / 6))
            if better != best:
                touched = range(max(0, first - width + 1), min(problem.stages - width, first + width - 1) + 1)
                waiting += [other for other in touched if other != first and other not in waiting]
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
