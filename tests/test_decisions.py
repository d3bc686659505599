"""Code that depends on what is in a tensor, on random numbers, or on what it remembers: exact, or refused with a remedy."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

from pipecompile.errors import CaptureError, RuntimeFault
from tests.zoo.harness import compiled, run

WIDTH = 16
Body = Callable[[Any, Tensor, Tensor], Tensor]


class Inner(nn.Module):
    def __init__(self, body: Body) -> None:
        super().__init__()
        self.linear, self.body, self.scale = nn.Linear(WIDTH, WIDTH), body, 1.0

    def forward(self, x: Tensor, flag: Tensor) -> Tensor:
        return self.body(self, x, flag)


class Net(nn.Module):
    """Six linear layers, with ``body`` after each: in a module of its own, or in the model's own forward."""

    def __init__(self, body: Body, inside: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(6))
        self.inner = nn.ModuleList(Inner(body) for _ in range(6) if inside)
        self.body, self.scale = body, 1.0

    def forward(self, x: Tensor, flag: Tensor) -> Tensor:
        for index, layer in enumerate(self.layers):
            x = torch.tanh(layer(x))
            x = self.inner[index](x, flag) if self.inner else self.body(self, x, flag)
        return x.square().mean()


def case(body: Body, inside: bool) -> tuple[nn.Module, dict[str, Tensor], None]:
    return Net(body, inside), {"x": torch.randn(8, WIDTH), "flag": torch.ones(8)}, None


def branch(self: Any, x: Tensor, flag: Tensor) -> Tensor:
    return x * 2 if x.sum() > 0 else x


def fraction(self: Any, x: Tensor, flag: Tensor) -> Tensor:
    return x / (1 + x.abs().max().item())


def count(self: Any, x: Tensor, flag: Tensor) -> Tensor:
    return x * int((x > 0).sum()) / 20


def fraction_of_the_batch(self: Any, x: Tensor, flag: Tensor) -> Tensor:
    return x * float(flag.max())


def layer_dropout(self: Any, x: Tensor, flag: Tensor) -> Tensor:
    return x if torch.rand([]) < 0.3 else x * 2


def no_layer_dropout(self: Any, x: Tensor, flag: Tensor) -> Tensor:
    return x if torch.rand([]) < 0.0 else x * 2


def foreign_dropout(self: Any, x: Tensor, flag: Tensor) -> Tensor:
    return x if numpy.random.rand() < 0.3 or random.random() < 0.3 else x * 2


def no_foreign_dropout(self: Any, x: Tensor, flag: Tensor) -> Tensor:
    return x if numpy.random.rand() < 0.0 or random.random() < 0.0 else x * 2


def finite(self: Any, x: Tensor, flag: Tensor) -> Tensor:
    if torch.isnan(x).any() or not torch.isfinite(x).all():
        raise ValueError
    return x


def whole_number_of_the_batch(self: Any, x: Tensor, flag: Tensor) -> Tensor:
    return x * int(flag.sum())


def growing(self: Any, x: Tensor, flag: Tensor) -> Tensor:
    self.scale = self.scale * 1.5
    return x * self.scale


def counting(self: Any, x: Tensor, flag: Tensor) -> Tensor:
    self.scale += 1
    return x


@pytest.mark.parametrize("body", [branch, fraction, count, fraction_of_the_batch, layer_dropout])
def test_a_module_that_decides_is_left_whole(body: Body) -> None:
    model = case(body, inside=True)
    row = run(body.__name__, model, 3, 3, "1f1b")
    assert row.ok, row
    pipe = compiled(model, 3, 3, "1f1b")
    (note,) = [note for note in pipe.plan.notes if note.startswith("left whole, never cut")]
    assert f"{__file__}, line {body.__code__.co_firstlineno + 1}: return x" in note
    assert note.endswith("inner.0, inner.1, inner.2 and 3 more")


@pytest.mark.parametrize("body", [branch, fraction, count, fraction_of_the_batch, layer_dropout])
def test_a_model_that_decides_is_refused_with_the_remedy(body: Body) -> None:
    with pytest.raises(CaptureError) as caught:
        compiled(case(body, inside=False), 3, 3, "1f1b")
    assert f"({__file__}, line {body.__code__.co_firstlineno + 1}: return x" in str(caught.value)
    assert "move these lines into a module of their own, which is then left whole" in str(caught.value)


@pytest.mark.parametrize("body", [no_layer_dropout, no_foreign_dropout, finite, whole_number_of_the_batch])
@pytest.mark.parametrize("inside", [False, True])
def test_answers_that_hold_are_compiled_in(body: Body, inside: bool) -> None:
    row = run(body.__name__, case(body, inside), 3, 3, "1f1b")
    assert row.ok, row


def test_a_whole_number_of_the_batch_is_checked_at_each_step() -> None:
    model, batch, loss = case(whole_number_of_the_batch, inside=False)
    pipe = compiled((model, batch, loss), 3, 3, "1f1b")
    with pytest.raises(RuntimeFault, match=r"asks for a value that is now 4.0, but was 2 when"):
        pipe.step(batch | {"flag": 2 * batch["flag"]})


@pytest.mark.parametrize("inside", [False, True])
def test_numbers_that_torch_does_not_draw_are_refused(inside: bool) -> None:
    who = "inner.0, inner.1, inner.2" if inside else "the model's own forward"
    before = random.getstate(), numpy.random.get_state()[1].tobytes()
    with pytest.raises(CaptureError, match=rf"{who} draws random numbers from Python or numpy.*layerdrop=0.0"):
        compiled(case(foreign_dropout, inside), 3, 3, "1f1b")
    assert (random.getstate(), numpy.random.get_state()[1].tobytes()) == before


class Growing(nn.Module):
    """Most of the work, so that it would be opened if it could be."""

    def __init__(self) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(6))
        self.scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        self.scale = self.scale * 1.5
        for linear in self.linears:
            x = torch.tanh(linear(x)) * self.scale
        return x


class Square(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.square().mean()


def test_an_attribute_that_grows_keeps_its_module_whole() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), Growing(), nn.Linear(WIDTH, WIDTH), Square())
    grows = model, (torch.randn(8, WIDTH),), None
    row = run("growing", grows, 3, 3, "1f1b")
    assert row.ok, row
    compiled(grows, 3, 3, "1f1b")
    assert model[1].scale == 1.0, "compiling leaves it as it was"


def test_an_attribute_of_the_model_that_grows_is_refused() -> None:
    with pytest.raises(
        CaptureError, match="the model's own forward cannot be split: it gives its attribute 'scale' another"
    ):
        compiled(case(growing, inside=False), 3, 3, "1f1b")


def test_an_attribute_that_only_counts_is_noted() -> None:
    (note,) = compiled(case(counting, inside=False), 3, 3, "1f1b").plan.notes
    assert note.startswith(
        "the model's forward gives its attribute 'scale' another value, which did not change the next"
    )
