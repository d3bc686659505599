"""Questions that the model's code asks about a tensor's contents: ``if labels.max() >= n``, ``lengths.max().item()``.

Eager mode answers them; while tracing, the same question at the same place gets the same answer, and an operation in
the graph checks at each step that it still holds (see decisions, which says where that would not do).
"""

from __future__ import annotations

import linecache
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import is_fake

from pipecompile.capture.tracepoints import Recorder
from pipecompile.expect import EXPECT

Place = tuple[str, str, str, int]
METHODS = ("__bool__", "item", "__int__", "__float__", "__index__")


@dataclass(slots=True)
class Questions:
    """The answers by how, in which call, and at which file and line they were asked; ``places`` the lines in full."""

    answers: dict[Place, list[Any]] = field(default_factory=lambda: defaultdict(list))
    places: dict[str, str] = field(default_factory=dict)

    @contextmanager
    def answered(self, recorder: Recorder, tracing: bool) -> Iterator[None]:
        """Note the answers to ``bool(tensor)``, ``tensor.item()`` and the like, or with ``tracing`` give those noted."""
        asked: Counter[Place] = Counter()
        own = {name: torch.Tensor.__dict__.get(name) for name in METHODS}
        for name in METHODS:
            setattr(torch.Tensor, name, self._answer(name, getattr(torch.Tensor, name), recorder, asked, tracing))
        try:
            yield
        finally:
            for name, method in own.items():
                if method is None:
                    delattr(torch.Tensor, name)
                else:
                    setattr(torch.Tensor, name, method)

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
            asked[place] += 1
            _, _, file, line = place
            where = f"{Path(file).name}, line {line}"
            self.places[where] = f"{file}, line {line}: {linecache.getline(file, line).strip()}"
            EXPECT(tensor, found, where)
            return found

        return answer
