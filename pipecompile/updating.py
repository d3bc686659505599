"""What a step asks of its user: the parameters that were compiled to be trained, and, if the program updates weights while
it runs, an optimizer and a loss that is a mean."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from pipecompile.errors import BuildError, ScheduleError
from pipecompile.ir import Program
from pipecompile.ir.versions import updates


def check_mean(program: Program, weight: str) -> None:
    """ScheduleError if the loss is a sum over a weight that is known only when all microbatches are over."""
    if weight and updates(program.rows):
        raise ScheduleError(
            f"{program.schedule} updates weights before the last microbatch, so it cannot divide by the weight of all of "
            "them; give a loss function that returns a mean, or use a schedule that flushes, such as 1f1b"
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
