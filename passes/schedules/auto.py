"""A schedule made to measure: the fastest program found for given costs, links and memory of each rank.

1. Every named schedule that allows the shape, and one microbatch after the other, which needs the least memory.
2. List scheduling (greedy.py) by many rules, on every placement.
3. Simulated annealing (improve.py) from the best of these.

Each candidate becomes a program and is simulated; the fastest that fits the memory wins, so the result is never slower
than the best named schedule that fits. The same input gives the same program. The time is bounded: EFFORT tasks are
looked at while improving, whatever the size.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from pipecompile.errors import MemoryLimitError, ScheduleError
from pipecompile.ir import COMPUTE, Forecast, Shape, Timetable
from pipecompile.passes.communicate import chain, communicate
from pipecompile.passes.schedules import Setting, find_schedule, loop, schedule, schedule_names, timetable_of, vee
from pipecompile.passes.schedules.greedy import Rule, list_schedule
from pipecompile.passes.schedules.improve import improve, makespan
from pipecompile.passes.schedules.problem import Problem, TaskRows
from pipecompile.passes.schedules.tasks import backward, forward
from pipecompile.simulate import simulate

EFFORT = 1_600_000
STARTS = 4


@dataclass(frozen=True, slots=True)
class Candidate:
    """A timetable with its forecast; ``fits`` says whether every rank has the memory."""

    timetable: Timetable
    forecast: Forecast
    fits: bool


@schedule("auto", adapts=True)
def auto(shape: Shape, setting: Setting) -> Timetable:
    """The fastest timetable found; MemoryLimitError says how much memory would do if none fits."""
    candidates = [_candidate(timetable, setting) for timetable in _named(shape, setting)]
    placements = _placements(shape)
    for placement in placements:
        placed = replace(shape, placement=placement)
        problem = Problem.of(placed, setting)
        starts = _starts(problem, [one for one in candidates if one.timetable.shape == placed and one.fits])
        tries = EFFORT // (STARTS * len(placements) * 3 * shape.stages * shape.microbatches)
        for origin, rows in starts:
            time, better = improve(problem, rows, tries)
            for name, found in ((origin, rows), (f"improved {origin}", better)):
                timetable = Timetable(f"auto: {name}", placed, problem.instructions(found))
                candidates.append(_candidate(timetable, setting))
            if time <= problem.lower_bound + 1e-9:
                break
    best = min((one for one in candidates if one.fits), key=lambda one: one.forecast.step_ms, default=None)
    if best is None:
        least = [_candidate(timetable, setting) for timetable in leanest(shape)]
        raise _too_little(min(least, key=lambda one: max(one.forecast.peak_bytes)), setting)
    return best.timetable


def _candidate(timetable: Timetable, setting: Setting) -> Candidate:
    program = communicate(timetable, setting.partition)
    forecast = simulate(program, setting.partition, setting.link, setting.optimizer_factor)
    fits = all(held <= limit for held, limit in zip(forecast.peak_bytes, setting.limits))
    return Candidate(timetable, forecast, fits)


def _named(shape: Shape, setting: Setting) -> Iterator[Timetable]:
    """Every named schedule that allows the shape, and the serial ones."""
    yield from (serial(shape, placement) for placement in _placements(shape))
    for name in schedule_names():
        found = find_schedule(name)
        if found.order is auto or not found.flushes:
            continue
        try:
            timetable = timetable_of(found, shape, setting)
        except ScheduleError:
            continue
        yield replace(timetable, schedule=f"auto: {name}")


def _placements(shape: Shape) -> list[tuple[int, ...]]:
    return [loop(shape)] + [vee(shape)] * (shape.stages == 2 * shape.ranks and shape.ranks > 1)


def leanest(shape: Shape) -> tuple[Timetable, ...]:
    """The orders of which one needs the least memory, whatever the partition.

    One microbatch after the other holds one activation of each stage, and no order less. But it also holds the gradients
    that a rank's deeper stages have sent; breadth first, all of a deeper stage come before any of the next.
    """
    orders = [serial(shape, placement) for placement in _placements(shape)]
    if shape.stages > shape.ranks:
        orders.append(timetable_of(find_schedule("looped-bfs"), shape, Setting(chain(shape.stages))))
    return tuple(orders)


def serial(shape: Shape, placement: tuple[int, ...]) -> Timetable:
    """One microbatch after the other: one activation of each stage in flight."""
    placed = replace(shape, placement=placement)
    rows = []
    for rank in range(shape.ranks):
        stages = placed.stages_of(rank)
        rows.append(
            tuple(
                one
                for m in range(shape.microbatches)
                for one in (*(forward(s, m) for s in stages), *(backward(s, m) for s in reversed(stages)))
            )
        )
    return Timetable("auto: serial", placed, tuple(rows))


def _starts(problem: Problem, named: list[Candidate]) -> list[tuple[str, TaskRows]]:
    """The rows to improve: the best by list scheduling and the best named ones."""
    tasks = 3 * problem.shape.stages * problem.shape.microbatches
    found: list[tuple[float, str, TaskRows]] = []
    for rule in itertools.islice(_rules(problem), max(12, 400_000 // tasks)):
        time, rows = list_schedule(problem, rule)
        if math.isfinite(time):
            found.append((time, "list", rows))
    for one in sorted(named, key=lambda one: one.forecast.step_ms)[:2]:
        rows = [
            [(letter, i.stage, i.microbatch) for i in row for letter in COMPUTE[i.op].replace("B", "IW")]
            for row in one.timetable.rows
        ]
        if all(problem.fits(row, rank) for rank, row in enumerate(rows)):
            found.append((makespan(problem, rows)[0], one.timetable.schedule.removeprefix("auto: "), rows))
    return [(name, rows) for _, name, rows in sorted(found, key=lambda one: one[0])[:STARTS]]


def _rules(problem: Problem) -> Iterator[Rule]:
    """Rules for list scheduling, the most promising first; waiting times in units of a mean forward."""
    shape = problem.shape
    mean = sum(problem.times["F"]) / shape.stages
    aheads: list[tuple[int, ...]] = [()]
    if shape.stages == shape.ranks:
        aheads += [tuple(shape.stages - s + more for s in range(shape.stages)) for more in (0, 1)]
    for fill, patience in itertools.product((0.0, 0.5, 0.25, 0.75, 1.0, 1.5), (0.0, 0.2, 0.5, 1.0)):
        for ahead, first in itertools.product(aheads, "IF"):
            yield Rule(first, patience * mean, fill, ahead)


def _too_little(least: Candidate, setting: Setting) -> MemoryLimitError:
    lacking = ", ".join(
        f"rank {rank} has {limit} bytes and needs {held}"
        for rank, (held, limit) in enumerate(zip(least.forecast.peak_bytes, setting.limits))
        if held > limit
    )
    return MemoryLimitError(
        f"no schedule fits the memory: even in the order that needs least {lacking}; "
        f"use --memory {max(least.forecast.peak_bytes)}, more stages or smaller microbatches"
    )
