"""A checkpoint in the middle of training, gone on with by another number of stages: the losses of the whole loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.test_masters import narrow
from tests.test_step_options import noisy
from tests.test_training import compiled, words

MAKES = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.2, momentum=0.9, nesterov=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
}


class Loop:
    """Dropout, clipping, loss scaling, a schedule of rates, and an optimizer with state."""

    def __init__(self, make: Any, stages: int, masters: bool) -> None:
        model, dtype = (narrow(), torch.float32) if masters else (noisy(), None)
        self.pipe = compiled(model, stages=stages, gradient_dtype=dtype)
        self.optimizer = make(self.pipe.master_parameters())
        self.scaler = self.pipe.grad_scaler(init_scale=8.0, growth_interval=2)
        self.rates = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, T_max=7)

    def losses(self, steps: range) -> list[float]:
        found = []
        for step in steps:
            found.append(float(self.pipe.step(words(step), scaler=self.scaler)))
            self.scaler.unscale_(self.optimizer)
            self.pipe.clip_grad_norm_(1.0)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad()
            self.rates.step()
        return found


@pytest.mark.parametrize(("name", "masters"), [("adamw", False), ("sgd", False), ("adafactor", False), ("adamw", True)])
def test_losses_of_a_loop_that_was_interrupted(name: str, masters: bool, tmp_path: Path) -> None:
    whole = Loop(MAKES[name], 4, masters).losses(range(5))
    first = Loop(MAKES[name], 4, masters)
    losses = first.losses(range(3))
    first.pipe.save_checkpoint(tmp_path, first.optimizer)
    again = Loop(MAKES[name], 2, masters)
    again.pipe.load_checkpoint(tmp_path, again.optimizer)
    for mine, theirs in ((again.scaler, first.scaler), (again.rates, first.rates)):
        mine.load_state_dict(theirs.state_dict())
    assert losses + again.losses(range(3, 5)) == whole
