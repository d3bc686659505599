"""Gradients that must be kept apart from what ``.grad`` held before the step, and those that several stages share.

A sum over stages or ranks, and a division by the step's weight, may touch only what this step has added. For the
parameters concerned ``.grad`` starts the step empty and gets its old value back, plus the step's, at the end.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from pipecompile.runtime.main_gradients import gradient, set_gradient
from pipecompile.runtime.messages import Plans


class Apart:
    """The gradients of ``parameters`` before a step, set aside until it ends."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._parameters = list({id(p): p for p in parameters if p.requires_grad}.values())
        self._before: list[Tensor | None] = []

    def begin(self) -> None:
        self._before = [gradient(p) for p in self._parameters]
        for p in self._parameters:
            set_gradient(p, None)

    def end(self, divisor: Tensor | None = None) -> None:
        """Divide what the step made by ``divisor``, if one is given, and add it to what was there before."""
        for p, before in zip(self._parameters, self._before):
            made = gradient(p)
            if divisor is not None and made is not None:
                made.div_(divisor.to(made.device))
            if before is not None:
                set_gradient(p, before if made is None else before.add_(made))
        self._before = []

    def abandon(self) -> None:
        """Forget the step: every gradient is what it was before."""
        for p, before in zip(self._parameters, self._before):
            set_gradient(p, before)
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
    gradients = [found for copy in copies if (found := gradient(copy)) is not None]
    return sum(gradients[1:], gradients[0]) if gradients else None


def share(copies: Iterable[Tensor], whole: Tensor | None) -> None:
    """Give every copy the same gradient, each its own tensor; None to all if there is none."""
    with torch.no_grad():
        for index, copy in enumerate(copies):
            set_gradient(copy, whole if index == 0 or whole is None else whole.clone())
