"""Splits a backward in two: gradients of what a stage received now, gradients of its parameters later.

Most of the time that parameters cost goes into few operations (matrix products, convolutions, embeddings), and their
two halves are separate computations. For these, the first half stops at the operation: autograd gives the gradient that
arrives there and never enters the branch of the weight. The second half multiplies it with the operation's saved input.
Every other parameter's gradient (norms, scalings) comes out of the first half, where it is nearly free.

    x ──▶ Addmm ──▶ gelu ──▶ Addmm ──▶ y        first half:  gy ─▶ gx, and on the way g at both Addmm
            │                  │                             everything saved is freed, but the inputs of both Addmm
          T(W1)              T(W2)              second half: input × g ─▶ W1.grad, W2.grad

One pass of autograd over the stage, not two. The gradient of a large matrix is summed into what the parameter already
has by the product itself: no intermediate tensor, and the rounding may differ in the last bits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from pipecompile.runtime.backward_graph import Node, Structure, read
from pipecompile.runtime.weight_formulas import Gradients, Product

Rest = list[tuple[tuple[tuple[Node, bool], ...], Gradients, Tensor]]
"""What the second half has to do: for each operation the accumulators of its parameters and whether these were used
transposed, the formula, the gradient that arrived."""


class Known:
    """The structure of a stage's last graph, so that the next one is only compared with it."""

    __slots__ = ("structure",)

    def __init__(self) -> None:
        self.structure: Structure | None = None


def input_half(
    roots: Sequence[GradientEdge], gradients: Sequence[Tensor], leaves: Sequence[Tensor], known: Known | None = None
) -> tuple[list[Tensor | None], Rest]:
    """The gradients of ``leaves``, and what remains to be done for the parameters.

    If a parameter has hooks, nothing waits: hooks see each gradient once and whole. Nor does it if the stage runs a
    backward of its own inside (reentrant checkpointing), which autograd allows in a whole backward only.
    """
    if not roots:
        return [None] * len(leaves), []
    inputs = [get_gradient_edge(leaf) for leaf in leaves]
    structure, nodes, rest = _prepare(roots, inputs, known or Known())
    others = [nodes[number] for number in structure.others]
    if structure.whole or hooked(others) or any(hooked(target for target, _ in targets) for _, targets, _ in rest):
        torch.autograd.backward(roots, gradients)
        return [leaf.grad for leaf in leaves], []
    wanted = [*inputs, *(GradientEdge(node, 0) for node in others), *(GradientEdge(node, 0) for node, _, _ in rest)]
    found = torch.autograd.grad(roots, wanted, gradients, allow_unused=True)
    first, last = len(inputs), len(inputs) + len(others)
    for node, gradient in zip(others, found[first:last]):
        if gradient is not None:
            add_gradient(node.variable, gradient, owned=False)
    arrived = zip(rest, found[last:])
    return list(found[:first]), [(targets, formula, g) for (_, targets, formula), g in arrived if g is not None]


def _prepare(
    roots: Sequence[GradientEdge], inputs: Sequence[GradientEdge], known: Known
) -> tuple[Structure, list[Node], list[Any]]:
    """The graph's structure and nodes, and each operation that waits: its node, its parameters, its formula."""
    structure = known.structure
    nodes = None if structure is None else structure.recognise(roots, inputs)
    while True:
        if structure is None or nodes is None:
            structure, nodes = read(roots, inputs)
            known.structure = structure
        rest = []
        for one in structure.deferred:
            node = nodes[one.number]
            formula = one.make(node, len(one.targets) > 1)
            if formula is None:
                break
            rest.append((node, tuple((nodes[t.number], t.transposed) for t in one.targets), formula))
        else:
            return structure, nodes, rest
        structure = None


def hooked(accumulators: Any) -> bool:
    """Whether a parameter of the accumulators has hooks, which must see its gradient whole."""
    for node in accumulators:
        parameter = node.variable
        if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
            return True
    return False


def weight_half(rest: Rest) -> None:
    """Add the gradients of the parameters that waited to their ``.grad``; uses of one parameter are summed first."""
    uses = Counter(target for targets, _, _ in rest for target, _ in targets)
    sums: dict[Any, Tensor] = {}
    rest.reverse()
    with torch.no_grad():
        while rest:
            targets, formula, arrived = rest.pop()
            for (target, transposed), gradient in zip(targets, formula(arrived)):
                parameter = target.variable
                if isinstance(gradient, Product):
                    if uses[target] == 1 and gradient.add_to(parameter, transposed):
                        continue
                    gradient = gradient.compute()
                value = (gradient.t() if transposed else gradient).to(parameter.device, parameter.dtype)
                if uses[target] == 1:
                    add_gradient(parameter, value, owned=value.shape != arrived.shape)
                else:
                    sums[target] = sums[target] + value if target in sums else value
    for target, value in sums.items():
        add_gradient(target.variable, value, owned=False)


def add_gradient(parameter: Tensor, gradient: Tensor, owned: bool) -> None:
    """What autograd does at a parameter. ``owned``: nobody else has the tensor, so it may become ``.grad``."""
    if parameter.grad is not None:
        parameter.grad.add_(gradient)
    elif owned and gradient.stride() == parameter.stride():
        parameter.grad = gradient
    else:
        parameter.grad = torch.empty_like(parameter, requires_grad=False).copy_(gradient)
