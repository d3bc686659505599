"""Splits a backward in two: gradients of what a stage received now, gradients of its parameters later.

Most of the time that parameters cost goes into few operations (matrix products, convolutions, embeddings), and their
two halves are separate computations. For these, the first half stops at the operation: autograd gives the gradient that
arrives there and never enters the branch of the weight. The second half multiplies it with the operation's saved input.
Every other parameter's gradient (norms, scalings) comes out of the first half, where it is nearly free.

    x ──▶ Addmm ──▶ gelu ──▶ Addmm ──▶ y        first half:  gy ─▶ gx, and on the way g at both Addmm
            │                  │                             everything saved is freed, but the inputs of both Addmm
          T(W1)              T(W2)              second half: input × g ─▶ W1.grad, W2.grad

One pass over the graph's nodes for each microbatch, no second pass of autograd over the stage.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from pipecompile.runtime.weight_formulas import FORMULAS, Gradients

REENTRANT = "CheckpointFunctionBackward"
Target = tuple[Any, bool]
"""The accumulator of a parameter, and whether the operation used the parameter transposed."""
Deferred = tuple[Any, tuple[Target, ...], Gradients]
"""An operation's node, where its parameters are, and how their gradients come from the one that arrives at it."""
Rest = list[tuple[tuple[Target, ...], Gradients, Tensor]]
"""What the second half has to do: for each operation also the gradient that arrived."""


def input_half(
    roots: Sequence[GradientEdge], gradients: Sequence[Tensor], leaves: Sequence[Tensor]
) -> tuple[list[Tensor | None], Rest]:
    """The gradients of ``leaves``, and what remains to be done for the parameters.

    If a parameter has hooks, nothing waits: hooks see each gradient once and whole. Nor does it if the stage runs a
    backward of its own inside (reentrant checkpointing), which autograd allows in a whole backward only.
    """
    if not roots:
        return [None] * len(leaves), []
    inputs = [get_gradient_edge(leaf) for leaf in leaves]
    deferred, others = _plan(roots, {edge.node for edge in inputs})
    accumulators = [*others, *(target for _, targets, _ in deferred for target, _ in targets)]
    if any(map(_needs_whole, accumulators)):
        torch.autograd.backward(roots, gradients)
        return [leaf.grad for leaf in leaves], []
    wanted = [*inputs, *(GradientEdge(node, 0) for node in others), *(GradientEdge(node, 0) for node, _, _ in deferred)]
    found = torch.autograd.grad(roots, wanted, gradients, allow_unused=True)
    first, last = len(inputs), len(inputs) + len(others)
    for node, gradient in zip(others, found[first:last]):
        if gradient is not None:
            _add(node.variable, gradient, owned=False)
    rest = [(targets, formula, g) for (_, targets, formula), g in zip(deferred, found[last:]) if g is not None]
    return list(found[:first]), rest


def _needs_whole(node: Any) -> bool:
    if type(node).__name__ == REENTRANT:
        return True
    return bool(node.variable._backward_hooks or node.variable._post_accumulate_grad_hooks)


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
                value = (gradient.t() if transposed else gradient).to(parameter.device, parameter.dtype)
                if uses[target] == 1:
                    _add(parameter, value, owned=value.shape != arrived.shape)
                else:
                    sums[target] = sums[target] + value if target in sums else value
    for target, value in sums.items():
        _add(target.variable, value, owned=False)


def _add(parameter: Tensor, gradient: Tensor, owned: bool) -> None:
    """What autograd does at a parameter. ``owned``: nobody else has the tensor, so it may become ``.grad``."""
    if parameter.grad is not None:
        parameter.grad.add_(gradient)
    elif owned and gradient.stride() == parameter.stride():
        parameter.grad = gradient
    else:
        parameter.grad = torch.empty_like(parameter, requires_grad=False).copy_(gradient)


def _plan(roots: Iterable[GradientEdge], inputs: set[Any]) -> tuple[list[Deferred], list[Any]]:
    """The operations to defer, and the accumulators of all other parameters.

    A parameter that is also reached otherwise cannot wait (autograd would enter its branch in the first half), and
    then neither can an operation that uses it.
    """
    deferred: list[Deferred] = []
    others: set[Any] = set()
    seen: set[Any] = set(inputs)
    stack: list[Any] = [edge.node for edge in roots]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        kind = type(node).__name__
        if kind in ("AccumulateGrad", REENTRANT):
            others.add(node)
        if kind == "AccumulateGrad":
            continue
        following = node.next_functions
        if kind in FORMULAS:
            places, make = FORMULAS[kind]
            targets = [_target(following[place][0], inputs) for place in places]
            formula = make(node, len(targets) > 1 and targets[1] is not None) if targets[0] is not None else None
            if formula is not None:
                deferred.append((node, tuple(target for target in targets if target is not None), formula))
                waiting = [place for place, target in zip(places, targets) if target is not None]
                following = [branch for place, branch in enumerate(following) if place not in waiting]
        stack.extend(child for child, _ in following if child is not None)
    while rejected := [one for one in deferred if any(target in others for target, _ in one[1])]:
        others.update(target for one in rejected for target, _ in one[1])
        deferred = [one for one in deferred if one not in rejected]
    return deferred, list(others)


def _target(branch: Any, inputs: set[Any]) -> Target | None:
    """The parameter that a branch holds, as it is, converted or transposed; None if it holds anything else."""
    transposed = type(branch).__name__ == "TBackward0"
    node = branch.next_functions[0][0] if transposed else branch
    if type(node).__name__ == "ToCopyBackward0":  # autocast
        node = node.next_functions[0][0]
    return (node, transposed) if type(node).__name__ == "AccumulateGrad" and node not in inputs else None
