"""Random numbers follow (seed, step, microbatch, call), whatever the stages, the schedule and the recomputation."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import pipecompile
from pipecompile.compare import gradients

SHAPES = [(1, 1, "1f1b"), (2, 2, "gpipe"), (4, 4, "1f1b"), (4, 2, "interleaved-1f1b")]


class Block(nn.Module):
    """Draws in a child module and directly, before and after the child."""

    def __init__(self, width: int, recompute: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)
        self.dropout = nn.Dropout(0.3)
        self.recompute = recompute

    def inner(self, x: Tensor) -> Tensor:
        x = F.dropout(self.first(x), 0.2, self.training)
        x = self.dropout(torch.relu(x))
        return F.dropout(self.second(x), 0.1, self.training)

    def forward(self, x: Tensor) -> Tensor:
        return x + (checkpoint(self.inner, x, use_reentrant=False) if self.recompute else self.inner(x))


class Model(nn.Module):
    """Blocks, one of them called twice, between direct draws."""

    def __init__(self, recompute: bool = False) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 16)
        self.blocks = nn.ModuleList(Block(16, recompute) for _ in range(4))
        self.head = nn.Linear(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(self.embed(x), 0.1, self.training)
        for block in (*self.blocks, self.blocks[1]):
            x = block(x)
        return self.head(F.dropout(x, 0.1, self.training)).square().mean()


def train(model: nn.Module, batch: Any, stages: int, ranks: int, schedule: str, steps: int = 2) -> list[Any]:
    pipe = pipecompile.compile(
        model, batch, stages=stages, ranks=ranks, microbatches=4, schedule=schedule, costs="estimate"
    )
    found = []
    for _ in range(steps):
        model.zero_grad()
        found.append((pipe.step(batch), gradients(model)))
    return found


@pytest.mark.parametrize("recompute", [False, True])
def test_same_numbers_however_the_model_is_cut(recompute: bool) -> None:
    torch.manual_seed(0)
    model, batch = Model(recompute), (torch.randn(8, 8),)
    runs = [train(model, batch, *shape) for shape in SHAPES]
    losses = [[float(loss) for loss, _ in run] for run in runs]
    assert losses[0][0] != losses[0][1], "every step draws anew"
    assert all(run == losses[0] for run in losses)
    shared = {name for name, _ in model.named_parameters() if name.startswith(("blocks.1", "blocks.0", "embed"))}
    for run in runs[1:]:
        for (_, got), (_, expected) in zip(run, runs[0]):
            for name in got:
                if name not in shared:
                    assert torch.equal(got[name], expected[name]), name
                torch.testing.assert_close(got[name], expected[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_reference_draws_the_same(shape: tuple[int, int, str]) -> None:
    torch.manual_seed(1)
    model, batch = Model(), (torch.randn(8, 8),)
    stages, ranks, schedule = shape
    pipe = pipecompile.compile(
        model, batch, stages=stages, ranks=ranks, microbatches=4, schedule=schedule, costs="estimate"
    )
    for _ in range(2):
        model.zero_grad()
        loss = pipe.step(batch)
        got = gradients(model)
        model.zero_grad()
        assert torch.equal(pipe.reference(model, batch), loss)
        for name, expected in gradients(model).items():
            torch.testing.assert_close(got[name], expected, rtol=1e-6, atol=1e-7)


def test_the_callers_random_state_is_untouched() -> None:
    torch.manual_seed(2)
    model, batch = Model(), (torch.randn(8, 8),)
    pipe = pipecompile.compile(model, batch, stages=2, microbatches=4, costs="estimate")
    before = torch.get_rng_state()
    pipe.step(batch)
    pipe.reference(copy.deepcopy(model), batch)
    assert torch.equal(torch.get_rng_state(), before)


def test_outside_of_a_step_modules_draw_from_the_callers_state() -> None:
    torch.manual_seed(3)
    model, batch = Model(), (torch.randn(8, 8),)
    untouched = copy.deepcopy(model)
    pipecompile.compile(model, batch, stages=2, microbatches=4, costs="estimate")
    torch.manual_seed(4)
    expected = untouched(*batch)
    torch.manual_seed(4)
    assert torch.equal(model(*batch), expected)
