"""The schedules: alternatives for the order in which each rank computes, found by name in the files of this folder.

A schedule is a pure function from a Shape (and costs, where it adapts to them) to one row of compute instructions
for each rank. A file that holds ``@schedule("name")`` over such a function is enough to add one.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from pipecompile.errors import ScheduleError
from pipecompile.ir import Instruction, Shape, StageCost, Timetable

Rows = tuple[tuple[Instruction, ...], ...]
Order = Callable[[Shape, tuple[StageCost, ...]], Rows]
Placement = Callable[[Shape], tuple[int, ...]]

EQUAL = StageCost(forward_ms=1.0, backward_ms=2.0, weight_ms=1.0, saved_bytes=1)
"""What a stage costs if nothing else is said: forward, input gradient and weight gradient take the same time."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """A named schedule: how it orders, where it places stages, how many stages a rank it is made for (0: any)."""

    name: str
    order: Order
    placement: Placement
    per_rank: int = 0
    instead: str = ""


_SCHEDULES: dict[str, Schedule] = {}


def loop(shape: Shape) -> tuple[int, ...]:
    """Stage s on rank s mod R."""
    return tuple(s % shape.ranks for s in range(shape.stages))


def vee(shape: Shape) -> tuple[int, ...]:
    """Two stages a rank, down and up again: rank r holds stages r and 2R-1-r."""
    return tuple(min(s, 2 * shape.ranks - 1 - s) % shape.ranks for s in range(shape.stages))


def schedule(name: str, placement: Placement = loop, per_rank: int = 0, instead: str = "") -> Callable[[Order], Order]:
    """Register a function as the schedule ``name``; ``instead`` names one for shapes that ``per_rank`` refuses."""

    def register(order: Order) -> Order:
        _SCHEDULES[name] = Schedule(name, order, placement, per_rank, instead)
        return order

    return register


def _discover() -> dict[str, Schedule]:
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return _SCHEDULES


def schedule_names() -> tuple[str, ...]:
    """The names of all schedules, sorted."""
    return tuple(sorted(_discover()))


def find_schedule(name: str) -> Schedule:
    """The schedule of that name; ScheduleError lists the names if there is none."""
    found = _discover().get(name)
    if found is None:
        raise ScheduleError(f"unknown schedule {name!r}; choose one of {', '.join(schedule_names())}")
    return found


def make_timetable(name: str, shape: Shape, costs: Sequence[StageCost] | None = None) -> Timetable:
    """The compute order of schedule ``name``; the timetable's shape carries the placement that the schedule uses.

    ``costs`` are one StageCost for each stage; schedules that do not adapt ignore them.
    """
    found = find_schedule(name)
    each = shape.stages // shape.ranks
    if found.per_rank and each != found.per_rank:
        other = f", or use --schedule {found.instead}" if found.instead else ""
        raise ScheduleError(
            f"{name} runs {found.per_rank} stage{'s'[: found.per_rank - 1]} on each rank, "
            f"not {shape.stages} stages on {shape.ranks} ranks; "
            f"use --stages {shape.ranks * found.per_rank} --ranks {shape.ranks}{other}"
        )
    known = tuple(costs) if costs is not None else (EQUAL,) * shape.stages
    if len(known) != shape.stages:
        raise ScheduleError(f"{len(known)} stage costs for {shape.stages} stages; give one for each stage")
    placed = replace(shape, placement=found.placement(shape))
    return Timetable(name, placed, found.order(placed, known))
