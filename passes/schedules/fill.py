"""Puts weight halves into rows of forwards and input halves: where a rank would wait, and where it needs the room."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from pipecompile.passes.schedules.problem import Problem, Task, TaskRows


@dataclass(slots=True)
class _State:
    """How far the rows have come; ``pending`` are the weight halves that each rank may run, oldest first."""

    problem: Problem
    free: list[float]
    held: list[float]
    rows: TaskRows
    pending: list[list[Task]]
    ends: dict[Task, float] = field(default_factory=dict)

    def ready(self, task: Task) -> float | None:
        letter, stage, microbatch = task
        time = 0.0
        inputs = self.problem.reads if letter == "F" else self.problem.returns
        own = ((stage, 0.0),) if letter == "I" else ()
        for other, lag in (*own, *inputs[stage]):
            end = self.ends.get(("F" if other == stage else letter, other, microbatch))
            if end is None:
                return None
            time = max(time, end + lag)
        return time

    def crowded(self, rank: int, task: Task) -> bool:
        return task[0] == "F" and self.held[rank] + self.problem.sizes[task[1]] > self.problem.caps[rank]

    def run_weight(self, rank: int) -> None:
        task = self.pending[rank].pop(0)
        self.rows[rank].append(task)
        self.free[rank] += self.problem.times["W"][task[1]]
        self.held[rank] -= self.problem.sizes[task[1]]

    def run(self, rank: int, task: Task, ready: float, patience: float) -> bool:
        """Run what fits before a task, then the task; False if there is no room for it."""
        weights = self.problem.times["W"]
        while self.pending[rank] and (
            self.crowded(rank, task) or ready - self.free[rank] > patience * weights[self.pending[rank][0][1]] + 1e-9
        ):
            self.run_weight(rank)
        if self.crowded(rank, task):
            return False
        letter, stage, microbatch = task
        self.free[rank] = max(self.free[rank], ready) + self.problem.times[letter][stage]
        self.ends[task] = self.free[rank]
        self.rows[rank].append(task)
        if letter == "F":
            self.held[rank] += self.problem.sizes[stage]
        else:
            self.pending[rank].append(("W", stage, microbatch))
        return True


def fill_weights(problem: Problem, rows: Sequence[Sequence[Task]], patience: float = 0.0) -> tuple[float, TaskRows]:
    """The rows with weight halves, and when they end; infinity if they cannot run, or not within the caps.

    A rank waits without working for up to ``patience`` times the weight half's own time. O(n) for n tasks.
    """
    ranks = len(rows)
    state = _State(problem, [0.0] * ranks, [0.0] * ranks, [[] for _ in rows], [[] for _ in rows])
    at = [0] * ranks
    moved = True
    while moved:
        moved = False
        for rank, row in enumerate(rows):
            while at[rank] < len(row):
                ready = state.ready(row[at[rank]])
                if ready is None:
                    break
                if not state.run(rank, row[at[rank]], ready, patience):
                    return math.inf, []
                at[rank] += 1
                moved = True
    if any(place < len(row) for place, row in zip(at, rows)):
        return math.inf, []
    for rank in range(ranks):
        while state.pending[rank]:
            state.run_weight(rank)
    return max(state.free), state.rows
