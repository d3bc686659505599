"""Which line of the model's code, in which module, made torch decide something about a size."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from torch.overrides import TorchFunctionMode

from pipecompile.capture.folders import OUTSIDE
from pipecompile.capture.tracepoints import Recorder


class Places(TorchFunctionMode):
    """While it is active, looks after each operation whether torch's notes on sizes have grown."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.notes: list[Any] = []
        """torch's notes on sizes; empty until the trace has symbols."""
        self._recorder = recorder
        self._found: dict[int, str] = {}
        self._seen = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if len(self.notes) > self._seen:
            line = self._line()
            self._found |= dict.fromkeys(range(self._seen, len(self.notes)), line)
            self._seen = len(self.notes)
        return result

    def of(self, note: Any) -> str:
        """``model.layers.0 (file.py, line 12)`` for one of the notes; empty if no operation of the model made it."""
        return next((self._found.get(i, "") for i, other in enumerate(self.notes) if other is note), "")

    def _line(self) -> str:
        frame = sys._getframe(2)
        while frame.f_back is not None and frame.f_code.co_filename.startswith(OUTSIDE):
            frame = frame.f_back
        call = self._recorder.innermost
        who = (call.fqn or "the model") if call else "the loss function"
        return f"{who} ({Path(frame.f_code.co_filename).name}, line {frame.f_lineno})"
