"""Assembles stages: what each one runs, receives and gives, once every node has its stage."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from pipecompile.errors import PartitionError
from pipecompile.ir import Graph, Node, Port, StagePlan, Value
from pipecompile.passes.storage import roots


@dataclass(frozen=True, slots=True)
class StageBody:
    """A stage before it is source: its nodes in program order, those it computes for itself, and its batch inputs.

    ``copied`` are received values and parts of the batch that it changes in place and therefore copies first. ``recomputed`` are the names of the
    calls that run again in the backward.
    """

    plan: StagePlan
    nodes: tuple[Node, ...]
    replicated: tuple[Node, ...]
    batch: tuple[Value, ...]
    copied: tuple[str, ...] = ()
    recomputed: frozenset[str] = frozenset()


def assemble(
    graph: Graph,
    stage_of: Mapping[str, int],
    stages: int,
    recompute: Sequence[str] = (),
    recomputed: Iterable[str] = (),
) -> tuple[StageBody, ...]:
    """The stages for a stage of each node (replicated nodes have none). Raises PartitionError for a value that goes back.

    ``recompute`` has each stage's mode, ``recomputed`` the calls that mode "calls" is for.
    """
    producer = {value.name: node.name for node in graph.nodes for value in node.outputs}
    spec = {value.name: value.spec for node in graph.nodes for value in node.outputs}
    own = [[n for n in graph.nodes if stage_of.get(n.name, -1) == s] for s in range(stages)]
    readers = _readers(own)
    last = stage_of[producer[graph.loss]]
    bodies = []
    for s, nodes in enumerate(own):
        reads = dict.fromkeys(name for node in nodes for name in node.reads)
        if s == last and graph.weight:
            reads[graph.weight] = None
        replicated = _replicated(graph, reads, producer)
        inputs = [
            Port(n, spec[n], source=stage_of[producer[n]]) for n in reads if _is_foreign(n, s, producer, stage_of)
        ]
        made = [value for node in nodes for value in node.outputs]
        outputs = [
            Port(v.name, v.spec, targets=_others(readers, v.name, s)) for v in made if _others(readers, v.name, s)
        ]
        if s == last:
            outputs += [
                Port(n, spec[n]) for n in (graph.loss, graph.weight) if n and n not in [o.name for o in outputs]
            ]
        _check_forward(s, inputs)
        plan = _plan(graph, s, nodes, replicated, inputs, outputs)
        needed = set(reads) | {name for node in replicated for name in node.reads}
        batch = tuple(value for value in graph.inputs if value.name in needed)
        bodies.append(StageBody(plan, tuple(nodes), replicated, batch, _copied(graph, nodes, (*inputs, *batch))))
    whole = _with_shared(graph, _with_leftovers(graph, bodies))
    again = frozenset(recomputed)
    return tuple(
        replace(body, plan=replace(body.plan, recompute=mode), recomputed=again if mode == "calls" else frozenset())
        for body, mode in zip(whole, recompute or ("none",) * stages)
    )


def _readers(own: list[list[Node]]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for stage, nodes in enumerate(own):
        for name in dict.fromkeys(name for node in nodes for name in node.reads):
            found.setdefault(name, []).append(stage)
    return found


def _others(readers: Mapping[str, list[int]], name: str, stage: int) -> tuple[int, ...]:
    return tuple(reader for reader in readers.get(name, ()) if reader != stage)


def _is_foreign(name: str, stage: int, producer: Mapping[str, str], stage_of: Mapping[str, int]) -> bool:
    maker = producer.get(name)
    return maker is not None and maker in stage_of and stage_of[maker] != stage


def _check_forward(stage: int, inputs: Iterable[Port]) -> None:
    for port in inputs:
        if port.source > stage:
            raise PartitionError(f"stage {stage} would read {port.name} of the later stage {port.source}")


def _replicated(graph: Graph, reads: Iterable[str], producer: Mapping[str, str]) -> tuple[Node, ...]:
    """The replicated nodes behind ``reads``, with all writers of the memory that they use, in program order."""
    root = roots(graph, list(graph.nodes))
    needed = set(reads)
    kept: list[Node] = []
    storages = {root.get(name, name) for name in needed}
    for node in reversed([n for n in graph.nodes if n.name in graph.replicated]):
        makes = any(value.name in needed for value in node.outputs)
        writes = any(root.get(name, name) in storages for name in node.writes)
        if makes or writes:
            kept.append(node)
            needed.update(node.reads)
            storages.update(root.get(name, name) for name in node.reads if producer.get(name) in graph.replicated)
    return tuple(kept[::-1])


def _copied(graph: Graph, nodes: list[Node], given: Iterable[Port | Value]) -> tuple[str, ...]:
    root = roots(graph, list(graph.nodes))
    written = {root.get(name, name) for node in nodes for name in node.writes}
    return tuple(value.name for value in given if root.get(value.name, value.name) in written)


def _plan(
    graph: Graph, stage: int, nodes: list[Node], replicated: tuple[Node, ...], inputs: list[Port], outputs: list[Port]
) -> StagePlan:
    modules = dict.fromkeys(node.target for node in nodes if node.kind == "call")
    direct = [fqn for node in (*nodes, *replicated) for fqn in (*node.parameters, *node.buffers)]
    reached = [fqn for fqn in dict.fromkeys(direct) if not _inside(fqn, modules)]
    owned = {graph.attributes[fqn].canonical for fqn in direct if _inside(fqn, modules)}
    read_by_operation = {f for n in (*nodes, *replicated) if n.kind == "op" for f in (*n.parameters, *n.buffers)}
    reached = [fqn for fqn in reached if fqn in read_by_operation or graph.attributes[fqn].canonical not in owned]
    prefixes = [key for key in graph.opened if any(node.module == key.rpartition("@")[0] for node in nodes)]
    return StagePlan(
        index=stage,
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        modules=tuple(modules),
        parameters=tuple(fqn for fqn in reached if graph.attributes[fqn].kind == "parameter"),
        buffers=tuple(fqn for fqn in reached if graph.attributes[fqn].kind == "buffer"),
        opened=tuple(prefixes),
    )


def _inside(fqn: str, modules: Iterable[str]) -> bool:
    return any(fqn.startswith(module + ".") for module in modules)


def held(graph: Graph, plan: StagePlan) -> list[str]:
    """FQNs of all parameters and buffers that a stage holds, in the model's order."""
    direct = {*plan.parameters, *plan.buffers}
    return [fqn for fqn in graph.attributes if fqn in direct or _inside(fqn, plan.modules)]


