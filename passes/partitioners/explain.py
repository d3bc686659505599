"""Why a partition is what it is: what crosses at each cut, what the next best cut would cost, and what sets the time.

The next best cut of a boundary is the cheapest of the minimum cuts in which one node beside the boundary is forced to
the other side, its neighbouring boundaries fixed, that breaks no limit: one flow for each such node.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pipecompile.ir import CostGraph, Partition
from pipecompile.passes.partitioners.cuts import Network, cut_network
from pipecompile.passes.partitioners.orders import neighbours
from pipecompile.passes.partitioners.problem import ROUNDING, Problem

FORCED = 16
"""So many nodes on each side of a boundary are tried."""


@dataclass(frozen=True, slots=True)
class NextBest:
    """Another cut of a boundary: the nodes that change sides (the first few by name), and the bytes and time it gives."""

    moves: tuple[str, ...]
    count: int
    more_bytes: float
    bottleneck_ms: float


@dataclass(frozen=True, slots=True)
class Cut:
    """A boundary between stages: the transfers that pass it as (name, from, to, bytes, gradient bytes)."""

    boundary: int
    bytes: int
    crossing: tuple[tuple[str, int, int, int, int], ...]
    next_best: NextBest | None


@dataclass(frozen=True, slots=True)
class Explanation:
    """The cuts, the slowest stage, the largest node and whether it alone is the bottleneck, and the gaps to the bounds."""

    cuts: tuple[Cut, ...]
    slowest: int
    largest: str
    largest_ms: float
    largest_is_bottleneck: bool
    shared: tuple[str, ...]
    time_gap: float
    bytes_gap: float | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        lines = []
        for cut in self.cuts:
            lines.append(f"cut {cut.boundary} | {cut.boundary + 1}: {cut.bytes} bytes")
            for name, source, target, size, gradient in cut.crossing:
                back = f", gradient {gradient}" if gradient else ""
                lines.append(f"    {name}: stage {source} > {target}, {size} bytes{back}")
            lines.append(f"    {_next_text(cut.next_best)}")
        alone = "is the bottleneck by itself" if self.largest_is_bottleneck else "is not the bottleneck by itself"
        lines.append(f"slowest: stage {self.slowest}; largest node: {self.largest}, {self.largest_ms:g} ms, {alone}")
        if self.shared:
            lines.append(f"in several stages: {', '.join(self.shared)}")
        lines.append(f"time: {_gap(self.time_gap)}; bytes: {_gap(self.bytes_gap)}")
        return "\n".join(lines)


def explain(graph: CostGraph, problem: Problem, found: Partition) -> Explanation:
    """Explain a partition of the graph that the problem was posed for."""
    largest = max(range(len(graph.nodes)), key=problem.load.__getitem__)
    took = problem.load[largest] / problem.speeds[found.stage[largest]]
    slowest = max(range(found.stages), key=lambda s: found.costs[s].total_ms)
    bytes_gap = found.bytes / found.bound_bytes - 1 if found.bound_bytes else (0.0 if not found.bytes else None)
    return Explanation(
        cuts=tuple(_cut(graph, problem, found, k) for k in range(found.stages - 1)),
        slowest=slowest,
        largest=graph.nodes[largest].name,
        largest_ms=problem.load[largest],
        largest_is_bottleneck=took >= found.bottleneck_ms * (1 - ROUNDING),
        shared=tuple(one.parameter for one in found.shared),
        time_gap=found.bottleneck_ms / found.bound_ms - 1 if found.bound_ms else 0.0,
        bytes_gap=bytes_gap,
    )


def _cut(graph: CostGraph, problem: Problem, found: Partition, k: int) -> Cut:
    crossing = [t for t in found.transfers if t.source <= k < t.target]
    crossing.sort(key=lambda t: -(t.bytes + t.gradient_bytes))
    return Cut(
        boundary=k,
        bytes=sum(t.bytes + t.gradient_bytes for t in crossing),
        crossing=tuple((t.value, t.source, t.target, t.bytes, t.gradient_bytes) for t in crossing),
        next_best=_next_best(graph, problem, found, k),
    )


def _next_best(graph: CostGraph, problem: Problem, found: Partition, k: int) -> NextBest | None:
    """The cheapest other cut between two stages inside the time that the tolerance leaves."""
    cap = max(found.bottleneck_ms, found.bound_ms * (1 + problem.tolerance))
    network = Network(cut_network(problem, found.stage, k, k + 1))
    options = []
    for inside, outside in _forced(problem, found.stage, k):
        smallest, largest = network.cut(inside, outside)
        for side in (smallest, largest):
            stage = list(found.stage)
            for v in network.members:
                stage[v] = k if v in side else k + 1
            if tuple(stage) != found.stage and problem.valid(stage, cap):
                options.append((problem.traffic(stage), stage))
    if not options:
        return None
    cost, stage = min(options)
    moved = [graph.nodes[v].name for v, s in enumerate(stage) if s != found.stage[v]]
    return NextBest(tuple(moved[:3]), len(moved), cost - problem.traffic(found.stage), max(problem.times(stage)))


def _forced(problem: Problem, stage: Sequence[int], k: int) -> list[tuple[set[int], set[int]]]:
    """The last nodes of stage k, each forced out with all of stage k+1 kept, and the first of stage k+1 the other way."""
    after, before = neighbours(problem)
    here = {v for v, s in enumerate(stage) if s == k}
    there = {v for v, s in enumerate(stage) if s == k + 1}
    last = [v for v in sorted(here) if all(u not in here for u in after[v])][-FORCED:]
    first = [v for v in sorted(there) if all(u not in there for u in before[v])][:FORCED]
    anchored, sink = {min(here)}, {max(there)}
    ways = [(anchored, there | {v}) for v in last if v not in anchored]
    return ways + [(here | {v}, sink) for v in first if v not in sink]


def _next_text(other: NextBest | None) -> str:
    if other is None:
        return "no other cut here is within the limits"
    more = f" and {other.count - len(other.moves)} more" if other.count > len(other.moves) else ""
    return (
        f"next best: {', '.join(other.moves)}{more} on the other side, "
        f"{other.more_bytes:+.0f} bytes, slowest stage {other.bottleneck_ms:.3f} ms"
    )


def _gap(gap: float | None) -> str:
    return (
        "no bound is proved" if gap is None else "at the proved bound" if gap < 1e-9 else f"{gap:.2%} above the bound"
    )
