"""How a model is cut for its schedule: what the partitioner must know of it, and the step that a partition gives."""

from __future__ import annotations

import itertools
import math
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache, cached_property

from pipecompile.compiled import Options
from pipecompile.errors import MemoryLimitError, ProgramError
from pipecompile.footprint import weighed
from pipecompile.ir import CostGraph, Partition, Shape, Timetable
from pipecompile.memory import Demand, demands, in_flight, least_rows, peak_bytes
from pipecompile.passes.communicate import communicate
from pipecompile.passes.opening import Split
from pipecompile.passes.partitioners import partition
from pipecompile.passes.partitioners.clock import Allowance
from pipecompile.passes.partitioners.fitting import Fitting, Ranks
from pipecompile.passes.schedules import find_schedule, make_timetable
from pipecompile.passes.schedules.auto import leanest
from pipecompile.passes.shorten import Score, shorten
from pipecompile.simulate import simulate

SECONDS = 2.0
"""For each call of the partitioner: a model's graph is cut several times while calls are opened."""

FIT_SECONDS = 20.0
"""For all searches of partitions that fit in memory, where the partitioner finds none by its own count."""

RECUT_SECONDS = 5.0
"""For all of them where what is counted is itself a forecast, which finished stages correct."""

POLISH_SECONDS = 6.0
"""What is left of them once a partition fits, to make it faster."""


NEAR = 0.01
"""How near to the least memory a search ends where what is counted is itself a forecast."""


@dataclass(frozen=True)
class Cutter:
    """Cuts cost graphs for a schedule, within the memory of each rank by the count of the program that is made of them."""

    options: Options
    shape: Shape
    besides: tuple[int, ...] = ()
    """Bytes that each rank takes beyond the count (empty: none)."""
    made: dict[Partition, Timetable] = field(default_factory=dict)
    """The orders that were made for partitions."""
    searches: dict[CostGraph, list[Fitting]] = field(default_factory=dict)
    allowance: Allowance = field(default_factory=lambda: Allowance(FIT_SECONDS))

    def __call__(self, costs: CostGraph, tolerance: float | None = None) -> Partition:
        """A partition, and one that fits if memory is limited; MemoryLimitError says what would do."""
        memory = self.options.memory
        chosen = self.options.tolerance if tolerance is None else tolerance
        found = None
        with suppress(MemoryLimitError):  # the partitioner counts activations, the program messages too
            found = self.cut(costs, chosen, memory)
        if found and (memory is None or self.fits(found, memory)):
            return found
        assert memory is not None
        return self.fitting(costs, memory, chosen, found)

    def cut(self, costs: CostGraph, tolerance: float, memory: int | None) -> Partition:
        """What the partitioner finds, within the memory as it counts."""
        return partition(
            costs,
            self.options.stages,
            tolerance=tolerance,
            memory=[max(1, left) for left in self.left(memory)] if memory else None,
            in_flight=in_flight(self.usual.rows, self.options.stages) if memory else None,
            placement=self.usual.shape.placement if memory else None,
            state_factor=2 + self.options.optimizer_factor,
            time_limit=SECONDS,
        )

    def fitting(self, costs: CostGraph, memory: int, tolerance: float, near: Partition | None) -> Partition:
        """A partition that fits, by the exact solver; MemoryLimitError says what would do, and whether that is proved."""
        if costs not in self.searches:
            self.searches[costs] = [Fitting.of(costs, self.options.stages, ranks) for ranks in self.ranks]
        searches = self.searches[costs]
        for search in searches:
            with self.allowance.share() as seconds:
                fit = search.lightest if search.needed <= memory else search.any(memory, seconds)
            if fit:
                self.allowance.seconds = min(self.allowance.seconds, POLISH_SECONDS)
                with self.allowance.share() as seconds:
                    return search.better(fit, memory, tolerance, seconds)
        near = near or self.cut(costs, tolerance, None)
        for search in searches:
            search.see(near)
            with self.allowance.share() as seconds:
                search.least(seconds)
            if search.lightest and search.needed <= memory:
                search.fit = search.lightest
                return search.fit
        needed, bound = min(search.needed for search in searches), min(search.bound for search in searches)
        proved = bound > memory and not self.adapts
        raise MemoryLimitError(_too_little(self.options.stages, memory, needed, bound if proved else None), needed)

    def timetable(self, found: Partition) -> Timetable:
        """The order in which a partition's program computes; MemoryLimitError if its schedule has none that fits.

        Where the order is made for the partition, and does not fit, it is that of equal stages if this one fits.
        """
        if not self.adapts:
            return self.usual
        if found not in self.made:
            options = self.options
            limits = self.left(options.memory, found) if options.memory else ()
            order = make_timetable(
                options.schedule, self.shape, None, found, options.link, limits, options.optimizer_factor
            )
            if options.memory and self.peak(found, order) > options.memory >= self.peak(found, self.usual):
                order = self.usual
            self.made[found] = order
        return self.made[found]

    def within(self, memory: int | None) -> Cutter:
        """One for another limit, which knows what was found by this one."""
        return replace(self, options=replace(self.options, memory=memory), made={})

    def last_timetable(self, finished: Partition, counted: Partition) -> Timetable:
        """The order for a partition whose stages are finished: what was made for it before, where none fits now."""
        try:
            return self.timetable(finished)
        except MemoryLimitError:
            return self.timetable(counted)

    def left(self, memory: int, found: Partition | None = None) -> tuple[int, ...]:
        """What of its memory each rank has for what is counted: all, where stages are finished."""
        if found and weighed(found):
            return (memory,) * self.options.ranks
        return tuple(memory - more for more in self.besides or (0,) * self.options.ranks)

    def fits(self, found: Partition, memory: int) -> bool:
        """Whether some order of the schedule keeps every rank within its memory."""
        if any(self.peak(found, order) <= memory for order in self.orders):
            return True
        with suppress(MemoryLimitError):
            return self.adapts and self.peak(found, self.timetable(found)) <= memory
        return False

    def peak(self, found: Partition, timetable: Timetable) -> int:
        """The most bytes that a rank holds in the program of a partition."""
        return self.most(peak_bytes(communicate(timetable, found), found, self.options.optimizer_factor), found)

    def most(self, peaks: tuple[int, ...], found: Partition) -> int:
        """The most that a rank holds if so much is counted."""
        return -min(left - held for left, held in zip(self.left(0, found), peaks))

    @property
    def adapts(self) -> bool:
        """Whether the order depends on the partition."""
        return find_schedule(self.options.schedule).adapts

    @cached_property
    def usual(self) -> Timetable:
        """The order for equal stages, without a limit of memory."""
        return make_timetable(self.options.schedule, self.shape)

    @cached_property
    def orders(self) -> tuple[Timetable, ...]:
        """The orders that do not depend on the partition, and that the schedule takes where they need less memory."""
        return leanest(self.shape) if self.options.schedule == "auto" else (self.usual,)

    @cached_property
    def ranks(self) -> tuple[Ranks, ...]:
        """What the exact solver must know of the ranks' memory, in each of the orders."""
        return tuple(map(self._ranks, self.orders))

    def _ranks(self, order: Timetable) -> Ranks:
        placement = order.shape.placement
        pairs = list(itertools.combinations(range(self.options.stages), 2))
        recomputed = [s for s, mode in enumerate(self.options.recompute) if mode != "none"]

        def in_program(found: Partition) -> tuple[Demand, ...]:
            ways = sorted({(t.source, t.target) for t in found.transfers})
            return demands(communicate(order, found).rows, placement, ways, recomputed)

        def peak(found: Partition) -> int:
            least = self.peak(found, order)
            if self.adapts and self.options.schedule != "auto":
                least = min(least, self.peak(found, self.timetable(found)))
            return least

        return Ranks(
            placement=placement,
            always=cache(lambda: demands(least_rows(order), placement, pairs, recomputed)),
            in_program=in_program,
            peak=peak,
            state_factor=2 + self.options.optimizer_factor,
            besides=self.besides,
            near=NEAR if self.besides else 0.0,
        )


