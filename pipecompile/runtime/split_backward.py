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

Where the products of a stage are so small that looking for them takes as long as they do, nothing waits: its input half
is the whole backward.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from pipecompile.runtime.backward_graph import Node, Structure, read
from pipecompile.runtime.weight_formulas import Gradients, Product

Targets = tuple[tuple[Tensor, bool], ...]
"""The parameters of an operation, and whether it used each transposed."""
Rest = list[tuple[Targets, Gradients, Tensor]]
"""What the second half has to do: for each operation its parameters, the formula, the gradient that arrived."""


WORTH = 1 << 19
"""Multiply-adds that wait for each node of a stage's graph, on a CPU, below which splitting costs more than it defers."""
PAUSE = 64
"""Backwards until a stage that was not worth splitting is looked at again: sizes and frozen parameters may change."""


class Known:
    """The structure of a stage's last graph, so that the next one is only compared with it.

    ``pause``: for so many backwards the stage is not looked at, because it was not worth splitting, which ``always`` it is
    on an accelerator.
    """

    __slots__ = ("always", "pause", "structure")

    def __init__(self, always: bool = False) -> None:
        self.structure: Structure | None = None
        self.pause = 0
        self.always = always


def input_half(
    roots: Sequence[GradientEdge], gradients: Sequence[Tensor], leaves: Sequence[Tensor], known: Known | None = None
) -> tuple[list[Tensor | None], Rest]:
    """The gradients of ``leaves``, and what remains to be done for the parameters.

    If a parameter has hooks, nothing waits: hooks see each gradient once and whole. Nor does it if the stage runs a
    backward of its own inside (reentrant checkpointing), which autograd allows in a whole backward only.
    """
    if not roots:
        return [None] * len(leaves), []
    others, rest = _prepare(roots, leaves, known or Known())
    if not rest:
        torch.autograd.backward(roots, gradients)
        return [leaf.grad for leaf in leaves], []
    wanted: list[Any] = [*leaves, *others, *(GradientEdge(node, 0) for node, _, _ in rest)]
    found = torch.autograd.grad(roots, wanted, gradients, allow_unused=True)
    first, last = len(leaves), len(leaves) + len(others)
    for parameter, gradient in zip(others, found[first:last]):
        if gradient is not None:
            add_gradient(parameter, gradient, owned=False)
    arrived = zip(rest, found[last:])
    return list(found[:first]), [(targets, formula, g) for (_, targets, formula), g in arrived if g is not None]


def _prepare(
    roots: Sequence[GradientEdge], leaves: Sequence[Tensor], known: Known
) -> tuple[list[Tensor], list[tuple[Node, Targets, Gradients]]]:
    """The parameters that cannot wait, and each operation that does: its node, its parameters, its formula."""
    if known.pause:
        known.pause -= 1
        return [], []
    structure = known.structure
    nodes = None if structure is None else structure.recognise(roots, leaves)
    while True:
        if structure is None or nodes is None:
            structure, nodes = read(roots, leaves)
            if structure.whole or not _worth(structure, known.always):
                known.structure, known.pause = None, PAUSE
                return [], []
            known.structure = structure
        others = [structure.parameters[number] for number in structure.others]
        if hooked(others):
            return [], []
        rest = _waiting(structure, nodes)
        if rest is not None:
            return others, [] if any(hooked(p for p, _ in targets) for _, targets, _ in rest) else rest
        structure = None


def _worth(structure: Structure, always: bool) -> bool:
    """Whether what can wait takes longer than finding it. Without contents nothing says which device is meant."""
    if not structure.deferred:
        return False
    device = structure.parameters[structure.deferred[0].targets[0].number].device.type
    if always or device not in ("cpu", "meta"):
        return True
    return sum(one.work for one in structure.deferred) >= WORTH * len(structure.kinds)


def _waiting(structure: Structure, nodes: list[Node]) -> list[tuple[Node, Targets, Gradients]] | None:
    """The operations that wait; None if one of them cannot in this graph."""
    rest = []
    for one in structure.deferred:
        node = nodes[one.number]
        formula = one.make(node, len(one.targets) > 1)
        if formula is None:
            return None
        rest.append((node, tuple((structure.parameters[t.number], t.transposed) for t in one.targets), formula))
    return rest


def hooked(parameters: Iterable[Tensor]) -> bool:
    """Whether a parameter has hooks, which must see its gradient whole."""
    return any(p._backward_hooks or p._post_accumulate_grad_hooks for p in parameters)


def weight_half(rest: Rest) -> None:
    """Add the gradients of the parameters that waited to their ``.grad``; uses of one parameter are summed first."""
    uses = Counter(id(parameter) for targets, _, _ in rest for parameter, _ in targets)
    sums: dict[int, tuple[Tensor, Tensor]] = {}
    rest.reverse()
    with torch.no_grad():
        while rest:
            targets, formula, arrived = rest.pop()
            for (parameter, transposed), gradient in zip(targets, formula(arrived)):
                once = uses[id(parameter)] == 1
                if isinstance(gradient, Product):
                    if once and gradient.add_to(parameter, transposed):
                        continue
                    gradient = gradient.compute()
                value = (gradient.t() if transposed else gradient).to(parameter.device, parameter.dtype)
                if once:
                    add_gradient(parameter, value, owned=value.shape != arrived.shape)
                else:
                    before = sums.get(id(parameter))
                    sums[id(parameter)] = (parameter, value if before is None else before[1] + value)
    for parameter, value in sums.values():
        add_gradient(parameter, value, owned=False)


def add_gradient(parameter: Tensor, gradient: Tensor, owned: bool) -> None:
    """What autograd does at a parameter. ``owned``: nobody else has the tensor, so it may become ``.grad``."""
    if parameter.grad is not None and parameter.grad.is_sparse:
        parameter.grad = gradient + parameter.grad
    elif parameter.grad is not None:
        parameter.grad.add_(gradient)
    elif gradient.is_sparse:
        parameter.grad = gradient if owned else gradient.clone()
    elif owned and gradient.stride() == parameter.stride():
        parameter.grad = gradient
    else:
        parameter.grad = torch.empty_like(parameter, requires_grad=False).copy_(gradient)
