"""What an emitted call passes: no argument that the module assumes anyway, unless a hook looks at the arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipecompile.capture import capture
from pipecompile.ir import Call


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor, bias: Tensor | None = None, times: int = 1, *, flip: bool = False) -> Tensor:
        return (x * self.weight * times).flip(0) if flip else x * self.weight * times


class Outer(nn.Module):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.inner, self.args, self.kwargs = Inner(), args, kwargs

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, *self.args, **self.kwargs).sum()


def call_of(model: nn.Module) -> Call:
    return next(call for call in capture(model, (torch.ones(2),)).calls if call.fqn == "inner")


@pytest.mark.parametrize(
    ("model", "args", "kwargs"),
    [
        (Outer(None), (), {}),
        (Outer(flip=False), (), {}),
        (Outer(bias=None, times=1), (), {"times": 1}),
        (Outer(None, 3), (None, 3), {}),
        (Outer(flip=True), (), {"flip": True}),
    ],
)
def test_defaults_are_left_out(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    call = call_of(model)
    assert call.args[1:] == args
    assert call.kwargs == kwargs


def test_a_hook_sees_what_the_model_passes() -> None:
    model = Outer(None, flip=False)
    model.inner.register_forward_pre_hook(lambda module, args: None)
    call = call_of(model)
    assert call.args[1:] == (None,)
    assert call.kwargs == {"flip": False}
