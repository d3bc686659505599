"""What a step means: gradient accumulation over the same microbatches on the unsplit model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pipecompile.capture import Step


def accumulate(step: Step, microbatches: Sequence[Any], begin: Callable[[int], None]) -> Tensor:
    """The loss of all microbatches; gradients are added to ``.grad``. ``begin`` is called with each one's number."""
    losses: list[Tensor] = []
    weights: list[Tensor] = []
    for index, microbatch in enumerate(microbatches):
        begin(index)
        loss, weight, *_ = step(microbatch)
        if weight is None:
            loss = loss / len(microbatches)
            torch.autograd.backward([loss])
            loss = loss.detach()
        else:
            weights.append(weight.reshape(()))
        losses.append(loss.reshape(()))
    total = functools.reduce(torch.add, losses)
    if weights:
        total = total / functools.reduce(torch.add, weights)
        torch.autograd.backward([total])
    return total.detach()
