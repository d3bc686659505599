"""What a sender gives to its group is memory as the receiver reads it, whatever the tensor makes of its own."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import torch
from torch import Tensor

from pipecompile.ir import Spec
from pipecompile.runtime.links import GroupSender, as_it_lies

COMPLEX = torch.randn(3, 4, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
LYING = Spec((4, 3), "complex64", order=(1, 0))


class Group:
    """Notes the memory of what is sent."""

    def __init__(self) -> None:
        self.sent: list[Tensor] = []

    def send(self, tensors: list[Tensor], end: int, tag: int) -> Any:
        tensor = tensors[0]
        self.sent.append(torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage()))


@pytest.mark.parametrize(
    ("value", "spec"),
    [
        (COMPLEX.conj(), Spec((3, 4), "complex64")),
        (COMPLEX.conj().imag, Spec((3, 4), "float32")),
        (COMPLEX.t().conj(), LYING),
        (COMPLEX.abs().mul(100).to(torch.int8), Spec((3, 4), "int8")),
        (COMPLEX.abs()[:1].expand(3, 4), Spec((3, 4), "float32")),
    ],
    ids=["conjugated", "negated", "conjugated and transposed", "int8", "expanded"],
)
def test_memory_that_is_sent(value: Tensor, spec: Spec) -> None:
    group = Group()
    sender = GroupSender(group, 0, 1, [(spec,)], timedelta(seconds=1))
    sender.begin()
    sender.send([value])
    (memory,) = group.sent
    assert memory.tolist() == as_it_lies(value, spec).flatten().tolist()
