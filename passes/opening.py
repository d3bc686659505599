"""Splits coarse to fine: opens a module's call only where a finer cut pays.

At first every call that makes more than a stage's fair share is opened. Then, as long as it shortens the slowest stage
by more than 2 %, the calls on both sides of each cut and the largest of the slowest stage are opened one level, and
those that end up whole in one stage are closed again.

    1/6 each, 4 stages:  | 0 1 | 2 3 | 4 | 5 |      slowest 2/6
    calls 1, 3, 4 open:  | 0 1½ | ½2 3.. | ..       slowest 1/4 and a little
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass

from pipecompile.cost import Costed
from pipecompile.errors import MemoryLimitError, PartitionError
from pipecompile.ir import Call, CostGraph, Graph, Node, Partition
from pipecompile.passes.lift import lift, openable
from pipecompile.passes.streams import random_modules

WORTH = 0.02
Cost = Callable[[Graph], Costed]
Cut = Callable[[CostGraph], Partition]


@dataclass(frozen=True, slots=True)
class Split:
    """A lifted graph, its costs, and a stage for each of its nodes. ``gains`` tells what each round of opening gained.

    ``alike`` has for each stage the first that is equal to it, ``kernels`` those that its memory was told with (empty:
    it was not told without running it).
    """

    graph: Graph
    costed: Costed
    partition: Partition
    gains: tuple[str, ...] = ()
    random: tuple[str, ...] = ()
    alike: tuple[int, ...] = ()
    kernels: tuple[str, ...] = ()

    @property
    def stage_of(self) -> dict[str, int]:
        """The stage of each node of the graph that is not replicated."""
        return {name: self.partition.stage[place] for name, place in self.costed.cost_node.items()}


def split(graph: Graph, stages: int, cost: Cost, cut: Cut) -> Split:
    """Lift ``graph`` as finely as ``stages`` equal stages need, and cut it. PartitionError if that is not possible."""

    def attempt(opened: frozenset[str]) -> Split:
        lifted = lift(graph, opened)
        costed = cost(lifted)
        if len(costed.members) < stages:
            raise PartitionError(_too_few(lifted, costed, stages))
        return Split(lifted, costed, cut(costed.graph))

    known = openable(graph)
    opened = _first_opening(graph, stages, known)
    best = _within_memory(graph, attempt, opened, known)
    opened = frozenset(best.graph.opened)
    gains: list[str] = []
    while candidates := _candidates(best, stages, known):
        try:
            finer = attempt(opened | candidates)
        except MemoryLimitError:
            break
        if finer.partition.bottleneck_ms > (1 - WORTH) * best.partition.bottleneck_ms:
            break
        before, best, opened = best, finer, frozenset(finer.graph.opened)
        closed = _needless(best, candidates)
        if closed:
            with suppress(MemoryLimitError):
                coarser = attempt(opened - closed)
                if coarser.partition.bottleneck_ms <= (1 + WORTH / 4) * best.partition.bottleneck_ms:
                    best, opened = coarser, opened - closed
        gains.append(_gain(before, best))
    return Split(best.graph, best.costed, best.partition, tuple(gains), random_modules(graph))


def _within_memory(
    graph: Graph, attempt: Callable[[frozenset[str]], Split], opened: frozenset[str], known: Mapping[str, Call]
) -> Split:
    """The first attempt that fits in memory, every call opened one level further each time that none does.

    MemoryLimitError is that of the level that needs least.
    """
    try:
        return attempt(opened)
    except MemoryLimitError as error:
        closed = {node.name for node in lift(graph, opened).nodes if node.kind == "call" and node.name in known}
        if not closed:
            raise
        try:
            finer = _within_memory(graph, attempt, opened | closed, known)
        except MemoryLimitError as finest:
            raise min(error, finest, key=lambda one: one.needed) from None
        with suppress(MemoryLimitError):
            return attempt(frozenset(finer.graph.opened) - _needless(finer, frozenset(closed)))
        return finer


def _too_few(graph: Graph, costed: Costed, stages: int) -> str:
    """Why there are fewer parts than stages: what must stay together, and the buffers that are changed there."""
    count = len(costed.members)
    text = f"{stages} stages asked for, but at most {count} are possible"
    largest = max(costed.members, key=len)
    changed = [b for node in graph.nodes if node.name in largest for b in node.written_buffers]
    if not changed and (maker := _of_unknown_size(graph, largest)):
        return (
            f"{text}: {maker.module or 'the model itself'} makes a value whose size depends on what is in a tensor "
            f"({maker.place}), and {len(largest)} operations that work on it must stay in its stage; keep the size "
            "(torch.where, or multiply by the mask), or restore it soon after, as x[mask] = layer(x[mask]) does"
        )
    if not changed:
        return f"{text}: {len(largest)} operations that change the same memory in place must stay in one stage"
    return (
        f"{text}: buffer {changed[0]!r} is changed and read by {len(largest)} of the model's parts, which must "
        "therefore stay in one stage; give each part a buffer of its own, or use fewer stages"
    )


def _of_unknown_size(graph: Graph, members: Collection[str]) -> Node | None:
    """The operation behind the first value of unknown size that ``members`` make; None if they make none."""
    parts = [(node.name in members, part) for node in graph.nodes for part in (node, *node.inside) if part.place]
    found = next((part for mine, part in parts if mine), None)
    while found is not None:
        reads = set(found.reads)
        before = next((p for _, p in parts if p is not found and any(v.name in reads for v in p.outputs)), None)
        if before is None:
            break
        found = before
    return found


def _gain(before: Split, after: Split) -> str:
    opened = [key for key in after.graph.opened if key not in before.graph.opened]
    shorter = 1 - after.partition.bottleneck_ms / before.partition.bottleneck_ms
    return f"opening {', '.join(opened)} shortens the slowest stage by {shorter:.0%}"


def _first_opening(graph: Graph, stages: int, known: Mapping[str, Call]) -> frozenset[str]:
    """The calls that make more than a stage's fair share of the rough work, and more until there are enough nodes."""
    work = rough_work(graph)
    total = sum(work)
    share = {key: sum(work[call.first : call.last]) for key, call in known.items()}
    opened = frozenset(key for key, part in share.items() if part > total / stages)
    while True:
        lifted = lift(graph, opened)
        count = len(lifted.nodes) - len(lifted.replicated)
        if count >= stages:
            return opened
        closed = [node.name for node in lifted.nodes if node.kind == "call" and node.name in known]
        if not closed:
            raise PartitionError(
                f"{stages} stages asked for, but the model has {count} nodes even with every call opened: at most "
                f"{count} stages are possible"
            )
        opened |= {max(closed, key=share.__getitem__)}


