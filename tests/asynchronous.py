"""The oracle of schedules that never flush: the unsplit model trained one microbatch after the other, with a history of
every parameter, by the published rules (arXiv 1806.03377, 2006.09503) and nothing of the code under test."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tests.models import Loss
from tests.oracle import parts

Version = Callable[[int, int, int], int]
"""From the number of stages, a stage and a microbatch: the version of the stage's weights that the microbatch reads."""


def pipedream(stages: int, stage: int, microbatch: int) -> int:
    """As many updates old as there are stages behind this one."""
    return max(0, microbatch - (stages - 1 - stage))


def two_buffers(stages: int, stage: int, microbatch: int) -> int:
    """One update old, an update for each group of as many microbatches as stages."""
    return max(0, microbatch // stages - 1)


RULES: Mapping[str, tuple[Version, bool]] = {"pipedream": (pipedream, False), "pipedream-2bw": (two_buffers, True)}
"""By schedule: the rule, and whether updates follow groups of microbatches."""


def train(
    model: nn.Module,
    batch: Any,
    loss: Loss | None,
    optimizer: torch.optim.Optimizer,
    microbatches: int,
    stage_of: Mapping[str, int],
    stages: int,
    version: Version,
    group: int,
) -> list[Tensor]:
    """The loss of each microbatch; ``model`` is left with its last weights. ``stage_of``: each parameter's first stage."""
    history = {name: [p.detach().clone()] for name, p in model.named_parameters()}
    losses = []
    for t, part in enumerate(parts(batch, microbatches)):
        first = t // group * group
        size = min(group, microbatches - first)
        for name, p in model.named_parameters():
            p.data = history[name][version(stages, stage_of[name], t)].clone()
        value = loss(model, part) if loss else model(**part).loss
        (value / size).backward()
        losses.append(value.detach())
        if t == first + size - 1:
            for name, p in model.named_parameters():
                p.data = history[name][-1].clone()
            optimizer.step()
            optimizer.zero_grad()
            for name, p in model.named_parameters():
                history[name].append(p.detach().clone())
    return losses
