"""What the compiler uses unless told otherwise: a search with min cuts, polished and bounded by the exact solver.

narrow graph        all closed sets (proved, no solver)
least time          best splits of orders, then the solver inside the windows that they leave
fewest bytes        the solver at once if few columns are open; else min cuts, the solver on neighbourhoods of what
                    they found, and the solver on the whole with what time is left
"""

from __future__ import annotations

from pipecompile.passes.partitioners import partitioner
from pipecompile.passes.partitioners.clock import Clock
from pipecompile.passes.partitioners.closed_sets import optimum
from pipecompile.passes.partitioners.exact import (
    SMALL,
    columns,
    into_memory,
    least_time,
    least_traffic,
    neighbourhoods,
)
from pipecompile.passes.partitioners.mincut import BRIEF, THOROUGH, few_bytes, lines_of, quickest
from pipecompile.passes.partitioners.problem import Answer, Problem, time_cap
from pipecompile.passes.partitioners.windows import windows

QUICK = 300
"""A thorough search of a graph of so few nodes takes a second or two."""


@partitioner("default")
def default(problem: Problem) -> Answer | None:
    """The least time, then the fewest bytes, within the problem's time limit."""
    known = optimum(problem)
    if known is not None:
        return known
    clock = Clock.of(problem.time_limit)
    lines = lines_of(problem)
    start = quickest(problem, lines) or into_memory(problem, clock.left() * 0.4)
    quick = least_time(problem, start, clock.left() * 0.25)
    assert quick is not None
    cap = time_cap(problem, quick)
    open_windows = windows(problem, cap)
    best = min((a.stage for a in (start, quick) if problem.valid(a.stage, cap)), key=problem.traffic)
    if columns(open_windows) > SMALL:
        effort = THOROUGH if problem.nodes <= QUICK else BRIEF
        best = few_bytes(problem, lines, cap, open_windows, best, Clock.of(clock.left() * 0.4), effort)
        best = neighbourhoods(problem, best, cap, open_windows, clock.left() * 0.7)
    best, bound = least_traffic(problem, best, cap, open_windows, clock.left())
    return Answer(best, quick.bound_ms, bound)
