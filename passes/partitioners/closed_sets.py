"""The optimum over all closed sets of a narrow graph, without a solver, by dynamic programming over pairs of them.

J. Tarnawski et al., "Efficient algorithms for device placement of DNN graph operators" (2020): a boundary between stages
is a closed set (with a node, everything that leads to it), a stage is the difference of two nested ones, and what a
stage costs depends on its nodes alone. A chain of n nodes has n + 1 closed sets, a ResNet little more; independent
branches multiply. For P closed sets O(P² · (n + tensors)) in numpy; graphs of more than ``MOST`` are left to others.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pipecompile.passes.partitioners.orders import neighbours
from pipecompile.passes.partitioners.problem import ROUNDING, Answer, Problem, time_cap

MOST = 1000
Matrix = npt.NDArray[np.float64]


def optimum(problem: Problem) -> Answer | None:
    """The proved optimum; None if there are too many closed sets, or stages depend on each other (links, ranks)."""
    limits = problem.limits
    if len(set(problem.links)) > 1 or (limits and len(set(limits.rank)) < problem.stages):
        return None
    sets = closed_sets(problem)
    if sets is None:
        return None
    tables = [_times(problem, sets, s) for s in range(problem.stages)]
    least, stage = _chain(problem, sets, tables, np.maximum)
    if stage is None:
        return None
    cap = time_cap(problem, Answer(stage, least))
    received = _received(problem, sets)
    costs = [np.where(took > cap * (1 + ROUNDING), np.inf, received) for took in tables]
    fewest, stage = _chain(problem, sets, costs, np.add)
    return Answer(stage, least, fewest) if stage else None


def closed_sets(problem: Problem) -> Matrix | None:
    """A row of zeros and ones for each closed set, by ascending size; None if there are more than ``MOST``."""
    after, before = neighbours(problem)
    needs = [sum(1 << u for u in earlier) for earlier in before]
    found, waiting = {0}, [(0, frozenset(v for v, need in enumerate(needs) if not need))]
    while waiting:
        inside, ready = waiting.pop()
        for v in ready:
            larger = inside | 1 << v
            if larger in found:
                continue
            found.add(larger)
            if len(found) > MOST:
                return None
            waiting.append((larger, ready - {v} | {u for u in after[v] if needs[u] & ~larger == 0}))
    rows = [[inside >> v & 1 for v in range(problem.nodes)] for inside in found]
    return np.array(sorted(rows, key=sum), dtype=np.float64)


def _times(problem: Problem, sets: Matrix, s: int) -> Matrix:
    """The time of stage s between each two closed sets; infinite where they are not nested or memory is short."""
    nested = sets @ (1 - sets).T == 0
    load = sets @ np.array(problem.load)
    took = np.where(nested, load[None, :] - load[:, None], np.inf) / problem.speeds[s]
    np.fill_diagonal(took, np.inf)
    if problem.limits:
        saved = sets @ np.array(problem.saved, dtype=np.float64) * problem.limits.in_flight[s]
        held = saved[None, :] - saved[:, None]
        for size, nodes in problem.weights:
            held += size * _any(sets, nodes)
        took[held > problem.limits.memory[problem.limits.rank[s]]] = np.inf
    return took


def _any(sets: Matrix, nodes: tuple[int, ...]) -> npt.NDArray[np.bool_]:
    """Whether any of the nodes is between each two nested sets."""
    count = sets[:, list(nodes)].sum(axis=1)
    return np.asarray(count[None, :] > count[:, None])


def _received(problem: Problem, sets: Matrix) -> Matrix:
    """Bytes that the stage between each two nested sets receives."""
    total = np.zeros((len(sets), len(sets)))
    for source, targets, size in problem.tensors:
        made_here = _any(sets, (source,))
        total += size * (_any(sets, targets) & ~made_here)
    return total


def _chain(
    problem: Problem, sets: Matrix, tables: list[Matrix], combine: np.ufunc
) -> tuple[float, tuple[int, ...] | None]:
    """The best chain from the empty set to the whole: its value, and the stage of each node."""
    best = np.where(np.arange(len(sets)) == 0, 0.0, np.inf)
    choices = []
    for table in tables:
        through = combine(best[:, None], table)
        choices.append(through.argmin(axis=0))
        best = through.min(axis=0)
    if best[-1] == np.inf:
        return np.inf, None
    at, outside = len(sets) - 1, np.zeros(problem.nodes)
    for choice in choices[:0:-1]:
        at = int(choice[at])
        outside += 1 - sets[at]
    return float(best[-1]), tuple(int(s) for s in outside)
