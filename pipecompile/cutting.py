"""How a model is cut for its schedule: what the partitioner must know of it, and the step that a partition gives."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property

from pipecompile.compiled import Compiled, Options
from pipecompile.errors import MemoryLimitError, ProgramError
from pipecompile.ir import CostGraph, Partition, Shape, Timetable
from pipecompile.memory import Demand, demands, in_flight, least_rows, peak_bytes
from pipecompile.passes.communicate import communicate
from pipecompile.passes.opening import Split
from pipecompile.passes.partitioners import partition
from pipecompile.passes.partitioners.fitting import Fitting, Ranks
from pipecompile.passes.schedules import find_schedule, make_timetable
from pipecompile.passes.schedules.auto import serial
from pipecompile.passes.shorten import Score, shorten
from pipecompile.simulate import simulate

SECONDS = 2.0
"""For each call of the partitioner: a model's graph is cut several times while calls are opened."""

FIT_SECONDS = 10.0
"""For a proof that nothing fits in memory, or a partition that does, where the partitioner finds none in its time."""

BUDGETS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)
"""Shares of the memory that the partitioner is given: it counts activations, the program messages too."""


@dataclass(frozen=True)
class Cutter:
    """Cuts cost graphs for a schedule, within the memory of each rank by the count of the program that is made of them."""

    options: Options
    shape: Shape
    made: dict[Partition, Timetable] = field(default_factory=dict)
    """The orders that were made for partitions."""

    def __call__(self, costs: CostGraph, tolerance: float | None = None) -> Partition:
        """A partition, and one that fits if memory is limited; MemoryLimitError says what would do."""
        options = self.options
        chosen = options.tolerance if tolerance is None else tolerance
        costs = replace(costs, recompute="stage" if options.recomputes_stages else "none")
        if options.memory is None or options.recomputes_parts:  # these are chosen in the finished cut
            return partition(costs, options.stages, tolerance=chosen, time_limit=SECONDS)
        for share in BUDGETS:
            try:
                found = partition(
                    costs,
                    options.stages,
                    tolerance=chosen,
                    memory=int(share * options.memory),
                    in_flight=in_flight(self.usual.rows, options.stages),
                    placement=self.usual.shape.placement,
                    state_factor=2 + options.optimizer_factor,
                    time_limit=SECONDS,
                )
            except MemoryLimitError:
                break
            if self.fits(found):
                return found
        return self.fitting(costs, options.memory, chosen)

    def fitting(self, costs: CostGraph, memory: int, tolerance: float) -> Partition:
        """A partition that fits, by the exact solver; MemoryLimitError says what would do, and whether that is proved."""
        search = Fitting.of(costs, self.options.stages, self.ranks, tolerance)
        found, proved = search.any(memory, FIT_SECONDS)
        if found:
            return search.better(found, memory, 2 * SECONDS)
        needed, bound = search.least(FIT_SECONDS)
        raise MemoryLimitError(
            _too_little(self.options.stages, memory, needed, bound if proved and not self.adapts else None), needed
        )

    def timetable(self, found: Partition) -> Timetable:
        """The order in which a partition's program computes; MemoryLimitError if its schedule has none that fits."""
        if not self.adapts:
            return self.usual
        if found not in self.made:
            options = self.options
            limits = (options.memory,) * options.ranks if options.memory else ()
            self.made[found] = make_timetable(
                options.schedule, self.shape, None, found, options.link, limits, options.optimizer_factor
            )
        return self.made[found]

    def fits(self, found: Partition) -> bool:
        """Whether some order of the schedule keeps every rank within its memory."""
        memory = self.options.memory or math.inf
        with suppress(MemoryLimitError):
            return self.peak(found, self.smallest(found)) <= memory or (
                self.options.schedule == "auto" and self.peak(found, self.timetable(found)) <= memory
            )
        return False

    def peak(self, found: Partition, timetable: Timetable) -> int:
        """The most bytes that a rank holds in the program of a partition."""
        return max(peak_bytes(communicate(timetable, found), found, self.options.optimizer_factor))

    def smallest(self, found: Partition) -> Timetable:
        """The order that needs least memory: auto can run one microbatch after the other, others have but one."""
        return serial(self.shape) if self.options.schedule == "auto" else self.timetable(found)

    @property
    def adapts(self) -> bool:
        """Whether the order depends on the partition."""
        return find_schedule(self.options.schedule).adapts

    @cached_property
    def usual(self) -> Timetable:
        """The order for equal stages, without a limit of memory."""
        return make_timetable(self.options.schedule, self.shape)

    @cached_property
    def ranks(self) -> Ranks:
        """What the exact solver must know of the ranks' memory."""
        least = serial(self.shape) if self.options.schedule == "auto" else self.usual
        placement = least.shape.placement
        pairs = list(itertools.combinations(range(self.options.stages), 2))

        def in_program(found: Partition) -> tuple[Demand, ...]:
            ways = sorted({(t.source, t.target) for t in found.transfers})
            return demands(communicate(self.smallest(found), found).rows, placement, ways)

        return Ranks(
            placement=placement,
            always=demands(least_rows(least), placement, pairs),
            in_program=in_program,
            peak=lambda found: self.peak(found, self.smallest(found)),
            state_factor=2 + self.options.optimizer_factor,
        )


def less_memory(within: Callable[[int | None], Compiled], memory: int | None) -> Compiled:
    """What ``within`` gives for the memory of a rank, or for less where the stages, once run, need more than was counted.

    MemoryLimitError if they need too much all the same.
    """
    first = found = within(memory)
    for share in BUDGETS[1:]:
        if memory is None or max(found.forecast.peak_bytes) <= memory:
            return found
        try:
            found = within(int(share * memory))
        except MemoryLimitError:
            break
    assert memory is not None
    if max(found.forecast.peak_bytes) <= memory:
        return found
    needed = max(first.forecast.peak_bytes)
    raise MemoryLimitError(
        f"rank {first.forecast.peak_bytes.index(needed)} needs {needed} bytes, {needed - memory} more than its {memory}, "
        "as was seen when its stages ran; give more memory, use more stages, smaller microbatches, or a schedule with "
        "fewer activations in flight",
        needed,
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
        return math.inf if options.memory and max(forecast.peak_bytes) > options.memory else forecast.step_ms

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