def _too_little(stages: int, memory: int, needed: float, bound: float | None) -> str:
    """Why no partition fits: what would do, and the bound that was proved, if one was (None: none)."""
    remedy = "give more memory, use more ranks, or keep fewer microbatches in flight"
    if math.isinf(needed):
        return f"no partition into {stages} stages that fits in {memory} bytes for each rank was found; {remedy}"
    more = f"{needed:.0f} bytes for each rank would do, {needed - memory:.0f} more than its {memory}"
    if bound is None:
        return f"no partition into {stages} stages that fits in memory was found: {more}; {remedy}"
    proved = "less would not" if bound >= needed else f"less than {bound:.0f} would not"
    return f"no partition into {stages} stages fits in memory: {more}, and {proved}; {remedy}"


def with_shorter_step(parts: Split, cutter: Cutter) -> Split:
    """The split with the partition of its graph that gives the shortest simulated step over the link, if one is known."""
    options = cutter.options
    if options.stages == 1:
        return parts

    def step_ms(timetable: Timetable, found: Partition) -> float:
        try:
            program = communicate(timetable, found)
        except ProgramError:  # an order made for other ways between the stages
            return math.inf
        forecast = simulate(program, found, options.link, options.optimizer_factor)
        over = options.memory and cutter.most(forecast.peak_bytes, found) > options.memory
        return math.inf if over else forecast.step_ms

    def order(found: Partition) -> Score:
        try:
            timetable = cutter.timetable(found)
        except MemoryLimitError:
            return lambda other: math.inf
        return lambda other: step_ms(timetable, other)

    def cut(tolerance: float) -> Partition:
        return cutter(parts.costed.graph, tolerance)

    best = shorten(parts.costed.graph, parts.partition, order, cut if options.link else None, options.tolerance)
    return replace(parts, partition=best)