def _candidates(split: Split, stages: int, known: Mapping[str, Call]) -> frozenset[str]:
    """Calls whose opening may pay: those next to a cut, and the largest of the slowest stage."""
    nodes = split.costed.graph.nodes
    fair = sum(node.forward_ms + node.backward_ms for node in nodes) / stages
    if split.partition.bottleneck_ms <= (1 + WORTH) * fair:
        return frozenset()
    stage_of = split.stage_of
    found: set[str] = set()
    cost = {name: nodes[i].forward_ms + nodes[i].backward_ms for name, i in split.costed.cost_node.items()}
    slowest = max(range(stages), key=lambda s: split.partition.costs[s].total_ms)
    for stage in range(stages):
        calls = [node for node in split.graph.nodes if stage_of.get(node.name) == stage and node.name in known]
        edges = [call for call in calls if _crosses(split, call)]
        if stage == slowest and calls:
            edges.append(max(calls, key=lambda call: cost[call.name]))
        found.update(call.name for call in edges if cost[call.name] > WORTH * fair)
    return frozenset(found)


def _crosses(split: Split, node: Node) -> bool:
    """Whether a value goes from or to the node over a cut."""
    stage_of = split.stage_of
    producer = {value.name: other.name for other in split.graph.nodes for value in other.outputs}
    made = {value.name for value in node.outputs}
    mine = stage_of[node.name]
    before = any(stage_of.get(producer.get(name, ""), mine) != mine for name in node.reads)
    after = any(stage_of.get(o.name, mine) != mine and made & set(o.reads) for o in split.graph.nodes)
    return before or after


def _needless(split: Split, candidates: frozenset[str]) -> frozenset[str]:
    """The opened calls whose nodes all ended up in one stage."""
    stage_of = split.stage_of
    calls = {call.key: call for call in split.graph.calls if call.key in candidates}
    inside: dict[str, set[int]] = {key: set() for key in calls}
    for node in split.graph.nodes:
        for key, call in calls.items():
            if node.name in stage_of and call.first <= node.position < call.last:
                inside[key].add(stage_of[node.name])
    return frozenset(key for key, stages in inside.items() if len(stages) <= 1)


def rough_work(graph: Graph) -> list[float]:
    """Multiplications of each traced operation, roughly; what is no product counts an eighth for each element."""
    shape = {value.name: value.spec.shape for value in graph.inputs}
    work = []
    for node in graph.nodes:
        size = sum(math.prod(value.spec.shape) for value in node.outputs)
        longest = 1.0
        if any(word in node.target for word in ("mm", "matmul", "linear", "attention", "einsum")):
            first = shape.get(node.reads[0], ()) if node.reads else ()
            longest = 8.0 * (first[-1] if first else 1)
        elif "conv" in node.target:
            weights = [graph.attributes[fqn].spec.shape for fqn in node.parameters]
            longest = 8.0 * max((math.prod(w[1:]) for w in weights), default=1)
        work.append(size * longest / 8)
        shape |= {value.name: value.spec.shape for value in node.outputs}
    return work
