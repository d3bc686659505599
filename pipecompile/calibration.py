"""Corrects the count of a cut's parts by what the finished stages of another cut took.

The cutter adds up what the nodes save; a stage keeps some more or less of each, and needs room besides: for messages, the
batch, the gradients and intermediate values of a moment, libraries. So saved bytes are multiplied by one factor, and what
is left over is added on each rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self, TypeVar

from pipecompile.compiled import Compiled
from pipecompile.cost import Costed
from pipecompile.ir import CostNode, Graph, Partition, StageCost
from pipecompile.memory import in_flight, peak_bytes

Cost = Callable[[Graph], Costed]
Sized = TypeVar("Sized", CostNode, StageCost)


@dataclass(frozen=True, slots=True)
class Calibration:
    """``saved`` is a factor of what nodes save; ``besides`` are bytes that each rank takes more (empty: none)."""

    saved: float = 1.0
    besides: tuple[int, ...] = ()

    def after(self, found: Compiled) -> Self:
        """Corrected by a cut whose stages were weighed, and whose nodes were counted by this calibration."""
        counted = _without_uses(found.split.partition)
        saved = self.saved
        if not self.besides:
            saved = _factor(found)
            counted = replace(counted, costs=tuple(_times(cost, saved) for cost in counted.costs))
        peaks = peak_bytes(found.program, counted, found.options.optimizer_factor)
        return replace(self, saved=saved, besides=tuple(a - b for a, b in zip(found.forecast.peak_bytes, peaks)))

    def stricter(self, other: Self) -> Self:
        """With the most that each rank takes by either, whose factors are the same."""
        return replace(self, besides=tuple(map(max, self.besides, other.besides)))

    def over(self, cost: Cost) -> Cost:
        """Makes cost graphs with corrected bytes."""

        def corrected(graph: Graph) -> Costed:
            costed = cost(graph)
            whole = costed.graph
            nodes = self._corrected(whole.nodes)
            staged = tuple(nodes if found is whole.nodes else self._corrected(found) for found in whole.staged)
            return replace(costed, graph=replace(whole, nodes=nodes, staged=staged))

        return corrected if self.besides else cost

    def _corrected(self, nodes: tuple[CostNode, ...]) -> tuple[CostNode, ...]:
        return tuple(_times(node, self.saved) for node in nodes)


def _without_uses(partition: Partition) -> Partition:
    return replace(partition, costs=tuple(replace(cost, uses=()) for cost in partition.costs))


def _factor(found: Compiled) -> float:
    """What the stages keep of their microbatches over what their nodes were counted to save."""
    kept = saved = 0
    costs = found.split.partition.costs
    for cost, flying in zip(costs, in_flight(found.program.rows, len(costs))):
        if cost.saved_bytes:
            uses = [use for use in cost.uses if use.op in ("FORWARD", "SEND_F") and not use.first]
            kept += flying * sum(use.after for use in uses)
            saved += flying * cost.saved_bytes
    return max(kept, 0) / saved if saved else 1.0


def _times(cost: Sized, factor: float) -> Sized:
    return replace(
        cost,
        saved_bytes=round(factor * cost.saved_bytes),
        recomputed_bytes=round(factor * cost.recomputed_bytes),
    )
