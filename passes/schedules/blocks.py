"""V schedules from building blocks: one microbatch's pattern, repeated every six time units (arXiv 2405.15362).

Rank r holds stage r on the way down and stage 2R-1-r on the way up. In units of one task (forward, input half, weight
half all 1), microbatch i runs on rank r

    F of stage r           at          r d1 + 6i          down         d1 .. d4: how many units later the next rank
    F of stage 2R-1-r      at  first - r d2 + 6i          up           on the way does the same
    I of stage 2R-1-r      at   turn + r d3 + 6i          down
    I of stage r           at   last - r d4 + 6i          up

where no two of the four fall on the same unit modulo 6 on any rank. The weight halves fill the two units left. Slow
blocks (large d) leave time for messages and unequal stages but keep activations longer: each block's count of
activations in flight follows from its offsets. The schedule is the best block that fits a number of activations, under
the given costs. O(blocks x tasks).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from pipecompile.errors import ScheduleError
from pipecompile.ir import Shape
from pipecompile.passes.schedules import Rows, Setting
from pipecompile.passes.schedules.fill import fill_weights
from pipecompile.passes.schedules.greedy import Rule, list_schedule
from pipecompile.passes.schedules.improve import improve, makespan
from pipecompile.passes.schedules.problem import Problem, Task, TaskRows

UNIT = 6
DELAYS = range(1, 5)
PATIENCE = (0.0, 0.5, 0.99)
TASKS_TRIED = 400_000
"""Tasks looked at while improving, over all tries: enough for small steps, little time for large ones."""


@dataclass(frozen=True, slots=True)
class Block:
    """The offsets of the drawing."""

    delays: tuple[int, int, int, int]
    first: int
    turn: int
    last: int

    def times(self, rank: int) -> tuple[int, int, int, int]:
        """When rank ``rank`` runs F down, F up, I down, I up."""
        d1, d2, d3, d4 = self.delays
        return rank * d1, self.first - rank * d2, self.turn + rank * d3, self.last - rank * d4

    def in_flight(self, ranks: int) -> int:
        """The most activations of one stage that a rank holds at once, weight halves at once behind input halves."""

        def held(rank: int, unit: int) -> int:
            f1, f2, i2, i1 = self.times(rank)
            return sum((end - unit) // UNIT - (start - 1 - unit) // UNIT for start, end in ((f1, i1), (f2, i2)))

        return max(held(rank, unit) for rank in range(ranks) for unit in range(UNIT))


def blocks(ranks: int) -> Iterator[Block]:
    """All blocks without a collision whose turns are at most one round later than they could be."""

    def free(times: list[list[int]], new: list[int]) -> bool:
        return all((a - b) % UNIT for column in times for a, b in zip(column, new))

    ranks_in_order = range(ranks)
    for d1, d2, d3, d4 in itertools.product(DELAYS, repeat=4):
        down = [r * d1 for r in ranks_in_order]
        start = (ranks - 1) * (d1 + d2) + 1
        for first in range(start, start + UNIT):
            up = [first - r * d2 for r in ranks_in_order]
            if not free([down], up):
                continue
            for turn in range(first + 1, first + 1 + UNIT):
                back = [turn + r * d3 for r in ranks_in_order]
                if not free([down, up], back):
                    continue
                end = turn + (ranks - 1) * (d3 + d4) + 1
                for last in range(end, end + UNIT):
                    if free([down, up, back], [last - r * d4 for r in ranks_in_order]):
                        yield Block((d1, d2, d3, d4), first, turn, last)


def _repeat(block: Block, shape: Shape) -> TaskRows:
    """The block's forwards and input halves for all microbatches, in the order of their times."""
    rows = []
    for rank in range(shape.ranks):
        up = shape.stages - 1 - rank
        tasks: list[tuple[int, Task]] = []
        for m in range(shape.microbatches):
            for time, letter, stage in zip(block.times(rank), "FFII", (rank, up, up, rank)):
                tasks.append((time + UNIT * m, (letter, stage, m)))
        rows.append([task for _, task in sorted(tasks)])
    return rows


def best_vee(name: str, shape: Shape, setting: Setting, in_flight: int, order: TaskRows | None = None) -> Rows:
    """The fastest V order under the given costs that never holds more than ``in_flight`` stages' activations a rank.

    ``order`` is one to beat, taken as it is where all tasks cost the same and microbatches fill the pipeline.
    """
    problem = Problem.of(shape, setting).counted(in_flight)
    if order is not None and _equal(setting) and shape.microbatches >= shape.stages - 1:
        return problem.instructions(order)
    block, patience = _best_block(name, replace(shape, microbatches=2 * shape.ranks), setting, in_flight)
    found = [fill_weights(problem, _repeat(block, shape), patience)]
    if order is not None:
        found.append((makespan(problem, order)[0], order))
    if not _equal(setting):
        found += [list_schedule(problem, Rule("I", 0.0, fill)) for fill in (0.0, 0.5, 1.0)]
        best = min(found, key=lambda one: one[0])
        found.append(improve(problem, best[1], TASKS_TRIED // (3 * shape.stages * shape.microbatches)))
    return problem.instructions(min(found, key=lambda one: one[0])[1])


@lru_cache(maxsize=64)
def _best_block(name: str, shape: Shape, setting: Setting, in_flight: int) -> tuple[Block, float]:
    """The block, and the patience with weight halves, that end a step of 2p microbatches first."""
    problem = Problem.of(shape, setting).counted(in_flight)
    fitting = (block for block in blocks(shape.ranks) if block.in_flight(shape.ranks) <= in_flight)
    distinct = {tuple(map(tuple, _repeat(block, shape))): block for block in fitting}
    tried = ((fill_weights(problem, rows, p)[0], p, block) for rows, block in distinct.items() for p in PATIENCE)
    time, patience, block = min(tried, key=lambda one: one[0], default=(math.inf, 0.0, Block((1, 1, 1, 1), 0, 0, 0)))
    if time == math.inf:
        raise ScheduleError(f"{name} has no order for {shape.ranks} ranks; use --schedule zb-v")
    return block, patience


def _equal(setting: Setting) -> bool:
    """Whether all tasks take the same time."""
    return all(cost.forward_ms == cost.weight_ms == cost.backward_ms / 2 for cost in setting.costs) and (
        len({cost.forward_ms for cost in setting.costs}) == 1
    )
