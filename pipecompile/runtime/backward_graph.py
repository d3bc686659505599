"""The graph that autograd walks backward: read once for each stage, recognised for each microbatch.

A stage makes the same graph for every microbatch, so what can wait (see ``split_backward``) is worked out once. For each
further graph one pass compares it, node by node, with the first; where it differs, it is read anew.

    nodes     0 Addmm   1 bias   2 Relu   3 T   4 weight        numbered as they are met from the roots
    branches  0: (1, 2, 3)       2: (…)   3: (4,)               inputs' numbers, -1 where no gradient goes
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch.autograd.graph import GradientEdge

from pipecompile.runtime.weight_formulas import FORMULAS, Formula

REENTRANT = "CheckpointFunctionBackward"
Node = Any
Branches = tuple[int, ...] | None
"""The numbers of a node's inputs; None: the walk does not go on here."""


@dataclass(frozen=True, slots=True)
class Target:
    """The accumulator of a parameter, and whether the operation used the parameter transposed."""

    number: int
    transposed: bool


@dataclass(frozen=True, slots=True)
class Deferred:
    """An operation whose parameters can wait: its number, where they are, and the maker of their formula."""

    number: int
    targets: tuple[Target, ...]
    make: Formula


@dataclass(frozen=True, slots=True)
class Structure:
    """A graph without its nodes. ``others`` are the accumulators that cannot wait; ``whole``: nothing can."""

    kinds: tuple[type, ...]
    branches: tuple[Branches, ...]
    roots: tuple[int, ...]
    inputs: tuple[int, ...]
    deferred: tuple[Deferred, ...]
    others: tuple[int, ...]
    whole: bool

    def recognise(self, roots: Sequence[GradientEdge], inputs: Sequence[GradientEdge]) -> list[Node] | None:
        """The nodes of another graph with this structure, None if it has another one."""
        nodes: list[Node] = [None] * len(self.kinds)
        if not (_place(nodes, self.roots, roots) and _place(nodes, self.inputs, inputs)):
            return None
        for number, (kind, branches) in enumerate(zip(self.kinds, self.branches)):
            if type(nodes[number]) is not kind:
                return None
            if branches is None:
                continue
            following = nodes[number].next_functions
            if len(following) != len(branches):
                return None
            for place, (child, _) in zip(branches, following):
                if place < 0:
                    if child is not None:
                        return None
                elif nodes[place] is None:
                    nodes[place] = child
                elif nodes[place] is not child:
                    return None
        return nodes if len({id(node) for node in nodes}) == len(nodes) else None


def _place(nodes: list[Node], numbers: tuple[int, ...], edges: Sequence[GradientEdge]) -> bool:
    """Put the edges' nodes at their numbers; whether there are as many as expected and none is at two."""
    for number, edge in zip(numbers, edges):
        if nodes[number] is not None and nodes[number] is not edge.node:
            return False
        nodes[number] = edge.node
    return len(numbers) == len(edges)


def read(roots: Sequence[GradientEdge], inputs: Sequence[GradientEdge]) -> tuple[Structure, list[Node]]:
    """The structure of a graph, and its nodes."""
    nodes: list[Node] = []
    numbers: dict[Node, int] = {}

    def number(node: Node) -> int:
        if node not in numbers:
            numbers[node] = len(nodes)
            nodes.append(node)
        return numbers[node]

    ends = tuple(number(edge.node) for edge in inputs)
    starts = tuple(number(edge.node) for edge in roots)
    branches: list[Branches] = []
    for node in nodes:  # grows on the way
        goes_on = numbers[node] not in ends and type(node).__name__ != "AccumulateGrad"
        branches.append(
            tuple(-1 if child is None else number(child) for child, _ in node.next_functions) if goes_on else None
        )
    deferred, others = _plan(nodes, branches, starts, set(ends))
    whole = any(type(node).__name__ == REENTRANT for node in nodes)
    kinds = tuple(type(node) for node in nodes)
    return Structure(kinds, tuple(branches), starts, ends, tuple(deferred), tuple(others), whole), nodes


def _plan(
    nodes: list[Node], branches: list[Branches], roots: Sequence[int], inputs: set[int]
) -> tuple[list[Deferred], list[int]]:
    """The operations to defer, and the accumulators of all other parameters.

    A parameter that is also reached otherwise cannot wait (autograd would enter its branch in the first half), and
    then neither can an operation that uses it.
    """
    deferred: list[Deferred] = []
    others: set[int] = set()
    seen: set[int] = set(inputs)
    stack = list(roots)
    while stack:
        number = stack.pop()
        if number in seen:
            continue
        seen.add(number)
        following = branches[number]
        if following is None:
            others.add(number)
            continue
        places, make = FORMULAS.get(type(nodes[number]).__name__, ((), None))
        targets = [_target(following[place], nodes, branches, inputs) for place in places]
        if make is not None and targets[0] is not None:
            found = tuple(target for target in targets if target is not None)
            if make(nodes[number], len(found) > 1) is not None:
                deferred.append(Deferred(number, found, make))
                waiting = [place for place, target in zip(places, targets) if target is not None]
                following = tuple(branch for place, branch in enumerate(following) if place not in waiting)
        stack.extend(branch for branch in following if branch >= 0)
    while rejected := [one for one in deferred if any(target.number in others for target in one.targets)]:
        others.update(target.number for one in rejected for target in one.targets)
        deferred = [one for one in deferred if one not in rejected]
    return deferred, sorted(others)


def _target(branch: int, nodes: list[Node], branches: list[Branches], inputs: set[int]) -> Target | None:
    """The parameter that a branch holds, as it is, converted or transposed; None if it holds anything else."""
    transposed = branch >= 0 and type(nodes[branch]).__name__ == "TBackward0"
    for kind in ("TBackward0", "ToCopyBackward0"):  # the second: autocast
        following = branches[branch] if branch >= 0 and type(nodes[branch]).__name__ == kind else None
        branch = following[0] if following else branch
    if branch < 0 or branch in inputs or type(nodes[branch]).__name__ != "AccumulateGrad":
        return None
    return Target(branch, transposed)
