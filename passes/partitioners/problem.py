"""A cost graph as partitioners see it: numbers by node position, the limits, and what a stage map costs under them.

What is minimised, in this order: the time T of the slowest stage, ``max over s of load(s) / speeds[s]``; then, among the
stage maps with T ≤ (1 + tolerance) · T_best, the traffic: every tensor pays its bytes once for each other stage that
reads it, times the cost of the slowest link on the way (1 for the fastest link). Memory for each rank is a hard limit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from pipecompile.ir import CostGraph

ROUNDING = 1e-9
"""Sums of the same times in another order differ by this much (relative)."""
SMALL_GAP = 0.005
CLOSE = 1e-6
"""A relative gap between a time and its bound that counts as none."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Memory of each rank, the rank of each stage, and how many microbatches a stage keeps activations of."""

    memory: tuple[int, ...]
    rank: tuple[int, ...]
    in_flight: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Problem:
    """``tensors`` are (source, targets, bytes); ``weights`` are (bytes that a stage holds, the nodes that need them)."""

    stages: int
    load: tuple[float, ...]
    edges: tuple[tuple[int, int], ...]
    tensors: tuple[tuple[int, tuple[int, ...], int], ...]
    weights: tuple[tuple[int, tuple[int, ...]], ...]
    saved: tuple[int, ...]
    speeds: tuple[float, ...]
    links: tuple[float, ...]
    limits: Limits | None = None
    tolerance: float = 0.05
    time_limit: float = 12.0
    cap: float = float("inf")
    """A time that no stage should take more than, if there is a partition without."""

    @property
    def nodes(self) -> int:
        return len(self.load)

    def times(self, stage: Sequence[int]) -> list[float]:
        """Time of each stage."""
        total = [0.0] * self.stages
        for node, s in enumerate(stage):
            total[s] += self.load[node]
        return [load / speed for load, speed in zip(total, self.speeds)]

    def link(self, one: int, other: int) -> float:
        """What a byte costs between two stages: the slowest link on the way counts."""
        low, high = min(one, other), max(one, other)
        return max(self.links[low:high], default=0.0)

    def traffic(self, stage: Sequence[int]) -> float:
        """Bytes that cross, each times what its link costs; plain bytes where all links are equal."""
        total = 0.0
        for source, targets, size in self.tensors:
            home = stage[source]
            for other in {stage[v] for v in targets} - {home}:
                total += size * self.link(home, other)
        return total

    def held(self, stage: Sequence[int]) -> list[int]:
        """Memory of each rank in bytes; empty if there is no limit."""
        if self.limits is None:
            return []
        rank, in_flight = self.limits.rank, self.limits.in_flight
        total = [0] * len(self.limits.memory)
        for node, s in enumerate(stage):
            total[rank[s]] += self.saved[node] * in_flight[s]
        for size, nodes in self.weights:
            for s in {stage[node] for node in nodes}:
                total[rank[s]] += size
        return total

    def fits(self, stage: Sequence[int]) -> bool:
        """Whether every rank has the memory for its stages."""
        return self.limits is None or all(h <= m for h, m in zip(self.held(stage), self.limits.memory))

    def valid(self, stage: Sequence[int], cap: float) -> bool:
        """Whether a stage map breaks nothing: order, no empty stage, time ≤ cap, memory."""
        return (
            set(stage) == set(range(self.stages))
            and all(stage[u] <= stage[v] for u, v in self.edges)
            and max(self.times(stage)) <= cap * (1 + ROUNDING)
            and self.fits(stage)
        )

    def least_time(self) -> float:
        """A bound that needs no search: the whole at full balance, or the largest node on the fastest device."""
        return max(sum(self.load) / sum(self.speeds), max(self.load, default=0.0) / max(self.speeds))


@dataclass(frozen=True, slots=True)
class Answer:
    """A stage for every node, and lower bounds of time and traffic that were proved on the way (0: none)."""

    stage: tuple[int, ...]
    bound_ms: float = 0.0
    bound_bytes: float = 0.0


