"""Keeps every rank within its memory by what the finished stages take, of which the cutter only knows a count of parts.

    1  cut without a limit and see what the stages take (run or rehearsed): it may fit
    2  correct the count by that, cut within the limit, look again; a few times
    3  where nothing fits: the cuts that need least by the corrected count, which does not depend on the limit, so that
       what is found to be enough is enough when it is asked for

Where stages cannot be rehearsed, the cutter's own count is all there is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from pipecompile.calibration import Calibration
from pipecompile.compiled import Compiled
from pipecompile.errors import MemoryLimitError
from pipecompile.footprint import weighed
from pipecompile.machine import format_bytes

CUTS = 3
"""Cuts within the limit that are tried, each with what was learned of the last one."""

LIGHTEST = 2
"""Cuts that need least, each by what was learned of the last one."""

NEAR = 0.02
"""Where the lightest cut takes so little more than was counted, another count would hardly find a lighter one."""

Within = Callable[[int | None, Calibration], Compiled]
"""What compiles within a limit by the corrected count; MemoryLimitError if nothing does."""


def within_limit(within: Within, memory: int | None) -> Compiled:
    """What compiles so that no rank takes more than ``memory``; MemoryLimitError names what was seen to do."""
    plain = Calibration()
    free = within(None, plain)
    if memory is None or _most(free) <= memory:
        return free
    if not weighed(free.split.partition):
        return within(memory, plain)
    return _Search(within, memory, free).result()


@dataclass
class _Search:
    within: Within
    memory: int
    free: Compiled
    needed: dict[Calibration, float] = field(default_factory=dict)
    """The least that any cut needs by a count."""

    def result(self) -> Compiled:
        first = Calibration().after(self.free)
        fast = self._fast(first)
        if fast and self._fits(fast):
            return fast
        best = min([self.free, *([fast] if fast else []), *self._lightest(first)], key=_most)
        if self._fits(best):
            return best
        raise MemoryLimitError(_too_little(best, self.memory, least_bytes(self.free)), _most(best))

    def _fast(self, calibration: Calibration) -> Compiled | None:
        """The last of the fastest cuts that fit by the count."""
        found: list[Compiled] = []
        for _ in range(CUTS):
            cut = self._cut(self.memory, calibration)
            if cut is None or any(_same(cut, other) for other in found):
                break
            found.append(cut)
            if self._fits(cut):
                break
            calibration = calibration.after(cut).stricter(calibration)
        return found[-1] if found else None

    def _lightest(self, calibration: Calibration) -> list[Compiled]:
        found: list[Compiled] = []
        for _ in range(LIGHTEST):
            if calibration not in self.needed:
                self._cut(1, calibration)
            needed = self.needed.get(calibration, math.inf)
            cut = None if math.isinf(needed) else self._cut(int(needed), calibration)
            if cut is None:
                break
            found.append(cut)
            if self._fits(cut) or _most(cut) <= (1 + NEAR) * needed:
                break
            calibration = calibration.after(cut)
        return found

    def _cut(self, memory: int, calibration: Calibration) -> Compiled | None:
        try:
            return self.within(memory, calibration)
        except MemoryLimitError as error:
            self.needed[calibration] = error.needed
            return None

    def _fits(self, found: Compiled) -> bool:
        return _most(found) <= self.memory


def _most(found: Compiled) -> int:
    return max(found.forecast.peak_bytes)


def _same(one: Compiled, other: Compiled) -> bool:
    return one.sources == other.sources


def least_bytes(found: Compiled) -> int:
    """What some rank holds in every partition: an equal share of parameters, gradients and optimizer state, or the
    largest parameter's.
    """
    factor = found.options.optimizer_factor
    parameters = {p.name: p for node in found.split.costed.graph.nodes for p in node.parameters}.values()
    sizes = [
        p.bytes + int(p.bytes * p.trainable * (1 + factor)) + p.master_bytes + int(p.master_bytes / 2 * (1 + factor))
        for p in parameters
    ]
    return max(-(-sum(sizes) // found.options.ranks), *sizes, 0)


def _too_little(best: Compiled, memory: int, least: int) -> str:
    needed = _most(best)
    rank = best.forecast.peak_bytes.index(needed)
    state = "parameters, gradients and optimizer state alone"
    proved = f"; less than {least} would not, for {state}" if least > memory else ""
    return (
        f"no partition into {best.options.stages} stages that fits in memory was found: {needed} bytes for each rank "
        f"would do ({format_bytes(needed)}, for rank {rank}), {needed - memory} more than its {memory}{proved}; "
        "give more memory, use more ranks, or keep fewer microbatches in flight"
    )
