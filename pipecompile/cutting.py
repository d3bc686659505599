"""How a model is cut for its schedule: what the partitioner must know of it, and the step that a partition gives."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from pipecompile.compiled import Options
from pipecompile.ir import CostGraph, Partition, Shape
from pipecompile.memory import in_flight
from pipecompile.passes.communicate import communicate
from pipecompile.passes.opening import Split
from pipecompile.passes.partitioners import partition
from pipecompile.passes.schedules import make_timetable
from pipecompile.passes.shorten import shorten
from pipecompile.simulate import simulate

SEARCHED = ("auto", "v-half", "v-min", "zb-v")
"""Schedules that take too long to make for every partition that is tried."""

SECONDS = 2.0
"""For each call of the partitioner: a model's graph is cut several times while calls are opened."""


def cutter(
    options: Options, shape: Shape, memory: int | None, tolerance: float | None = None
) -> Callable[[CostGraph], Partition]:
    """The partitioner's call; under a memory limit it is told what the schedule holds where."""
    chosen = options.tolerance if tolerance is None else tolerance
    if memory is None:
        return lambda costs: partition(costs, options.stages, tolerance=chosen, time_limit=SECONDS)
    timetable = make_timetable(options.schedule, shape)
    return lambda costs: partition(
        costs,
        options.stages,
        tolerance=chosen,
        memory=memory,
        in_flight=in_flight(timetable.rows, options.stages),
        placement=timetable.shape.placement,
        state_factor=2 + options.optimizer_factor,
        time_limit=SECONDS,
    )


def with_shorter_step(parts: Split, options: Options, shape: Shape, memory: int | None) -> Split:
    """The split with the partition of its graph that gives the shortest simulated step over the link, if one is known."""
    if options.stages == 1 or options.link is None or options.schedule in SEARCHED:
        return parts

    def step_ms(found: Partition) -> float:
        timetable = make_timetable(options.schedule, shape, None, found, options.link)
        forecast = simulate(communicate(timetable, found), found, options.link, options.optimizer_factor)
        return math.inf if options.memory and max(forecast.peak_bytes) > options.memory else forecast.step_ms

    def cut(tolerance: float) -> Partition:
        return cutter(options, shape, memory, tolerance)(parts.costed.graph)

    return replace(parts, partition=shorten(parts.costed.graph, parts.partition, step_ms, cut, options.tolerance))
