"""What a step asks of its user: the parameters that were compiled to be trained, and, if the program updates weights while
it runs, an optimizer and a loss that is a mean."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from pipecompile.errors import BuildError, ScheduleError
from pipecompile.ir import Program
from pipecompile.ir.versions import group_ends, updates
from pipecompile.plan import Plan


def check_mean(program: Program, plan: Plan, replicas: int) -> None:
    """ScheduleError if an update needs the weight of a loss before it is there.

    Where each microbatch has an update of its own, its loss is its own sum over its own weight. A group's weight is known
    only after the first of its backwards, and another stage's weight not where the loss's backward begins.
    """
    if not plan.weight or not updates(program.rows):
        return
    if len(group_ends(program.rows)) < program.shape.microbatches:
        raise ScheduleError(
            f"{program.schedule} updates weights after several microbatches, whose first backward runs before the weight "
            "of all of them is known; give a loss function that returns a mean, use pipedream, which updates after each, "
            "or a schedule that flushes, such as 1f1b"
        )
    if replicas > 1:
        raise ScheduleError(
            f"{program.schedule} sums the gradients of each microbatch over {replicas} replicas, but divides by the weight of "
            "its own one; give a loss function that returns a mean, use one replica, or a schedule that flushes"
        )
    makers = [{s.index for s in plan.stages for port in s.outputs if port.name == n} for n in (plan.loss, plan.weight)]
    ranks = [{program.shape.placement[stage] for stage in stages} for stages in makers]
    if ranks[0] != ranks[1]:
        raise ScheduleError(
            f"{program.schedule} divides each microbatch's loss by its own weight, but stage {min(makers[0])} makes the loss "
            f"and stage {min(makers[1])} the weight, on another rank; compute the weight from what the loss is computed from"
        )


def check_frozen(frozen: Iterable[tuple[str, nn.Parameter]]) -> None:
    """BuildError if a parameter is trained now that was ``frozen`` when the stages were made: no gradient may reach it."""
    for name, p in frozen:
        if p.requires_grad:
            raise BuildError(
                f"parameter {name!r} was frozen when the model was compiled and is trained now, but the stages pass back "
                "only the gradients that were needed then; compile again, or freeze it with requires_grad_(False)"
            )


def check_optimizer(
    program: Program, parameters: Iterable[nn.Parameter], optimizer: torch.optim.Optimizer | None
) -> None:
    """ScheduleError if a step needs an optimizer and has none that trains ``parameters``, or has one for nothing."""
    if not updates(program.rows):
        if optimizer is not None:
            raise ScheduleError(
                f"{program.schedule} leaves the gradients in .grad; call step(batch) alone, then optimizer.step()"
            )
        return
    if optimizer is None:
        raise ScheduleError(
            f"{program.schedule} updates weights inside a step; give step(batch, optimizer), or use a schedule that "
            "flushes, such as 1f1b"
        )
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    trained = [p for p in parameters if p.requires_grad]
    if trained and not any(id(p) in known for p in trained):
        raise ScheduleError(
            "the optimizer has none of this pipe's parameters; make it of pipe.parameters(), and do not replace them"
        )
