"""Memory that a model changes in place: one small model for each way in which a cut could go wrong.

Each is exact on four stages with its remedy, and its loss or gradients are wrong without.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pipecompile
from pipecompile.compare import differences, gradients
from tests.test_pitfalls import WIDTH, Net
from tests.zoo.harness import compiled


class OnViews(Net):
    """Halves of a value are changed by operations that do not give it to anyone; it is then read by its old name."""

    def between(self, x: Tensor, index: int) -> Tensor:
        x = x * 1.5
        x[:, :4].add_(1.0)
        x[:, 4:].mul_(2.0)
        return x


class WhereMade(Net):
    """The stage that makes a value changes it; what reads it before could be in a later stage, which gets the changed one."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow = nn.Linear(4, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers[0](x)
        wide = x.repeat(1, 4)  # four times the bytes, so that its reader's stage is the cheapest place
        x = self.narrow(x.relu_().reshape(-1, 4, 4).sum(1))
        for layer in self.layers[1:]:
            x = torch.tanh(layer(x))
        return (x.repeat(1, 4) - wide).square().mean()


class Shifted(Net):
    """A target made of activations, shifted in place at two places far apart, then read by its first name."""

    def forward(self, x: Tensor) -> Tensor:
        target = torch.zeros(x.shape)
        for index, layer in enumerate(self.layers):
            x = torch.tanh(layer(x))
            if index in (1, 3):
                target[:, index:] += x[:, index:].detach()
        return (x - target).square().mean()


class OfTheBatch(Net):
    """A part of the batch is changed first; all layers read a mask that is made of it."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        y[:, : WIDTH // 2] += 0.25
        for layer in self.layers:
            x = torch.tanh(layer(x)) * (y > 0.1)
        return (x - y).square().mean()


class OfTheBatchLate(Net):
    """A part of the batch is changed between layers that read it."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for index, layer in enumerate(self.layers):
            x = torch.tanh(layer(x)) * (y < 0)
            if index == 3:
                y[:, : WIDTH // 2] += 0.25
        return (x - y).square().mean()


class OnReceived(Net):
    """Every block begins by changing what it is given, which is kept where the stage runs again in the backward."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(WIDTH, WIDTH)) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1.0
        for block in self.blocks:
            x = block(x)
        return x.square().mean()


def case(make: Callable[[], nn.Module]) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    batch = {"x": torch.randn(8, WIDTH)}
    return make(), batch | ({"y": torch.randn(8, WIDTH)} if make in (OfTheBatch, OfTheBatchLate) else {})


def check(pipe: Any, model: nn.Module, unsplit: nn.Module, batch: dict[str, Tensor]) -> None:
    """The pipe leaves the batch as it was; two steps of it are those of the unsplit model."""
    before = copy.deepcopy(batch)
    for _ in range(2):
        value = pipe.step(batch)
        expected = pipe.reference(unsplit, copy.deepcopy(before))
        found = [
            *differences({"": value}, {"": expected}, "loss"),
            *differences(gradients(model), gradients(unsplit), ""),
        ]
        assert all(difference.ok for difference in found), found
    assert all(torch.equal(batch[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("make", [OnViews, OnReceived, WhereMade, Shifted, OfTheBatch, OfTheBatchLate])
def test_exact_on_four_stages(make: Callable[[], nn.Module]) -> None:
    model, batch = case(make)
    unsplit = copy.deepcopy(model)
    check(compiled((model, batch, None), 4, 4, "1f1b"), model, unsplit, batch)


@pytest.mark.parametrize("make", [OfTheBatch, OfTheBatchLate])
def test_one_stage_reads_what_it_changes_of_the_batch(make: Callable[[], nn.Module]) -> None:
    """Every process has a batch of its own: no other stage's would change with it."""
    model, batch = case(make)
    pipe = compiled((model, batch, None), 4, 4, "1f1b")
    assert sum('batch["y"]' in pipe.source(stage) for stage in range(4)) == 1


@pytest.mark.parametrize(
    ("make", "recompute"), [(OfTheBatch, "none"), (OfTheBatchLate, "stage"), (OnReceived, "stage")]
)
def test_compiling_leaves_the_batch_as_it_was(make: Callable[[], nn.Module], recompute: Any) -> None:
    model, batch = case(make)
    unsplit, before = copy.deepcopy(model), copy.deepcopy(batch)
    options: dict[str, Any] = {"costs": "measure" if recompute == "none" else "estimate", "progress": False}
    pipe = pipecompile.compile(model, batch, stages=4, microbatches=4, recompute=recompute, **options)
    assert all(torch.equal(batch[name], tensor) for name, tensor in before.items())
    check(pipe, model, unsplit, batch)
