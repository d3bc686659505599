"""Custom autograd functions that a step uses, and which call each belongs to.

A function's backward is not in the trace, so its call stays whole, or the model is refused. Who made a node of the autograd
graph is told by torch's running number of such nodes, noted where each call begins:

    call     0 model        1 d          2 (end)
    number   17 ……………………… 21 … 24 ……    a node 19, first seen in what d returns, is the model's
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.autograd.function import BackwardCFunction

from pipecompile.capture.structure import tensors
from pipecompile.capture.tracepoints import Tracepoint

OUTSIDE = ""
"""Stands for the key of a call where no module was running: the loss function."""


def running_number() -> int:
    """The number that the next node of the autograd graph gets."""
    with torch.enable_grad():
        node = torch.zeros((), requires_grad=True).view(()).grad_fn
    assert node is not None
    return int(node._sequence_nr()) + 1


@dataclass(slots=True)
class Functions:
    """Names of the functions by the key of the call that used them; ``begun`` and ``ended`` are calls' running numbers."""

    found: dict[str, str] = field(default_factory=dict)
    begun: dict[str, int] = field(default_factory=dict)
    ended: dict[str, int] = field(default_factory=dict)
    seen: set[Any] = field(default_factory=set)

    def enter(self, call: Tracepoint) -> None:
        self.begun[call.key] = running_number()

    def leave(self, call: Tracepoint, result: Any) -> None:
        self.ended[call.key] = running_number()
        self.look(result)

    def look(self, result: Any) -> None:
        """Find the functions behind a result that no earlier look has reached."""
        for node in self._new(result):
            self.found.setdefault(self._owner(int(node._sequence_nr())), type(node).__name__.removesuffix("Backward"))

    def _owner(self, number: int) -> str:
        """The innermost call that was running when a node got its number."""
        around = [key for key, first in self.begun.items() if first <= number < self.ended.get(key, number + 1)]
        return around[-1] if around else OUTSIDE

    def _new(self, result: Any) -> Iterator[Any]:
        todo = [tensor.grad_fn for _, tensor in tensors(result) if tensor.grad_fn is not None]
        while todo:
            node = todo.pop()
            if node in self.seen:
                continue
            self.seen.add(node)
            if isinstance(node, BackwardCFunction):
                yield node
            todo.extend(parent for parent, _ in node.next_functions if parent is not None)
