"""Gradients that must be kept apart from what ``.grad`` held before the step, and those that several stages share.

A sum over stages or ranks, and a division by the step's weight, may touch only what this step has added. For the
parameters concerned ``.grad`` starts the step empty and gets its old value back, plus the step's, at the end.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from pipecompile.runtime.messages import Plans


class Apart:
    """The gradients of ``parameters`` before a step, set aside until it ends."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._parameters = list({id(p): p for p in parameters if p.requires_grad}.values())
        self._before: list[Tensor | None] = []

    def begin(self) -> None:
        self._before = [p.grad for p in self._parameters]
        for p in self._parameters:
            p.grad = None

    def end(self, divisor: Tensor | None = None) -> None:
        """Divide what the step made by ``divisor``, if one is given, and add it to what was there before."""
        for p, before in zip(self._parameters, self._before):
            if divisor is not None and p.grad is not None:
                p.grad.div_(divisor.to(p.grad.device))
            if before is not None:
                p.grad = before if p.grad is None else before.add_(p.grad)
        self._before = []

    def abandon(self) -> None:
        """Forget the step: every gradient is what it was before."""
        for p, before in zip(self._parameters, self._before):
            p.grad = before
        self._before = []


def shared_parameters(stages: Mapping[int, nn.Module], plans: Plans) -> dict[str, list[Tensor]]:
    """By canonical FQN: the different tensors that ``stages`` hold for one shared, trainable parameter."""
    found: dict[str, dict[int, Tensor]] = {}
    for index, stage in stages.items():
        for canonical, fqn in plans[index].shared.items():
            parameter = stage.get_parameter(fqn)
            if parameter.requires_grad:
                found.setdefault(canonical, {})[id(parameter)] = parameter
    return {canonical: list(tensors.values()) for canonical, tensors in found.items()}


def total(copies: Iterable[Tensor]) -> Tensor | None:
    """The sum of the copies' gradients (None counts as zeros), None if there is none."""
    gradients = [copy.grad for copy in copies if copy.grad is not None]
    return sum(gradients[1:], gradients[0]) if gradients else None


def share(copies: list[Tensor], gradient: Tensor) -> None:
    """Give every copy the same gradient, each its own tensor."""
    with torch.no_grad():
        for index, copy in enumerate(copies):
            copy.grad = gradient if index == 0 else gradient.clone()
