"""What a step means: gradient accumulation over the same microbatches on the unsplit model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pipecompile.capture import Step


def accumulate(step: Step, batches: Sequence[Sequence[Any]], begin: Callable[[int, int], None]) -> Tensor:
    """The loss of the microbatches of all replicas' batches; gradients are added to ``.grad``.

    ``begin`` is called with each one's replica and number. A replica's mean counts as much as another's.
    """
    losses: list[Tensor] = []
    weights: list[Tensor] = []
    pieces = [(replica, m, one) for replica, each in enumerate(batches) for m, one in enumerate(each)]
    for replica, number, microbatch in pieces:
        begin(replica, number)
        loss, weight, *_ = step(microbatch)
        if weight is None:
            loss = loss / (len(batches[replica]) * len(batches))
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
