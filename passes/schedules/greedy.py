"""List scheduling: whenever a rank is free it starts the most urgent task that is ready, by the rules of a Rule.

A forward is held back where its activation would not leave room for one of each of the rank's deeper stages, so the
oldest microbatch can always go on and no order ends in a ring of waiting ranks. Weight halves fill the time that a
rank would wait, and make room when it has none. O(n R) for n tasks on R ranks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from pipecompile.passes.schedules.problem import Problem, Task, TaskRows


@dataclass(frozen=True, slots=True)
class Rule:
    """How to choose: ``first`` is "I" or "F"; a rank waits up to ``patience`` ms for a task that is more urgent.

    A weight half starts where the wait would be longer than ``fill`` times its own time. ``ahead``: the most forwards
    of each stage whose input half is still to come (empty: no limit).
    """

    first: str = "I"
    patience: float = 0.0
    fill: float = 0.0
    ahead: tuple[int, ...] = ()


@dataclass(slots=True)
class _State:
    """How far the schedule has come."""

    problem: Problem
    rule: Rule
    local: tuple[tuple[int, ...], ...]
    reserve: list[float]
    free: list[float]
    held: list[float]
    rows: TaskRows
    ends: dict[Task, float] = field(default_factory=dict)
    done: dict[tuple[str, int], int] = field(default_factory=dict)

    def ready(self, letter: str, stage: int, microbatch: int) -> float | None:
        """When a task's inputs are there; None while that is unknown."""
        time = 0.0 if letter == "F" else self.ends[("F", stage, microbatch)]
        for other, lag in (self.problem.reads if letter == "F" else self.problem.returns)[stage]:
            end = self.ends.get((letter, other, microbatch))
            if end is None:
                return None
            time = max(time, end + lag)
        return time

    def allowed(self, rank: int, stage: int) -> bool:
        """Whether a rank has room for another forward of a stage, and is not too far ahead."""
        problem, done = self.problem, self.done
        if done["F", stage] >= problem.shape.microbatches:
            return False
        if self.rule.ahead and done["F", stage] - done["I", stage] >= self.rule.ahead[stage]:
            return False
        return self.held[rank] + problem.sizes[stage] + self.reserve[stage] <= problem.caps[rank]

    def choice(self, rank: int) -> tuple[float, Task] | None:
        """The task that a rank starts next, and when; None while nothing is ready."""
        now = self.free[rank]
        open_tasks: list[tuple[float, int, int, Task]] = []
        for stage in self.local[rank]:
            for letter in "IF":
                microbatch = self.done[letter, stage]
                if letter == "I" and microbatch >= self.done["F", stage]:
                    continue
                if letter == "F" and not self.allowed(rank, stage):
                    continue
                time = self.ready(letter, stage, microbatch)
                if time is not None:
                    urgency = 0 if letter == self.rule.first else 1
                    depth = -stage if letter == "F" else 0
                    open_tasks.append((max(time, now), urgency, depth, (letter, stage, microbatch)))
        weight = self.weight_half(rank)
        if not open_tasks:
            return None if weight is None else (now, weight)
        soonest = min(task[0] for task in open_tasks)
        near = [task for task in open_tasks if task[0] <= soonest + self.rule.patience]
        start, _, _, chosen = min(near, key=lambda task: (task[1], task[2], task[0]))
        if weight is not None and start - now > self.rule.fill * self.problem.times["W"][weight[1]] + 1e-9:
            return now, weight
        return start, chosen

    def weight_half(self, rank: int) -> Task | None:
        """The weight half that has waited longest."""
        waiting = [
            ("W", stage, self.done["W", stage])
            for stage in self.local[rank]
            if self.done["W", stage] < self.done["I", stage]
        ]
        return min(waiting, key=lambda task: self.ends["I", task[1], task[2]], default=None)

    def run(self, rank: int, start: float, task: Task) -> None:
        letter, stage, _ = task
        self.ends[task] = self.free[rank] = start + self.problem.times[letter][stage]
        self.rows[rank].append(task)
        self.done[letter, stage] += 1
        if letter == "F":
            self.held[rank] += self.problem.sizes[stage]
        elif letter == "W":
            self.held[rank] -= self.problem.sizes[stage]


def list_schedule(problem: Problem, rule: Rule) -> tuple[float, TaskRows]:
    """The rows that a rule gives, and when they end; infinity where the caps leave no room for one microbatch."""
    shape = problem.shape
    local = tuple(shape.stages_of(rank) for rank in range(shape.ranks))
    reserve = [0.0] * shape.stages
    for stages in local:
        for stage, deeper in zip(reversed(stages[:-1]), reversed(stages)):
            reserve[stage] = reserve[deeper] + problem.sizes[deeper]
    ranks = range(shape.ranks)
    state = _State(problem, rule, local, reserve, [0.0] * len(ranks), [0.0] * len(ranks), [[] for _ in ranks])
    state.done = {(letter, stage): 0 for letter in "FIW" for stage in range(shape.stages)}
    touched = _readers(problem)
    choices = [state.choice(rank) for rank in ranks]
    for _ in range(3 * shape.stages * shape.microbatches):
        rank = min(ranks, key=lambda r: math.inf if choices[r] is None else choices[r][0])  # type: ignore[index]
        chosen = choices[rank]
        if chosen is None:
            return math.inf, []
        state.run(rank, *chosen)
        for other in touched[chosen[1][1]]:
            choices[other] = state.choice(other)
    return max(state.free), state.rows


def _readers(problem: Problem) -> list[set[int]]:
    """For each stage the ranks whose choice may change when one of its tasks starts."""
    placement = problem.shape.placement
    touched = [{rank} for rank in placement]
    for stage, rank in enumerate(placement):
        for other, _ in (*problem.reads[stage], *problem.returns[stage]):
            touched[other].add(rank)
    return touched