def time_cap(problem: Problem, quick: Answer) -> float:
    """The time every stage may take, from the least time found. A small gap to the bound is not used, so that the cap
    is within the tolerance of the optimum whatever that is; where the gap is larger the time found is believed."""
    found, tolerance = max(problem.times(quick.stage)), 1 + problem.tolerance
    small_gap = found * (1 - SMALL_GAP) <= quick.bound_ms < found * (1 - CLOSE)
    cap = quick.bound_ms * tolerance if small_gap else found * tolerance
    return max(found, min(cap, problem.cap))


def make(
    graph: CostGraph,
    stages: int,
    *,
    tolerance: float = 0.05,
    speeds: Sequence[float] | None = None,
    bandwidths: Sequence[float] | None = None,
    limits: Limits | None = None,
    state_factor: float = 4.0,
    time_limit: float = 12.0,
) -> Problem:
    """The problem that a cost graph poses; an activation's readers come after its maker, edge or not.

    Stages that recompute differently are slower by what their recomputation would add to the whole graph, and are taken to
    save what the one that saves least does.
    """
    edges = dict.fromkeys(graph.edges)
    edges |= dict.fromkeys((t.source, v) for t in graph.tensors if t.kind == "F" for v in t.targets if t.source < v)
    tensors: dict[tuple[int, tuple[int, ...]], int] = {}
    for t in graph.tensors:
        key = (t.source, tuple(sorted(set(t.targets) - {t.source})))
        if key[1] and t.total_bytes:
            tensors[key] = tensors.get(key, 0) + t.total_bytes
    load = tuple(node.forward_ms + node.backward_ms for node in graph.nodes)
    if graph.staged:
        again = [sum(node.forward_ms + node.backward_ms for node in nodes) for nodes in graph.staged]
        speeds = [min(again) / one if one else 1.0 for one in again]
    fastest = max(bandwidths, default=1.0) if bandwidths else 1.0
    return Problem(
        stages=stages,
        load=load,
        edges=tuple(edges),
        tensors=tuple((source, targets, size) for (source, targets), size in tensors.items()),
        weights=_weights(graph, state_factor),
        saved=tuple(min(n.saved_bytes for n in kinds) for kinds in zip(*(graph.staged or [graph.nodes]))),
        speeds=tuple(speeds) if speeds else (1.0,) * stages,
        links=tuple(fastest / b for b in bandwidths) if bandwidths else (1.0,) * (stages - 1),
        limits=limits,
        tolerance=tolerance,
        time_limit=time_limit,
    )


def _weights(graph: CostGraph, state_factor: float) -> tuple[tuple[int, tuple[int, ...]], ...]:
    users: dict[str, list[int]] = {}
    size: dict[str, int] = {}
    for position, node in enumerate(graph.nodes):
        for p in node.parameters:
            users.setdefault(p.name, []).append(position)
            trained = (p.master_bytes or p.bytes) if p.trainable else 0
            size[p.name] = p.bytes + p.master_bytes + round(trained * (state_factor - 1))
    return tuple((size[name], tuple(nodes)) for name, nodes in users.items() if size[name])


def contract(problem: Problem, group: Sequence[int]) -> Problem:
    """The problem in which the nodes of a group (numbered in topological order) are one node."""
    count = max(group) + 1
    load, saved = [0.0] * count, [0] * count
    for node, g in enumerate(group):
        load[g] += problem.load[node]
        saved[g] += problem.saved[node]
    tensors: dict[tuple[int, tuple[int, ...]], int] = {}
    for source, targets, size in problem.tensors:
        key = (group[source], tuple(sorted({group[v] for v in targets} - {group[source]})))
        if key[1]:
            tensors[key] = tensors.get(key, 0) + size
    weights: dict[tuple[int, ...], int] = {}
    for size, nodes in problem.weights:
        users = tuple(sorted({group[v] for v in nodes}))
        weights[users] = weights.get(users, 0) + size
    edges = dict.fromkeys((group[u], group[v]) for u, v in problem.edges if group[u] != group[v])
    return replace(
        problem,
        load=tuple(load),
        saved=tuple(saved),
        edges=tuple(edges),
        tensors=tuple((source, targets, size) for (source, targets), size in tensors.items()),
        weights=tuple((size, users) for users, size in weights.items()),
    )
