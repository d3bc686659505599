"""A whole backward that sums the gradients of large matrices where they are computed.

Autograd makes the gradient of a weight as a tensor of its own and then adds it to ``.grad``: for a large matrix that is
three more passes over its memory for each microbatch. Here autograd leaves these weights out; a hook at their operation
gets the gradient that arrives there and adds the product to ``.grad`` in one call. Everything else is autograd's own work.

    gy ──▶ Addmm ──▶ gx          hook at Addmm: W.grad += gy^T @ x
             └─ T(W): left out
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from pipecompile.runtime.backward_graph import Deferred, Node, Structure, Target, read
from pipecompile.runtime.split_backward import add_gradient, hooked
from pipecompile.runtime.weight_formulas import ADDED, LARGE, PRODUCTS, Formula

WORTH = 1 << 15
"""Elements of large matrices for each node of the graph, below which looking at the graph costs more than it saves."""


class Summed:
    """How a stage's backward is run: found out at its first graph, and again where a graph differs."""

    __slots__ = ("_others", "_structure", "_sums", "_worth")

    def __init__(self) -> None:
        self._worth = True
        self._structure: Structure | None = None
        self._sums: list[tuple[int, Target, Formula]] = []
        self._others: list[Tensor] = []

    def backward(self, roots: Sequence[GradientEdge], gradients: Sequence[Tensor], leaves: Sequence[Tensor]) -> None:
        """``torch.autograd.backward(roots, gradients)``; the ``leaves`` are what the stage received."""
        nodes = self._recognise(roots, leaves) if self._worth else []
        if not (self._sums and self._run(nodes, roots, gradients, leaves)):
            torch.autograd.backward(roots, gradients)

    def _run(
        self, nodes: list[Node], roots: Sequence[GradientEdge], gradients: Sequence[Tensor], leaves: Sequence[Tensor]
    ) -> bool:
        """Run it with sums; False if a parameter has hooks, which must see whole gradients."""
        assert self._structure is not None
        parameters = self._structure.parameters
        if hooked(parameters[target.number] for _, target, _ in self._sums):
            return False
        sums = []
        for number, target, make in self._sums:
            formula = make(nodes[number], False)
            if formula is None:
                return False
            sums.append((nodes[number], Sum(parameters[target.number], target.transposed, formula)))
        for node, one in sums:
            node.register_prehook(one)
        torch.autograd.backward(roots, gradients, inputs=[*leaves, *self._others])
        assert all(one.done for _, one in sums), "an operation was left out of the backward"
        return True

    def _recognise(self, roots: Sequence[GradientEdge], leaves: Sequence[Tensor]) -> list[Node]:
        """The graph's nodes; if it is not the known one, what can be summed in it."""
        if self._structure is not None:
            nodes = self._structure.recognise(roots, leaves)
            if nodes is not None:
                return nodes
        self._structure, nodes = read(roots, leaves)
        self._sums = _sums(self._structure, nodes)
        parameters = self._structure.parameters
        elements = sum(parameters[target.number].numel() for _, target, _ in self._sums)
        if elements < WORTH * len(nodes):
            self._worth, self._sums, self._structure = False, [], None
            return []
        summed = {target.number for _, target, _ in self._sums}
        self._others = [parameter for number, parameter in parameters.items() if number not in summed]
        return nodes


class Sum:
    """A hook that adds the gradient of a weight at its operation, once."""

    __slots__ = ("_formula", "_parameter", "_transposed")

    def __init__(self, parameter: Tensor, transposed: bool, formula: Any) -> None:
        self._parameter, self._transposed, self._formula = parameter, transposed, formula

    @property
    def done(self) -> bool:
        return self._formula is None

    def __call__(self, arrived: tuple[Tensor | None, ...]) -> None:
        formula, self._formula = self._formula, None  # what it holds goes with this call
        (gradient,) = arrived
        if gradient is None:
            return
        with torch.no_grad():
            (product,) = formula(gradient)
            if not product.add_to(self._parameter, self._transposed):
                value = product.compute()
                add_gradient(self._parameter, value.t() if self._transposed else value, owned=True)


def _sums(structure: Structure, nodes: list[Node]) -> list[tuple[int, Target, Formula]]:
    """The large matrices whose gradient is one product: used once, as they are, by an operation that is run anyway.

    Such an operation has a second input with a gradient; that leads to a parameter or leaf that autograd fills itself,
    or to another such operation, which has a second input in turn.
    """
    if structure.whole:
        return []
    uses = Counter(branch for branches in structure.branches for branch in branches or ())
    found = []
    for one in structure.deferred:
        target = one.targets[0]
        branches = structure.branches[one.number] or ()
        held = [branch for branch in branches if _holds(branch, target, structure, nodes)]
        second = any(branch >= 0 and branch not in held for branch in branches)
        once = len(held) == 1 and uses[held[0]] == 1 and uses[target.number] == 1
        if once and second and _large(nodes, one, target):
            found.append((one.number, target, one.make))
    return found


def _holds(branch: int, target: Target, structure: Structure, nodes: list[Node]) -> bool:
    """Whether a branch is the target, or its transpose and nothing else."""
    if target.transposed:
        return (
            branch >= 0
            and type(nodes[branch]).__name__ == "TBackward0"
            and structure.branches[branch] == (target.number,)
        )
    return branch == target.number


def _large(nodes: list[Node], one: Deferred, target: Target) -> bool:
    parameter = nodes[target.number].variable
    if one.make not in PRODUCTS or parameter.numel() < LARGE:
        return False
    return parameter.dtype in ADDED and parameter.device.type == "cpu"
