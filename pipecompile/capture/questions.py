"""Questions that the model's code asks about a tensor's contents: ``if labels.max() >= n``.

Eager mode answers them; while tracing, the same question at the same place gets the same answer, and an operation in
the graph checks at each step that it still holds.
"""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import is_fake

from pipecompile.capture.tracepoints import Recorder
from pipecompile.expect import EXPECT

Place = tuple[str, str, int]


@dataclass(slots=True)
class Questions:
    """The answers by the call in which, and the file and line at which, they were asked."""

    answers: dict[Place, list[bool]] = field(default_factory=lambda: defaultdict(list))

    @contextmanager
    def answered(self, recorder: Recorder, tracing: bool) -> Iterator[None]:
        """Note the answers to ``bool(tensor)``, or with ``tracing`` give those noted."""
        original = torch.Tensor.__bool__
        asked: Counter[Place] = Counter()

        def answer(tensor: torch.Tensor) -> bool:
            frame = sys._getframe(1)
            call = recorder.innermost
            file, line = frame.f_code.co_filename, frame.f_lineno
            place = (call.key if call else "", file, line)
            if not tracing:
                self.answers[place].append(original(tensor))
                return self.answers[place][-1]
            known = self.answers.get(place, [])
            if asked[place] >= len(known) or not is_fake(tensor):
                return original(tensor)
            found = known[asked[place]]
            asked[place] += 1
            EXPECT(tensor, found, f"{Path(file).name}, line {line}")
            return found

        torch.Tensor.__bool__ = answer  # type: ignore[method-assign,assignment]
        try:
            yield
        finally:
            del torch.Tensor.__bool__
