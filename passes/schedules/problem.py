"""A step as a scheduling problem: what every task takes, what it waits for, and how many activations each rank may hold.

A task is a letter, a stage and a microbatch: F a forward, I and W the two halves of a backward. Tasks of one letter and
stage run in the order of their microbatches, which loses nothing because microbatches cost the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipecompile.ir import COMPUTE, Instruction, Routes, Shape, Timetable
from pipecompile.memory import standing_bytes
from pipecompile.passes.schedules import Rows, Setting

Task = tuple[str, int, int]
TaskRows = list[list[Task]]
Lags = tuple[tuple[tuple[int, float], ...], ...]
"""For each stage, the stages that it waits for, and how long their message takes."""

OP = {letter: op for op, letter in COMPUTE.items()}


@dataclass(frozen=True, slots=True)
class Problem:
    """Times in ms for each stage; ``sizes`` what an activation of each stage weighs against the ``caps`` of its rank."""

    shape: Shape
    times: Mapping[str, tuple[float, ...]]
    reads: Lags
    returns: Lags
    sizes: tuple[float, ...]
    caps: tuple[float, ...]

    @staticmethod
    def of(shape: Shape, setting: Setting) -> Problem:
        """Activations weigh their bytes, messages included; the caps are what parameters and gradients leave free."""
        costs = setting.costs
        placement, link = shape.placement, setting.link
        routes = Routes.of(setting.partition).routes
        crossing = [r for r in routes if placement[r.source] != placement[r.target]]

        def lag(source: int, target: int, size: int) -> float:
            return 0.0 if placement[source] == placement[target] else link.latency_ms + link.occupied_ms(size)

        stages = range(shape.stages)
        return Problem(
            shape,
            times={
                "F": tuple(cost.forward_ms for cost in costs),
                "I": tuple(cost.backward_ms - cost.weight_ms for cost in costs),
                "W": tuple(cost.weight_ms for cost in costs),
            },
            reads=tuple(tuple((r.source, lag(r.source, s, r.bytes)) for r in routes if r.target == s) for s in stages),
            returns=tuple(
                tuple((r.target, lag(s, r.target, r.gradient_bytes)) for r in routes if r.source == s and r.gradients)
                for s in stages
            ),
            sizes=tuple(
                float(costs[s].saved_bytes + sum(r.bytes for r in crossing if s in (r.source, r.target)))
                for s in stages
            ),
            caps=_caps(shape, setting),
        )

    def counted(self, cap: int) -> Problem:
        """The same problem where each activation counts 1 and every rank may hold ``cap`` of them."""
        ones = (1.0,) * self.shape.stages
        return Problem(self.shape, self.times, self.reads, self.returns, ones, (float(cap),) * self.shape.ranks)

    @property
    def lower_bound(self) -> float:
        """No order ends before a rank has got its first input and done all its work."""
        heads = self._heads()
        totals = [0.0] * self.shape.ranks
        first = [math.inf] * self.shape.ranks
        for stage, rank in enumerate(self.shape.placement):
            totals[rank] += self.shape.microbatches * sum(self.times[letter][stage] for letter in "FIW")
            first[rank] = min(first[rank], heads[stage])
        return max(head + total for head, total in zip(first, totals))

    def _heads(self) -> list[float]:
        heads: list[float] = []
        for reads in self.reads:
            heads.append(max((heads[s] + self.times["F"][s] + lag for s, lag in reads), default=0.0))
        return heads

    def fits(self, row: Sequence[Task], rank: int) -> bool:
        """Whether a row never holds more than its rank may."""
        held = 0.0
        for letter, stage, _ in row:
            if letter == "F":
                held += self.sizes[stage]
                if held > self.caps[rank]:
                    return False
            elif letter == "W":
                held -= self.sizes[stage]
        return True

    def instructions(self, rows: Sequence[Sequence[Task]]) -> Rows:
        """Instructions for tasks; an input half with its weight half behind it is a whole backward if none waits for it."""
        return tuple(tuple(self._joined(row)) for row in rows)

    def _joined(self, row: Sequence[Task]) -> list[Instruction]:
        new: list[Instruction] = []
        for letter, stage, microbatch in row:
            alone = not self.reads[stage] or self.times["W"][stage] == 0
            if letter == "W" and alone and new[-1] == Instruction(OP["I"], stage, microbatch):
                new[-1] = Instruction(OP["B"], stage, microbatch)
            else:
                new.append(Instruction(OP[letter], stage, microbatch))
        return new


def _caps(shape: Shape, setting: Setting) -> tuple[float, ...]:
    if not setting.limits:
        return (math.inf,) * shape.ranks
    empty = Timetable("", shape, ())
    gradients = [0] * shape.ranks
    for route in Routes.of(setting.partition).routes:
        for stage in (route.source, route.target):
            gradients[shape.placement[stage]] += route.gradient_bytes
    standing = standing_bytes(empty, setting.partition, setting.optimizer_factor)
    return tuple(float(limit - held - extra) for limit, held, extra in zip(setting.limits, standing, gradients))
