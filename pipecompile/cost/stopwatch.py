"""Times between two points of what a device is given: the host's clock on the CPU, events elsewhere.

An event passes when the device has done what it was given before, so the host neither waits nor counts as long as it is
ahead. A device that was idle waits for its first kernel; so what is timed is given behind other work (``ahead``).

    host     ▏call▕ event ▏call▕ event            device     ▕   call   ▏▕   call   ▏
                                                                          └── timed ─┘
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

WARM_UP_S = 0.5
"""A device that was idle runs at a low clock: work for so long before the first time counts."""


@dataclass(frozen=True, slots=True)
class Stopwatch:
    """``module`` is torch.cuda or the like, None for the CPU."""

    module: Any = None

    @staticmethod
    def of(device: torch.device) -> Stopwatch:
        return Stopwatch(None if device.type == "cpu" else torch.get_device_module(device))

    def mark(self) -> Any:
        """Now, in the order of the current stream."""
        if self.module is None:
            return time.perf_counter()
        event = self.module.Event(enable_timing=True)
        event.record()
        return event

    def between(self, begin: Any, end: Any) -> float:
        """Milliseconds between two marks; waits until the device has passed them."""
        if self.module is None:
            return float(end - begin) * 1e3
        end.synchronize()
        return float(begin.elapsed_time(end))

    def time(self, call: Callable[[], Any], ahead: Callable[[], Any]) -> tuple[float, Any]:
        """Milliseconds of a call, and its result. ``ahead`` is run before it on a device: the same work, best."""
        if self.module is not None:
            ahead()
        begin = self.mark()
        result = call()
        return self.between(begin, self.mark()), result

    def warm_up(self, device: torch.device) -> None:
        """Bring a device to the clock that it works at; nothing on the CPU."""
        if self.module is None:
            return
        square = torch.zeros(2048, 2048, device=device)
        until = time.perf_counter() + WARM_UP_S
        while time.perf_counter() < until:
            for _ in range(10):
                square = square @ square
            self.module.synchronize()
