"""Cut a cost graph into stages: ``partition`` is the one entry, ``evaluate`` says what a given stage map costs.

A partitioner is a function from a Problem to an Answer, in a file of this folder, found by the name it is registered
under: ``@partitioner("mincut")``. It gives None where it found no partition.
"""

from __future__ import annotations

import importlib
import math
import pkgutil
from collections.abc import Callable, Sequence
from typing import TypedDict, Unpack

from pipecompile.errors import MemoryLimitError, PartitionError
from pipecompile.ir import CostGraph, Partition, Shared, StageCost, Transfer
from pipecompile.passes.partitioners.problem import Answer, Limits, Problem, make

Partitioner = Callable[[Problem], Answer | None]
_REGISTERED: dict[str, Partitioner] = {}


def partitioner(name: str) -> Callable[[Partitioner], Partitioner]:
    """Register a partitioner under a name."""

    def register(function: Partitioner) -> Partitioner:
        _REGISTERED[name] = function
        return function

    return register


def partitioners() -> dict[str, Partitioner]:
    """Every partitioner of this folder by name."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return dict(sorted(_REGISTERED.items()))


class Asked(TypedDict, total=False):
    """What may be asked of a partition besides the stages.

    tolerance     of the slowest stage's time, over the least, for the sake of fewer bytes (0.05)
    memory        each rank's limit in bytes (one number: the same for all; none: no limit)
    in_flight     for each stage, of how many microbatches it holds the saved activations (1F1B's)
    placement     the rank of each stage (its own)
    state_factor  how many times its trainable parameters a stage holds: weight, gradient, two moments (4)
    speeds        the devices' relative speeds, one for each stage (equal)
    bandwidths    relative ones of the links between stages s and s+1 (equal)
    time_limit    in seconds (12)
    """

    tolerance: float
    memory: int | Sequence[int] | None
    in_flight: Sequence[int] | None
    placement: Sequence[int] | None
    state_factor: float
    speeds: Sequence[float] | None
    bandwidths: Sequence[float] | None
    time_limit: float


def partition(graph: CostGraph, stages: int, *, method: str = "default", **asked: Unpack[Asked]) -> Partition:
    """Cut a graph into stages: the least time of the slowest stage, then the fewest bytes within the tolerance."""
    problem = pose(graph, stages, **asked)
    return evaluate_answer(graph, problem, solve(problem, method))


def pose(graph: CostGraph, stages: int, **asked: Unpack[Asked]) -> Problem:
    """The problem that ``partition`` solves for these arguments; PartitionError names what is wrong with one."""
    speeds, bandwidths = asked.get("speeds"), asked.get("bandwidths")
    tolerance = asked.get("tolerance", 0.05)
    _check(graph, stages, tolerance, speeds, bandwidths)
    return make(
        graph,
        stages,
        tolerance=tolerance,
        speeds=speeds,
        bandwidths=bandwidths,
        limits=_limits(stages, asked.get("memory"), asked.get("in_flight"), asked.get("placement")),
        state_factor=asked.get("state_factor", 4.0),
        time_limit=asked.get("time_limit", 12.0),
    )


def solve(problem: Problem, method: str = "default") -> Answer:
    """What a partitioner finds; PartitionError if it finds nothing, MemoryLimitError if memory is the reason."""
    known = partitioners()
    if method not in known:
        raise PartitionError(f"partitioner {method!r} is unknown; expected one of {', '.join(known)}")
    from pipecompile.passes.partitioners.large import LARGE, cut_large  # it imports partitioners, which register here

    cut = known[method]
    answer = cut_large(problem, cut) if problem.nodes > LARGE and method != "exact" else cut(problem)
    if answer is None:
        kind, why = (MemoryLimitError, "the memory") if problem.limits else (PartitionError, "the time limit")
        raise kind(f"{method} found no partition into {problem.stages} stages within {why}; try --method default")
    return answer


def evaluate_answer(graph: CostGraph, problem: Problem, answer: Answer) -> Partition:
    """The partition that an answer means. Where links differ it bounds weighted bytes, which bound no plain ones."""
    equal = all(link == 1.0 for link in problem.links)
    return evaluate(
        graph,
        answer.stage,
        stages=problem.stages,
        speeds=None if graph.staged else problem.speeds,
        bound_ms=0.0 if graph.staged else answer.bound_ms,
        bound_bytes=math.ceil(answer.bound_bytes * (1 - 1e-9)) if equal else 0,
    )


def _check(
    graph: CostGraph,
    stages: int,
    tolerance: float,
    speeds: Sequence[float] | None,
    bandwidths: Sequence[float] | None,
) -> None:
    nodes = len(graph.nodes)
    if stages < 1:
        raise PartitionError(f"{stages} stages asked for, expected at least 1")
    if stages > nodes:
        raise PartitionError(
            f"{stages} stages asked for, but graph {graph.name!r} has {nodes} nodes: at most {nodes} stages are possible"
        )
    if not (tolerance >= 0 and math.isfinite(tolerance)):
        raise PartitionError(f"the tolerance is {tolerance}, expected a number >= 0 such as 0.05")
    for what, values, expected in (("speeds", speeds, stages), ("bandwidths", bandwidths, stages - 1)):
        if values is None:
            continue
        if len(values) != expected:
            raise PartitionError(f"{len(values)} {what} given for {stages} stages, expected {expected}")
        bad = [value for value in values if not (value > 0 and math.isfinite(value))]
        if bad:
            raise PartitionError(f"one of the {what} is {bad[0]}, expected numbers > 0")


def _limits(
    stages: int,
    memory: int | Sequence[int] | None,
    in_flight: Sequence[int] | None,
    placement: Sequence[int] | None,
) -> Limits | None:
    if memory is None:
        return None
    rank = tuple(placement) if placement is not None else tuple(range(stages))
    flying = tuple(in_flight) if in_flight is not None else tuple(stages - s for s in range(stages))
    for what, values in (("placement", rank), ("in_flight", flying)):
        if len(values) != stages:
            raise PartitionError(f"{what} has {len(values)} entries for {stages} stages, expected one for each")
    ranks = max(rank) + 1
    given = (memory,) if isinstance(memory, int) else tuple(memory)
    limit = given * ranks if len(given) == 1 else given
    if len(limit) != ranks:
        raise PartitionError(f"{len(limit)} memory limits given for {ranks} ranks, expected one number or {ranks}")
    return Limits(limit, rank, flying)


def evaluate(
    graph: CostGraph,
    stage: Sequence[int],
    *,
    stages: int | None = None,
    speeds: Sequence[float] | None = None,
    bound_ms: float = 0.0,
    bound_bytes: int = 0,
) -> Partition:
    """What a stage map costs: each stage's time (on its device) and bytes, transfers, and shared parameters."""
    if len(stage) != len(graph.nodes):
        raise PartitionError(f"{len(stage)} stages given for the {len(graph.nodes)} nodes of graph {graph.name!r}")
    count = max(stage, default=0) + 1 if stages is None else stages
    outside = [s for s in stage if not 0 <= s < count]
    if outside:
        raise PartitionError(f"stage {outside[0]} is out of range, expected 0 to {count - 1}")
    for u, v in graph.edges:
        if stage[u] > stage[v]:
            names = f"{graph.nodes[u].name!r} (stage {stage[u]}) to {graph.nodes[v].name!r} (stage {stage[v]})"
            raise PartitionError(f"the edge from {names} goes back; a node's stage must not be after its readers'")
    return Partition(
        graph=graph.name,
        stages=count,
        stage=tuple(stage),
        costs=tuple(stage_cost(graph, stage, s, speeds[s] if speeds else 1.0) for s in range(count)),
        transfers=_transfers(graph, stage),
        shared=_shared(graph, stage),
        bound_ms=bound_ms,
        bound_bytes=bound_bytes,
    )


def stage_cost(graph: CostGraph, stage: Sequence[int], s: int, speed: float = 1.0) -> StageCost:
    """What stage ``s`` costs when node v of ``graph`` is in stage ``stage[v]``."""
    nodes = [node for node, at in zip(graph.nodes_in(s), stage) if at == s]
    parameters = {p.name: p for node in nodes for p in node.parameters}.values()
    again = [node.recomputed_bytes for node in nodes]
    return StageCost(
        forward_ms=sum(node.forward_ms for node in nodes) / speed,
        backward_ms=sum(node.backward_ms for node in nodes) / speed,
        weight_ms=sum(node.weight_ms for node in nodes) / speed,
        parameter_bytes=sum(p.bytes for p in parameters),
        trainable_bytes=sum(p.bytes for p in parameters if p.trainable),
        saved_bytes=sum(node.saved_bytes for node in nodes),
        master_bytes=sum(p.master_bytes for p in parameters),
        recomputed_bytes=sum(again) if graph.mode_of(s) == "stage" else max(again, default=0),
    )


def _transfers(graph: CostGraph, stage: Sequence[int]) -> tuple[Transfer, ...]:
    """One for each tensor and other stage; a gradient (kind "B") belongs to the transfer from low to high stage."""
    found = []
    for t in graph.tensors:
        home = stage[t.source]
        for other in sorted({stage[v] for v in t.targets} - {home}):
            if home < other:
                found.append(Transfer(t.name, home, other, t.bytes, t.gradient_bytes))
            else:
                found.append(Transfer(t.name, other, home, t.gradient_bytes, t.bytes))
    return tuple(found)


def _shared(graph: CostGraph, stage: Sequence[int]) -> tuple[Shared, ...]:
    homes: dict[str, set[int]] = {}
    size: dict[str, int] = {}
    for node, s in zip(graph.nodes, stage):
        for p in node.parameters:
            if p.trainable:
                homes.setdefault(p.name, set()).add(s)
                size[p.name] = p.bytes
    return tuple(Shared(name, tuple(sorted(where)), size[name]) for name, where in homes.items() if len(where) > 1)
