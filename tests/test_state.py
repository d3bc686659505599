"""Compiling leaves a model's own state and the random generators as they were, also when it fails."""

from __future__ import annotations

import random
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

from pipecompile.capture import capture, untouched
from pipecompile.errors import CaptureError


class Counts(nn.Module):
    """Changes all that it has in each forward; raises in the end if ``fails``."""

    def __init__(self, fails: bool) -> None:
        super().__init__()
        self.norm, self.fails, self.calls, self.mode = nn.BatchNorm1d(4), fails, 0, "new"
        self.register_buffer("seen", torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        del self.mode
        self.seen = torch.ones(3)
        random.random(), numpy.random.rand()
        x = self.norm(x) + torch.randn(4)
        if self.fails:
            raise ValueError("not today")
        return x.square().mean()


def state(model: Any) -> list[Any]:
    foreign = [random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]
    return [{name: b.tolist() for name, b in model.named_buffers()}, model.calls, vars(model).get("mode"), *foreign]


@pytest.mark.parametrize("fails", [True, False])
def test_what_a_step_changes_is_put_back(fails: bool) -> None:
    model = Counts(fails)
    before, seen = state(model), model.norm.running_mean
    try:
        with untouched(model):
            model(torch.randn(3, 4))
    except ValueError:
        assert fails
    assert state(model) == before
    assert model.norm.running_mean is seen, "stages hold the tensor itself"


def test_a_model_that_fails_by_itself_is_left_as_it_was() -> None:
    model, batch = Counts(True), (torch.randn(3, 4),)
    before = state(model)
    with pytest.raises(CaptureError, match="the model fails by itself"):
        capture(model, batch)
    assert state(model) == before
