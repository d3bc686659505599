"""Loss scaling for float16: torch's GradScaler, with one check for infinities over all ranks.

step           the loss's gradient begins at the scale, on the rank that has the loss
unscale_       each rank divides its gradients and looks for infinities; every rank hears whether any has found one
step, update   on every rank the same: it skips or it does not, and the next scale is known
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from pipecompile.errors import RuntimeFault, ScheduleError

SumOverRanks = Callable[[Tensor], Tensor]


class GradScaler(torch.amp.GradScaler):
    """``torch.amp.GradScaler`` for ``pipe.step(batch, scaler=…)``, the same on every rank.

    Every rank calls ``unscale_``, ``step`` and ``update`` at the same points. RuntimeFault if gradients were not scaled.
    """

    def __init__(self, sum_over_ranks: SumOverRanks, **options: Any) -> None:
        super().__init__(**options)
        self._sum_over_ranks = sum_over_ranks
        self.scaled = False
        """Whether a step was given this scaler since the last ``update``."""

    def update(self, new_scale: float | Tensor | None = None) -> None:
        super().update(new_scale)
        self.scaled = False

    def _unscale_grads_(
        self, optimizer: torch.optim.Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        if not self.scaled:
            raise RuntimeFault(
                "no step since the last update() was given this scaler, so its gradients are not scaled; call "
                "pipe.step(batch, scaler=scaler)"
            )
        found = super()._unscale_grads_(optimizer, inv_scale, found_inf, allow_fp16)
        here = inv_scale.device
        any_here = sum((one.to(here) for one in found.values()), torch.zeros_like(inv_scale))
        return {here: self._sum_over_ranks(any_here)}


def scale_of(
    scaler: torch.amp.GradScaler | None, updates: bool, ranks: int, parameters: Iterable[Tensor]
) -> Tensor | None:
    """What a step multiplies its gradients with; None for no scaler. ScheduleError for one that cannot do it."""
    if scaler is None or not scaler.is_enabled():
        return None
    if updates:
        raise ScheduleError(
            "this schedule updates weights while it runs, before infinities of all ranks are known; step without a "
            "scaler, or use a schedule that flushes, such as 1f1b"
        )
    if ranks > 1 and not isinstance(scaler, GradScaler):
        raise ScheduleError(
            f"the scaler is a {type(scaler).__module__}.{type(scaler).__name__}, which looks for infinities on one rank "
            "only, so that others would not skip the step; make it with pipe.grad_scaler(init_scale=…)"
        )
    if isinstance(scaler, GradScaler):
        scaler.scaled = True
    device = next((p.device for p in parameters), torch.device("cpu"))
    found: Tensor = scaler.scale(torch.ones((), device=device))
    return found
