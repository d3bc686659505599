"""What of a stage is computed again before its backward, and what that costs and saves.

    none    everything that autograd saves is kept from the forward to the backward
    calls   each module call that saves more than it is given keeps its arguments; backward + forward of each call
    stage   the stage's inputs are kept; backward + forward of the whole stage

Stages are cut by what their nodes cost in their mode. Under "calls", those that were opened for the cut and lie whole in one
stage are closed again, so that they can be recomputed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from pipecompile.compiled import Compiled, Options
from pipecompile.cost import Costed, NodeCost, cost_graph
from pipecompile.errors import MemoryLimitError, ScheduleError
from pipecompile.ir import CostNode, Graph, Node, Partition
from pipecompile.machine import format_bytes
from pipecompile.passes.lift import lift
from pipecompile.passes.opening import Split
from pipecompile.passes.partitioners import evaluate
from pipecompile.passes.storage import roots

MODES = ("none", "calls", "stage")
Price = Callable[[Graph], Mapping[str, NodeCost]]
Cost = Callable[[Graph], Costed]
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


def costing(price: Price, modes: tuple[str, ...], name: str, whole: bool = False) -> Cost:
    """What makes the cost graph of a lifted graph, in which every node costs what it does in the mode of its stage.

    ``whole``: under "calls" every node takes the time of two forwards, so that it is no gain to open a call that would be
    recomputed; what a call keeps is not changed by that.
    """

    def of(graph: Graph) -> Costed:
        plain = price(graph)
        under = {mode: _under(graph, plain, mode) for mode in ("none", *modes)}
        if whole and "calls" in under:
            under["calls"] |= {
                node: replace(cost, backward_ms=plain[node].backward_ms + plain[node].forward_ms)
                for node, cost in under["calls"].items()
            }
        found = {mode: cost_graph(graph, costs, name) for mode, costs in under.items()}
        if len(set(modes)) < 2:
            return _with_modes(found[modes[0] if modes else "none"], modes)
        return _with_modes(found["none"], modes, tuple(found[mode].graph.nodes for mode in modes))

    return of


def _with_modes(costed: Costed, modes: tuple[str, ...], staged: tuple[tuple[CostNode, ...], ...] = ()) -> Costed:
    if set(modes) <= {"none"}:
        return costed
    return replace(costed, graph=replace(costed.graph, recompute=modes, staged=staged))


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


def _under(graph: Graph, costs: Mapping[str, NodeCost], mode: str) -> dict[str, NodeCost]:
    """The costs of the nodes in a mode."""
    kept = {"none": {}, "calls": recomputed_calls(graph, costs), "stage": dict.fromkeys(costs, 0)}[mode]
    again = {
        name: replace(
            costs[name],
            backward_ms=costs[name].backward_ms + costs[name].forward_ms,
            saved_bytes=size,
            weight_ms=costs[name].weight_ms if mode == "stage" else 0.0,  # calls end with their backward's first half
            recomputed_bytes=costs[name].saved_bytes,
        )
        for name, size in kept.items()
    }
    return {**costs, **again}


def with_calls(parts: Split, traced: Graph, cost: Cost) -> Split:
    """The split with its ``cost``, and with every opened call closed that lies in one stage, if that is possible.

    ``traced`` is the graph before any was lifted.
    """
    costed = cost(parts.graph)
    parts = replace(parts, costed=costed, partition=_evaluated(costed, parts.partition.stage, parts.partition))
    stage_at = {n.position: parts.stage_of[n.name] for n in parts.graph.nodes if n.name in parts.stage_of}
    ends = {call.key: call.last for call in traced.calls}

    def stages_of(first: int, last: int) -> set[int]:
        return {stage for position, stage in stage_at.items() if first <= position < last}

    whole = {call.key for call in traced.calls if len(stages_of(call.first, call.last)) == 1}
    graph = lift(traced, frozenset(parts.graph.opened) - whole)
    costed = cost(graph)
    stages = {n.name: stages_of(n.position, ends[n.name] if n.kind == "call" else n.position + 1) for n in graph.nodes}
    homes = [set().union(*(stages[name] for name in names)) for names in costed.members]
    if any(len(home) != 1 for home in homes):
        return parts
    stage = tuple(home.pop() for home in homes)
    return replace(parts, graph=graph, costed=costed, partition=_evaluated(costed, stage, parts.partition))


def _evaluated(costed: Costed, stage: tuple[int, ...], before: Partition) -> Partition:
    return evaluate(costed.graph, stage, stages=before.stages, bound_bytes=before.bound_bytes)


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
