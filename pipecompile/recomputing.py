"""What of a stage is computed again before its backward, and what that costs and saves.

    none    everything that autograd saves is kept from the forward to the backward
    calls   each module call that saves more than it is given keeps its arguments; backward + forward of each call
    stage   the stage's inputs are kept; backward + forward of the whole stage

"stage" for all of them shapes the cut. Any other choice is applied to the cut that is best without it: calls that were
opened for it and lie whole in one stage are closed again, so that they can be recomputed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from pipecompile.compiled import Compiled, Options
from pipecompile.cost import Costed, NodeCost, cost_graph
from pipecompile.errors import MemoryLimitError, ScheduleError
from pipecompile.ir import Graph, Node
from pipecompile.machine import format_bytes
from pipecompile.passes.lift import lift
from pipecompile.passes.opening import Split
from pipecompile.passes.partitioners import evaluate, stage_cost
from pipecompile.passes.storage import roots

MODES = ("none", "calls", "stage")
Price = Callable[[Graph], Mapping[str, NodeCost]]
Recompute = str | Mapping[int, str]


def read_modes(recompute: Recompute, stages: int) -> tuple[str, ...]:
    """The mode of each stage; ScheduleError for a mode or a stage that there is not."""
    chosen = dict.fromkeys(range(stages), recompute) if isinstance(recompute, str) else dict(recompute)
    for stage, mode in chosen.items():
        if mode not in MODES:
            raise ScheduleError(f"recompute is {mode!r} for stage {stage}, expected one of {', '.join(MODES)}")
        if stage not in range(stages):
            raise ScheduleError(f"recompute names stage {stage!r}, but stages go from 0 to {stages - 1}")
    return tuple(chosen.get(stage, "none") for stage in range(stages))


def priced(price: Price, options: Options) -> Price:
    """The prices that the cut goes by."""
    if not options.recomputes_stages:
        return price

    def of(graph: Graph) -> Mapping[str, NodeCost]:
        return _again(graph, price(graph), "stage")

    return of


def recomputed_calls(graph: Graph, costs: Mapping[str, NodeCost]) -> dict[str, int]:
    """The calls that save more than they are given, and the bytes that they are given.

    Not those that change what they are given or are given what is changed later, nor those inside of a checkpoint.
    """
    root = roots(graph, list(graph.nodes))
    specs = {value.name: value.spec for node in graph.nodes for value in node.outputs}
    specs |= {value.name: value.spec for value in graph.inputs}
    written = {root.get(name, name) for node in graph.nodes for name in node.writes}
    found = {}
    for node in graph.nodes:
        given = {root.get(name, name): specs[name].bytes for name in node.reads}
        plain = node.kind == "call" and not any(tag.startswith("checkpoint:") for tag in node.context)
        if plain and node.name in costs and written.isdisjoint(given) and _has_gradient(node):
            found[node.name] = sum(given.values())
    return {name: size for name, size in found.items() if costs[name].saved_bytes > size}


def _has_gradient(node: Node) -> bool:
    return any(value.spec.gradient for value in node.outputs)


def _again(graph: Graph, costs: Mapping[str, NodeCost], mode: str) -> dict[str, NodeCost]:
    kept = recomputed_calls(graph, costs) if mode == "calls" else dict.fromkeys(costs, 0)
    return {
        name: replace(
            costs[name],
            backward_ms=costs[name].backward_ms + costs[name].forward_ms,
            saved_bytes=size,
            weight_ms=costs[name].weight_ms if mode == "stage" else 0.0,  # calls end with their backward's first half
            recomputed_bytes=costs[name].saved_bytes,
        )
        for name, size in kept.items()
    }


def closed_again(parts: Split, traced: Graph, price: Price) -> Split:
    """The split with every opened call closed that lies in one stage. ``traced`` is the graph before any was lifted."""
    stage_at = {n.position: parts.stage_of[n.name] for n in parts.graph.nodes if n.name in parts.stage_of}
    ends = {call.key: call.last for call in traced.calls}

    def stages_of(first: int, last: int) -> set[int]:
        return {stage for position, stage in stage_at.items() if first <= position < last}

    whole = {call.key for call in traced.calls if len(stages_of(call.first, call.last)) == 1}
    graph = lift(traced, frozenset(parts.graph.opened) - whole)
    costed = cost_graph(graph, price(graph), parts.partition.graph)
    stages = {n.name: stages_of(n.position, ends[n.name] if n.kind == "call" else n.position + 1) for n in graph.nodes}
    homes = [set().union(*(stages[name] for name in names)) for names in costed.members]
    if any(len(home) != 1 for home in homes):
        return parts
    found = parts.partition
    stage = [home.pop() for home in homes]
    closed = evaluate(costed.graph, stage, stages=found.stages, bound_bytes=found.bound_bytes)
    return replace(parts, graph=graph, costed=costed, partition=closed)


def with_modes(parts: Split, modes: tuple[str, ...], plain: Mapping[str, NodeCost]) -> Split:
    """The split with each stage's costs in its mode; ``plain`` are the nodes' costs without recomputation."""
    if not set(modes) - {"none"}:
        return parts
    found, costs = parts.partition, list(parts.partition.costs)
    bound = found.bound_ms if set(modes) == {"stage"} else 0.0
    for mode in set(modes):
        graph = _costed(parts, mode, plain).graph
        for stage in range(found.stages):
            costs[stage] = stage_cost(graph, found.stage, stage) if modes[stage] == mode else costs[stage]
    return replace(parts, partition=replace(found, costs=tuple(costs), bound_ms=bound))


def _costed(parts: Split, mode: str, plain: Mapping[str, NodeCost]) -> Costed:
    """The cost graph of a split, its nodes as they are, with the costs of a mode."""
    costs = {**plain, **(_again(parts.graph, plain, mode) if mode != "none" else {})}
    nodes = []
    for node, names in zip(parts.costed.graph.nodes, parts.costed.members):
        whole = NodeCost(0.0, 0.0)
        for name in names:
            whole += costs[name]
        changed = {what: getattr(whole, what) for what in NodeCost.__slots__}
        nodes.append(replace(node, **changed))
    return replace(parts.costed, graph=replace(parts.costed.graph, nodes=tuple(nodes), recompute=mode))


def or_advice(compiled: Callable[[Options], Compiled], options: Options) -> Compiled:
    """What compiles; a MemoryLimitError also says what the fullest rank would hold with recomputation."""
    try:
        return compiled(options)
    except MemoryLimitError as error:
        if set(options.recompute) - {"none"}:
            raise
        lines = []
        for mode in ("calls", "stage"):
            instead = compiled(replace(options, memory=None, recompute=(mode,) * options.stages))
            most = max(instead.forecast.peak_bytes)
            fits = "which fits" if most <= (options.memory or 0) else "which does not fit"
            lines.append(f"{format_bytes(most)} with --recompute {mode}, {fits}")
        error.args = (f"{error}; the fullest rank would hold {'; '.join(lines)}", *error.args[1:])
        raise
