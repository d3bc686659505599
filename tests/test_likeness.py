"""Which blocks are traced once for all: those that do the same, whatever kind of attribute says what they do."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pipecompile
from pipecompile.capture.blocks import repeated
from pipecompile.compare import differences, gradients, worst


class Scale:
    def __init__(self, by: float) -> None:
        self.by = by

    def __call__(self, x: Tensor) -> Tensor:
        return x * self.by


def closure(by: float) -> Callable[[Tensor], Tensor]:
    return lambda x: x * by


class Block(nn.Module):
    """``how`` is what its forward goes by: something that is called, or holds a number."""

    def __init__(self, how: Any) -> None:
        super().__init__()
        self.inner, self.how = nn.Linear(4, 4), how

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.inner(x)
        if callable(self.how):
            return x + self.how(hidden)
        by = next(iter(self.how.values() if isinstance(self.how, dict) else self.how))
        return x + torch.tanh(hidden) * by


class Net(nn.Module):
    def __init__(self, first: Any, second: Any) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(first), Block(second)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x.square().mean()


MAKERS = {
    "dict": lambda by: {"scale": by},
    "set": lambda by: {by},
    "nested": lambda by: ([by],),
    "object": Scale,
    "closure": closure,
    "default": lambda by: eval(f"lambda x, by={by}: x * by"),
    "partial": lambda by: functools.partial(torch.mul, other=by),
}


@pytest.mark.parametrize("kind", MAKERS)
def test_blocks_that_do_something_else_are_not_alike(kind: str) -> None:
    make = MAKERS[kind]
    assert not repeated(Net(make(2.0), make(3.0)), ())


def test_tensors_are_known_by_identity() -> None:
    one = torch.ones(1)
    assert repeated(Net(one, one), ())
    assert not repeated(Net(one, torch.ones(1)), ())


@pytest.mark.parametrize("kind", ["dict", "nested", "object", "closure", "partial"])
def test_blocks_that_do_the_same_are_alike(kind: str) -> None:
    make = MAKERS[kind]
    assert len(repeated(Net(make(2.0), make(2.0)), ())) == 2


def test_a_blocks_own_index_name_and_methods_make_no_difference() -> None:
    net = Net(2.0, 2.0)
    for index, block in enumerate(net.blocks):
        block.layer_idx, block.path, block.run = index, f"blocks.{index}", block.forward
    assert len(repeated(net, ())) == 2
    net.blocks[0].run = net.blocks[1].forward
    assert not repeated(net, ())


def test_an_opened_block_keeps_its_own_attribute() -> None:
    torch.manual_seed(0)
    model, batch = Net({"scale": 2.0}, {"scale": 3.0}), (torch.randn(4, 4),)
    unsplit = copy.deepcopy(model)
    pipe = pipecompile.compile(model, batch, stages=4, microbatches=2, costs="estimate", check=False)
    assert len(pipe.plan.opened) == 2
    pipe.step(batch)
    pipe.reference(unsplit, batch)
    assert worst(list(differences(gradients(model), gradients(unsplit), ""))).ok