def _with_leftovers(graph: Graph, bodies: list[StageBody]) -> list[StageBody]:
    """What no node reads is kept by the first stage, so that the stages together hold the whole model."""
    somewhere = {graph.attributes[fqn].canonical for body in bodies for fqn in held(graph, body.plan)}
    left = [
        info for info in graph.attributes.values() if info.canonical not in somewhere and info.fqn == info.canonical
    ]
    first = bodies[0].plan
    plan = replace(
        first,
        parameters=(*first.parameters, *(info.fqn for info in left if info.kind == "parameter")),
        buffers=(*first.buffers, *(info.fqn for info in left if info.kind == "buffer")),
    )
    return [replace(bodies[0], plan=plan), *bodies[1:]]


def _with_shared(graph: Graph, bodies: list[StageBody]) -> tuple[StageBody, ...]:
    """Each stage's own name of the trainable parameters that other stages hold too."""
    names: list[dict[str, str]] = []
    for body in bodies:
        found: dict[str, str] = {}
        for fqn in held(graph, body.plan):
            info = graph.attributes[fqn]
            if info.kind == "parameter" and info.spec.gradient:
                found.setdefault(info.canonical, fqn)
        names.append(found)
    shared = {c for found in names for c in found if sum(c in other for other in names) > 1}
    return tuple(
        replace(body, plan=replace(body.plan, shared={c: fqn for c, fqn in found.items() if c in shared}))
        for body, found in zip(bodies, names)
    )
