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

from torch import Tensor
from torch.autograd.graph import GradientEdge

from pipecompile.runtime.weight_formulas import FORMULAS, Formula

REENTRANT = "CheckpointFunctionBackward"
ACCUMULATOR = "AccumulateGrad"
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
    """An operation whose parameters can wait: its number, where they are, and the maker of their formula.

    ``work`` are the multiply-adds of the weight's gradient, or what takes as long.
    """

    number: int
    targets: tuple[Target, ...]
    make: Formula
    work: int


@dataclass(frozen=True, slots=True)
class Structure:
    """A graph without its nodes.

    ``inputs`` are the accumulators of what the stage received (-1: not in the graph), ``parameters`` the parameters by
    the number of their accumulator; ``others`` are those that cannot wait; ``whole``: nothing can.
    """

    kinds: tuple[type, ...]
    branches: tuple[Branches, ...]
    roots: tuple[int, ...]
    inputs: tuple[int, ...]
    parameters: dict[int, Tensor]
    deferred: tuple[Deferred, ...]
    others: tuple[int, ...]
    whole: bool

    def recognise(self, roots: Sequence[GradientEdge], leaves: Sequence[Tensor]) -> list[Node] | None:
        """The nodes of another graph with this structure and these parameters, None if it has another one."""
        nodes: list[Node] = [None] * len(self.kinds)
        if not _place(nodes, self.roots, roots):
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
        ends = [(number, leaf) for number, leaf in zip(self.inputs, leaves) if number >= 0]
        for number, tensor in (*self.parameters.items(), *ends):
            if nodes[number].variable is not tensor:
                return None
        return nodes if len(set(nodes)) == len(nodes) else None


def _place(nodes: list[Node], numbers: tuple[int, ...], edges: Sequence[GradientEdge]) -> bool:
    """Put the edges' nodes at their numbers; whether there are as many as expected and none is at two."""
    if len(numbers) != len(edges):
        return False
    for number, edge in zip(numbers, edges):
        if nodes[number] is not None and nodes[number] is not edge.node:
            return False
        nodes[number] = edge.node
    return True


def read(roots: Sequence[GradientEdge], leaves: Sequence[Tensor]) -> tuple[Structure, list[Node]]:
    """The structure of a graph, and its nodes; ``leaves`` are what the stage received."""
    nodes: list[Node] = []
    numbers: dict[Node, int] = {}

    def number(node: Node) -> int:
        if node not in numbers:
            numbers[node] = len(nodes)
            nodes.append(node)
        return numbers[node]

    starts = tuple(number(edge.node) for edge in roots)
    branches: list[Branches] = []
    for node in nodes:  # grows on the way
        goes_on = type(node).__name__ != ACCUMULATOR
        branches.append(
            tuple(-1 if child is None else number(child) for child, _ in node.next_functions) if goes_on else None
        )
    ends = {id(node.variable): numbers[node] for node in nodes if type(node).__name__ == ACCUMULATOR}
    inputs = tuple(ends.pop(id(leaf), -1) for leaf in leaves)
    deferred, others = _plan(nodes, branches, starts, set(inputs))
    structure = Structure(
        kinds=tuple(type(node) for node in nodes),
        branches=tuple(branches),
        roots=starts,
        inputs=inputs,
        parameters={place: nodes[place].variable for place in ends.values()},
        deferred=tuple(deferred),
        others=tuple(others),
        whole=any(type(node).__name__ == REENTRANT for node in nodes),
    )
    return structure, nodes


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
        places, make, uses = FORMULAS.get(type(nodes[number]).__name__, ((), None, None))
        targets = [_target(following[place], nodes, branches, inputs) for place in places]
        if make is not None and uses is not None and targets[0] is not None:
            found = tuple(target for target in targets if target is not None)
            if make(nodes[number], len(found) > 1) is not None:
                work = uses(nodes[number]) * nodes[targets[0].number].variable.numel()
                deferred.append(Deferred(number, found, make, work))
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
    if branch < 0 or branch in inputs or type(nodes[branch]).__name__ != ACCUMULATOR:
        return None
    return Target(branch, transposed)
