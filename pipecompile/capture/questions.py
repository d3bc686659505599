"""Questions that the model's code asks about a tensor's contents: ``if labels.max() >= n``, ``lengths.max().item()``.

Eager mode answers them; while tracing, the same question at the same place gets the same answer, and an operation in
the graph checks at each step that it still holds (see decisions, which says where that would not do).
"""

from __future__ import annotations

import linecache
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, is_fake

from pipecompile.capture.raising import only_raises
from pipecompile.capture.tracepoints import Recorder
from pipecompile.expect import EXPECT

Place = tuple[str, str, str, int]
METHODS = ("__bool__", "item", "__int__", "__float__", "__index__", "tolist")
LONGEST = 64
"""Elements of the largest list that is asked for as one."""


@dataclass(slots=True)
class Questions:
    """The answers by how, in which call, and at which file and line they were asked; ``places`` the lines in full, and
    ``harmless`` those that only decide whether the code raises.
    """

    answers: dict[Place, list[Any]] = field(default_factory=lambda: defaultdict(list))
    places: dict[str, str] = field(default_factory=dict)
    harmless: set[str] = field(default_factory=set)

    @contextmanager
    def answered(self, recorder: Recorder, tracing: bool) -> Iterator[None]:
        """Note the answers to ``bool(tensor)``, ``tensor.item()`` and the like, or with ``tracing`` give those noted."""
        asked: Counter[Place] = Counter()
        own = {
            (kind, name): kind.__dict__.get(name)
            for name in METHODS
            for kind in (FakeTensor, torch.Tensor)
            if kind is torch.Tensor or name in kind.__dict__
        }
        for kind, name in own:
            setattr(kind, name, self._answer(name, getattr(kind, name), recorder, asked, tracing))
        try:
            yield
        finally:
            for (kind, name), method in own.items():
                if method is None:
                    delattr(kind, name)
                else:
                    setattr(kind, name, method)

    def _answer(
        self, name: str, original: Callable[..., Any], recorder: Recorder, asked: Counter[Place], tracing: bool
    ) -> Callable[..., Any]:
        def answer(tensor: torch.Tensor) -> Any:
            frame = sys._getframe(1)
            call = recorder.innermost
            place = (name, call.key if call else "", frame.f_code.co_filename, frame.f_lineno)
            if not tracing:
                self.answers[place].append(original(tensor.detach()))
                return self.answers[place][-1]
            known = self.answers.get(place, [])
            if asked[place] >= len(known) or not is_fake(tensor):
                return original(tensor)
            found = known[asked[place]]
            if isinstance(found, list) and not _same_size(tensor, found):
                return original(tensor)
            asked[place] += 1
            _, _, file, line = place
            where = f"{Path(file).name}, line {line}"
            self.places[where] = f"{file}, line {line}: {linecache.getline(file, line).strip()}"
            if only_raises(file, line):
                self.harmless.add(where)
            for element, value in _elements(tensor, found):
                EXPECT(element, value, where)
            return found

        return answer


def _same_size(tensor: torch.Tensor, found: list[Any]) -> bool:
    """Whether nested lists of numbers can be the answer for a tensor, whose size is then fixed."""
    shape: list[int] = []
    inner: Any = found
    while isinstance(inner, list):
        shape.append(len(inner))
        inner = inner[0] if inner else None
    if tensor.ndim != len(shape) or not 0 < math.prod(shape) <= LONGEST:
        return False
    for size, known in zip(tensor.shape, shape):
        torch._check(size == known)  # type: ignore[no-untyped-call]
    return True


def _elements(tensor: torch.Tensor, answer: Any) -> Iterator[tuple[torch.Tensor, Any]]:
    if isinstance(answer, list):
        for part, value in zip(tensor.unbind(), answer):
            yield from _elements(part, value)
    else:
        yield tensor, answer
