"""Simulated annealing over the rows of a schedule: move tasks of the critical path, or weight halves, and keep what helps.

The start of every task follows from the rows (as soon as the rank is free and the inputs are there), so a candidate is
evaluated by one pass over all tasks: O(tries x tasks). The seed is fixed: the same problem gives the same rows.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from pipecompile.passes.schedules.problem import Problem, Task, TaskRows

HEAT = 0.008
"""The share of the first makespan by which a candidate may be worse, at the beginning, to be taken one time in e."""


def makespan(problem: Problem, rows: Sequence[Sequence[Task]]) -> tuple[float, list[Task]]:
    """When the rows end, and the chain of tasks that makes them end then; infinity if the ranks wait in a ring."""
    ends: dict[Task, float] = {}
    causes: dict[Task, Task | None] = {}
    at = [0] * len(rows)
    free = [0.0] * len(rows)
    moved = True
    while moved:
        moved = False
        for rank, row in enumerate(rows):
            start_at = at[rank]
            for task in row[start_at:]:
                letter, stage, _ = task
                time, cause = free[rank], row[at[rank] - 1] if at[rank] else None
                for other, lag in _inputs(problem, task):
                    end = ends.get(other)
                    if end is None:
                        break
                    if end + lag > time:
                        time, cause = end + lag, other
                else:
                    ends[task] = free[rank] = time + problem.times[letter][stage]
                    causes[task] = cause
                    at[rank] += 1
                    continue
                break
            moved = moved or at[rank] > start_at
    if len(ends) < sum(map(len, rows)):
        return math.inf, []
    last = max(range(len(rows)), key=lambda rank: free[rank])
    path: list[Task] = []
    task_or_none: Task | None = rows[last][-1]
    while task_or_none is not None:
        path.append(task_or_none)
        task_or_none = causes[task_or_none]
    return free[last], path


def _inputs(problem: Problem, task: Task) -> list[tuple[Task, float]]:
    letter, stage, microbatch = task
    if letter == "F":
        return [(("F", other, microbatch), lag) for other, lag in problem.reads[stage]]
    if letter == "W":
        return [(("I", stage, microbatch), 0.0)]
    return [
        (("F", stage, microbatch), 0.0),
        *((("I", other, microbatch), lag) for other, lag in problem.returns[stage]),
    ]


def _moved(
    problem: Problem, rows: TaskRows, path: Sequence[Task], draw: random.Random
) -> tuple[int, list[Task]] | None:
    """A rank and its row with one task moved a little; None if that breaks an order within the rank, or its cap."""
    if draw.random() < 0.3:
        rank = draw.randrange(len(rows))
        places = [i for i, task in enumerate(rows[rank]) if task[0] == "W"]
        source = draw.choice(places)
        target = source + draw.choice((-3, -2, -1, 1, 2, 3, 4, 6))
    else:
        task = draw.choice(path)
        rank = problem.shape.placement[task[1]]
        source = rows[rank].index(task)
        target = source + draw.choice((-1, -1, -1, -2, -3, 1, 1, 2))
    if not 0 <= target < len(rows[rank]):
        return None
    row = list(rows[rank])
    row.insert(target, row.pop(source))
    low, high = min(source, target), max(source, target)
    return (rank, row) if _ordered(row[low : high + 1]) and problem.fits(row, rank) else None


def _ordered(part: Sequence[Task]) -> bool:
    """Whether within a part of a row each microbatch of a stage goes F, I, W, and each letter in microbatch order."""
    seen: dict[tuple[str, int], int] = {}
    for letter, stage, microbatch in part:
        if seen.get((letter, stage), -1) > microbatch:
            return False
        later = {"F": "IW", "I": "W", "W": ""}[letter]
        if any(seen.get((other, stage), -1) >= microbatch for other in later):
            return False
        seen[letter, stage] = microbatch
    return True


def improve(problem: Problem, rows: TaskRows, tries: int, seed: int = 0) -> tuple[float, TaskRows]:
    """The best rows found in so many tries, and when they end; stops early at the problem's lower bound."""
    draw = random.Random(seed)
    rows = [list(row) for row in rows]
    time, path = makespan(problem, rows)
    best, best_rows = time, [list(row) for row in rows]
    heat, floor = HEAT * time, problem.lower_bound + 1e-9
    for tried in range(tries):
        if best <= floor:
            break
        move = _moved(problem, rows, path, draw)
        if move is None:
            continue
        rank, row = move
        before, rows[rank] = rows[rank], row
        new_time, new_path = makespan(problem, rows)
        chance = math.exp(min(0.0, (time - new_time) / max(heat * (1 - tried / tries), 1e-12)))
        if draw.random() > chance:
            rows[rank] = before
            continue
        time, path = new_time, new_path
        if time < best - 1e-9:
            best, best_rows = time, [list(row) for row in rows]
    return best, best_rows
