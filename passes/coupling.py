"""Finds where a loss couples the samples of a batch, so that microbatches change what is trained.

Gradient accumulation is exact only for a loss that is a sum over samples. Each value of the traced graph is followed from
the batch, whose dimension 0 are the samples, to the loss:

    free      depends on no sample: parameters, positions, masks of positions
    samples   one dimension holds the samples, each element depends on one of them
    total     a sum or mean over samples; sums of totals and multiples by free values stay totals
    coupled   anything else that depends on several samples: softmax over them, products of all pairs, totals squared

    tokens[B, T] ─ embedding ─ h[B, T, D] ─ mean over T ─ z[B, D] ─ z @ z.T ─ [B, B]  two sample dimensions: coupled

Whole numbers and truth values couple nothing: they route tokens and count them. O(operations).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pipecompile.ir import Graph, Node, Ref
from pipecompile.passes import sample_rules
from pipecompile.passes.sample_states import COUPLED, FREE, Operand, State, arguments, merged, operands, samples


@dataclass(frozen=True, slots=True)
class Coupling:
    """The first operation that combines samples, on the way to the loss."""

    module: str
    target: str
    value: str


def couplings(graph: Graph) -> tuple[Coupling, ...]:
    """Operations that combine several samples otherwise than by summing, whose results the loss depends on."""
    live = ancestors(graph, [graph.loss])
    found: list[Coupling] = []
    states = {value.name: samples(0, learned=False) if value.spec.shape else FREE for value in graph.inputs}
    spec = {value.name: value.spec for value in graph.inputs}
    roots = {value.name: value.storage or value.name for value in graph.inputs}
    count = next((int(value.spec.shape[0]) for value in graph.inputs if value.spec.shape), 1)
    for node in graph.nodes:
        spec |= {value.name: value.spec for value in node.outputs}
        roots |= {value.name: value.storage or value.name for value in node.outputs}

    def operand(leaf: Any) -> Any:
        if isinstance(leaf, Ref):
            return Operand(states.get(leaf.name, FREE), tuple(map(int, spec[leaf.name].shape)), spec[leaf.name].dtype)
        info = graph.attributes.get(getattr(leaf, "fqn", ""))
        if info is not None:
            learned = replace(FREE, learned=info.kind == "parameter")
            return Operand(learned, tuple(map(int, info.spec.shape)), info.spec.dtype)
        constant = graph.constants.get(getattr(leaf, "fqn", ""))
        if constant is not None:
            return Operand(FREE, tuple(constant.shape), str(constant.dtype).removeprefix("torch."))
        return leaf

    for node in graph.nodes:
        given = arguments(node, operand)
        for value in node.outputs:
            states[value.name] = state = sample_rules.state(node, value, given, count)
            if state is COUPLED and value.name in live and not _any_coupled(given):
                found.append(Coupling(node.module, node.target, value.name))
        _write(node, given, states, roots)
    return tuple(found)


def ancestors(graph: Graph, names: Iterable[str]) -> frozenset[str]:
    """The values that the named ones are made of, themselves included."""
    live = set(names)
    roots = {value.name: value.storage or value.name for node in graph.nodes for value in node.outputs}
    live_roots = {roots.get(name, name) for name in live}
    for node in reversed(graph.nodes):
        written = any(roots.get(name, name) in live_roots for name in node.writes)
        if written or any(value.name in live for value in node.outputs):
            live.update(value.name for value in node.outputs)
            live.update(node.reads)
            live_roots.update(roots.get(name, name) for name in node.reads)
    return frozenset(live)


def _any_coupled(given: Mapping[str, Any]) -> bool:
    return any(operand.state is COUPLED for operand in operands(given))


def _write(node: Node, given: Mapping[str, Any], states: dict[str, State], roots: Mapping[str, str]) -> None:
    """What is written in place reaches every name of that memory: a fresh tensor takes the samples' dimension over."""
    if not node.writes:
        return
    new = sample_rules.written(node, given)
    for name in node.writes:
        root = roots.get(name, name)
        for other, home in roots.items():
            if home == root or other == root:
                states[other] = merged(states.get(other, FREE), new)
