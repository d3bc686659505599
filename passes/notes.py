"""What a user should know before training: said once, in plain words, with what to do. Only reads the graph."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import replace

from pipecompile.capture import batch_norm_note
from pipecompile.ir import Graph
from pipecompile.passes.assemble import StageBody
from pipecompile.passes.coupling import ancestors, couplings
from pipecompile.passes.render import path_text
from pipecompile.passes.sample_states import schema_of

CHECKPOINT = "checkpoint:"


def with_notes(graph: Graph) -> Graph:
    """The traced graph with notes on what its loss couples, leaves out, draws at random and computes again."""
    found = (*_coupled(graph), *_auxiliary(graph), *_random(graph), *_checkpointed(graph))
    return replace(graph, notes=(*graph.notes, *found))


def stage_notes(graph: Graph, bodies: tuple[StageBody, ...]) -> tuple[str, ...]:
    """Notes on stages that train nothing."""
    found = []
    for body in bodies:
        plan = body.plan
        used = [graph.attributes[fqn] for node in body.nodes for fqn in node.parameters]
        if not used or any(info.spec.gradient for info in used):
            continue
        received = any(port.spec.gradient for port in plan.inputs)
        what = (
            "its backward only passes gradients on to earlier stages"
            if received
            else "and nothing before it is trained, so its backward does nothing"
        )
        found.append(
            f"stage {plan.index} is frozen: none of its parameters requires a gradient; {what}; it keeps no gradients and "
            "no optimizer state, and the cut counts only the time that it takes"
        )
    return tuple(found)


def _coupled(graph: Graph) -> Iterable[str]:
    layers = [node.module or "the loss" for node in graph.nodes if _trains_batch_norm(node.target, node.args)]
    if layers:
        yield batch_norm_note(list(dict.fromkeys(layers)))
    places = [f"{one.target.split('.')[1]} in {one.module or 'the model or loss itself'}" for one in couplings(graph)]
    if places:
        yield (
            f"the loss couples samples: {_some(places)} combines the samples of a microbatch with one another, so the "
            "gradients depend on how many samples a microbatch has and are not those of the whole batch; use fewer and "
            "larger microbatches (each is a batch of its own to this loss), or a loss that is a mean over samples"
        )


def _trains_batch_norm(target: str, args: tuple[object, ...]) -> bool:
    if not target.startswith("aten.batch_norm"):
        return False
    names = [argument.name for argument in schema_of(target).arguments]
    return bool(dict(zip(names, args)).get("training"))


def _auxiliary(graph: Graph) -> Iterable[str]:
    """Outputs with a gradient that the loss does not read, if they look like losses or have parameters of their own."""
    live = ancestors(graph, [graph.loss, *([graph.weight] if graph.weight else [])])
    spec = {value.name: value.spec for node in graph.nodes for value in node.outputs}
    used = _parameters(graph, live)
    for call in (call for call in graph.calls if not call.fqn):
        for path, name in call.results:
            if name in live or name not in spec or not spec[name].gradient:
                continue
            own = sorted(_parameters(graph, ancestors(graph, [name])) - used)
            output = f"the model's output {path_text(path) or name} is not part of the loss"
            if own:
                yield f"{output}: {_some(own)} get no gradient; add it in loss(model, batch), or freeze them"
            elif not spec[name].shape:
                yield f"{output} and trains nothing; add it in loss(model, batch) if it is an auxiliary loss"


def _parameters(graph: Graph, values: frozenset[str]) -> set[str]:
    """The trainable parameters behind values."""
    nodes = (node for node in graph.nodes if any(value.name in values for value in node.outputs))
    found = {graph.attributes[fqn] for node in nodes for fqn in node.parameters}
    return {info.canonical for info in found if info.spec.gradient}


def _random(graph: Graph) -> Iterable[str]:
    if any(node.random for node in graph.nodes):
        yield (
            "random numbers (dropout) follow the seed, the step, the microbatch and the call, not the stage or the rank: "
            "the same however the model is cut, but not those that the model draws alone; compare with "
            "pipe.reference(model, batch), which draws the same"
        )


def _checkpointed(graph: Graph) -> Iterable[str]:
    inside: dict[str, list[str]] = {}
    for node in graph.nodes:
        for tag in node.context:
            if tag.startswith(CHECKPOINT):
                inside.setdefault(tag, []).append(node.module)
    if inside:
        places = dict.fromkeys(_common(modules) or "the model itself" for modules in inside.values())
        yield (
            f"activation checkpointing is kept in {_some(list(places))}: what is inside is computed again in the backward "
            "instead of being stored"
        )


def _common(modules: list[str]) -> str:
    """The innermost module that contains all of them."""
    paths = [module.split(".") for module in modules]
    same = itertools.takewhile(lambda steps: len(set(steps)) == 1, zip(*paths))
    return ".".join(steps[0] for steps in same)


def _some(names: list[str]) -> str:
    return f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if names[3:] else ''}"
