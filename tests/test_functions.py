"""Custom autograd functions, hooks and gradients of gradients: exact where a module holds them, refused elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipecompile.errors import CaptureError
from tests.zoo.families.spiking import Fire as Spike
from tests.zoo.harness import compiled, run

WIDTH = 16


class Shut(torch.autograd.Function):
    """Its forward leaves a region without gradients, from which a trace does not come back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            return 3 * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 3 * gradient


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return -gradient


class Applied(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function.apply(x)


class Net(nn.Module):
    """Two branches behind a trunk; ``between`` is called before the second."""

    def __init__(self, between: Any = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(3)))
        self.one, self.two = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        x = self.trunk(x)
        return self.one(x).square().mean() + self.two(self.between(x)).square().mean()


class Frozen(nn.Module):
    """Frozen layers behind spikes: that a gradient flows back is said by the spikes alone."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(nn.Sequential(Applied(function), nn.Linear(WIDTH, WIDTH)) for _ in range(4))
        self.blocks.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return x.square().mean()


def case(model: nn.Module, loss: Any = None) -> tuple[nn.Module, dict[str, Tensor], Any]:
    return model, {"x": torch.randn(8, WIDTH)}, loss


@pytest.mark.parametrize("function", [Spike, Shut])
def test_what_only_the_backward_knows_is_exact(function: Any) -> None:
    row = run("frozen", case(Frozen(function)), 4, 4, "1f1b")
    assert row.ok, row


@pytest.mark.parametrize("function", [Reverse, Shut])
def test_a_function_in_a_module_of_its_own_is_exact(function: Any) -> None:
    row = run("net", case(Net(Applied(function))), 3, 3, "1f1b")
    assert row.ok, row


def test_a_function_belongs_to_the_forward_that_applies_it() -> None:
    """The module that is given its result is the first to return something behind it."""
    with pytest.raises(
        CaptureError, match=r"the model's own forward cannot be split: .*custom autograd function Reverse"
    ):
        compiled(case(Net(Reverse.apply)), 3, 3, "1f1b")


def reversed_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return Reverse.apply(model(batch["x"]))


def hooked_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    loss = model(batch["x"])
    loss.register_hook(lambda gradient: 2 * gradient)
    return loss


def penalty(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    x = batch["x"].clone().requires_grad_()
    loss = model(x)
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    return loss + gradient.square().sum()


@pytest.mark.parametrize(
    ("loss", "what"),
    [
        (reversed_loss, "uses the custom autograd function Reverse"),
        (hooked_loss, "registers a hook on a tensor"),
        (penalty, "calls torch.autograd.grad"),
    ],
)
def test_a_loss_function_that_a_stage_would_not_repeat_is_refused(loss: Any, what: str) -> None:
    with pytest.raises(
        CaptureError, match=f"the loss function cannot be split: it {what}.* move that code into a module"
    ):
        compiled(case(Net(nn.Identity()), loss), 3, 3, "1f1b")


class Energy(nn.Module):
    """A force: the gradient of an energy by the input."""

    def __init__(self) -> None:
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Softplus(), nn.Linear(WIDTH, 1))

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            at = x + 0.0
            return -torch.autograd.grad(self.energy(at).sum(), at, create_graph=True)[0]


def test_a_gradient_in_a_module_leaves_it_whole() -> None:
    torch.manual_seed(0)
    row = run("force", case(Net(Energy())), 3, 3, "1f1b")
    assert row.ok, row
