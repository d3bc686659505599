"""The schedules: alternatives for the order in which each rank computes, found by name in the files of this folder.

A schedule is a pure function from a Shape (and a Setting, where it adapts to costs) to one row of compute instructions
for each rank. A file that holds ``@schedule("name")`` over such a function is enough to add one.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from pipecompile.errors import ScheduleError
from pipecompile.ir import Instruction, Partition, Shape, StageCost, Timetable
from pipecompile.memory import ADAM
from pipecompile.passes.communicate import chain
from pipecompile.passes.own_schedule import own_order
from pipecompile.simulate import Link

Rows = tuple[tuple[Instruction, ...], ...]


@dataclass(frozen=True, slots=True)
class Setting:
    """What a schedule may adapt to: each stage's costs and messages, the links, and each rank's bytes (none: no limit)."""

    partition: Partition
    link: Link = field(default_factory=Link)
    limits: tuple[int, ...] = ()
    optimizer_factor: float = ADAM

    @property
    def costs(self) -> tuple[StageCost, ...]:
        return self.partition.costs


Order = Callable[[Shape, Setting], Rows | Timetable]
"""A schedule's function; one that chooses the placement itself gives a whole Timetable."""

Placement = Callable[[Shape], tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Forms:
    """Closed forms as text, in p ranks, v stages a rank, m microbatches, rank r, F, I, W ms of a rank's whole share.

    ``idle``: ms without work between a rank's first and last computation, on the rank that has most. ``activations``:
    the most in flight on rank r, each of one stage and microbatch. ``versions``: the most versions of the weights that
    rank r holds. ``idle_holds`` and ``activations_hold`` say where they are true.
    """

    idle: str
    activations: str
    idle_holds: str = "True"
    activations_hold: str = "True"
    versions: str = "1"


@dataclass(frozen=True, slots=True)
class Schedule:
    """A named schedule: how it orders, where it places stages, how many stages a rank it is made for (0: any).

    ``instead`` names a schedule for the shapes that ``per_rank`` refuses; ``refuses`` gives its reasons against others,
    with the nearest shape that it allows, or nothing. ``flushes``: all microbatches see the same
    weights, as accumulation on the unsplit model does. ``adapts``: the order depends on the Setting.
    """

    name: str
    order: Order
    placement: Placement
    per_rank: int = 0
    instead: str = ""
    flushes: bool = True
    forms: Forms | None = None
    refuses: Callable[[Shape], str] | None = None
    adapts: bool = False


_SCHEDULES: dict[str, Schedule] = {}


def loop(shape: Shape) -> tuple[int, ...]:
    """Stage s on rank s mod R."""
    return tuple(s % shape.ranks for s in range(shape.stages))


def vee(shape: Shape) -> tuple[int, ...]:
    """Two stages a rank, down and up again: rank r holds stages r and 2R-1-r."""
    return tuple(min(s, 2 * shape.ranks - 1 - s) for s in range(shape.stages))


def schedule(
    name: str,
    placement: Placement = loop,
    per_rank: int = 0,
    instead: str = "",
    flushes: bool = True,
    forms: Forms | None = None,
    refuses: Callable[[Shape], str] | None = None,
    adapts: bool = False,
) -> Callable[[Order], Order]:
    """Register a function as the schedule ``name``."""

    def register(order: Order) -> Order:
        _SCHEDULES[name] = Schedule(name, order, placement, per_rank, instead, flushes, forms, refuses, adapts)
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
    """The schedule of that name, or a user's own (``my.py:name``); ScheduleError lists the names if there is none."""
    if ".py:" in name:
        return Schedule(name, own_order(name), loop, adapts=True)
    found = _discover().get(name)
    if found is None:
        raise ScheduleError(
            f"unknown schedule {name!r}; choose one of {', '.join(schedule_names())}, or my.py:function"
        )
    return found


def make_timetable(
    name: str,
    shape: Shape,
    costs: Sequence[StageCost] | None = None,
    partition: Partition | None = None,
    link: Link | None = None,
    limits: Sequence[int] = (),
    optimizer_factor: float = ADAM,
) -> Timetable:
    """The compute order of schedule ``name``; the timetable's shape carries the placement that the schedule uses.

    Schedules that adapt use the costs of each stage (or a whole partition, which has them), the link, and the bytes
    that each rank has; the others ignore them.
    """
    known = partition or chain(len(costs) if costs is not None else shape.stages, costs)
    if known.stages != shape.stages:
        raise ScheduleError(f"{known.stages} stage costs for {shape.stages} stages; give one for each stage")
    if limits and len(limits) != shape.ranks:
        raise ScheduleError(f"{len(limits)} memory limits for {shape.ranks} ranks; give one for each rank")
    found = find_schedule(name)
    return timetable_of(found, shape, Setting(known, link or Link(), tuple(limits), optimizer_factor))


def check_shape(name: str, shape: Shape) -> None:
    """Raise ScheduleError if schedule ``name`` is unknown or does not allow ``shape``. Costs next to nothing."""
    _check(find_schedule(name), shape)


def _check(found: Schedule, shape: Shape) -> None:
    each = shape.stages // shape.ranks
    if found.per_rank and each != found.per_rank:
        other = f", or use --schedule {found.instead}" if found.instead else ""
        raise ScheduleError(
            f"{found.name} runs {found.per_rank} stage{'s'[: found.per_rank - 1]} on each rank, "
            f"not {shape.stages} stages on {shape.ranks} ranks; "
            f"use --stages {shape.ranks * found.per_rank} --ranks {shape.ranks}{other}"
        )
    reason = found.refuses(shape) if found.refuses else ""
    if reason:
        raise ScheduleError(reason)


def timetable_of(found: Schedule, shape: Shape, setting: Setting) -> Timetable:
    """What ``found`` makes of a shape that it allows; ScheduleError says why not and what would do."""
    _check(found, shape)
    placed = replace(shape, placement=found.placement(shape))
    made = found.order(placed, setting)
    return made if isinstance(made, Timetable) else Timetable(found.name, placed, made)
