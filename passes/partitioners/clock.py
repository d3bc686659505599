"""A deadline that a search may not pass."""

from __future__ import annotations

import time
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Clock:
    """When time is over, on the monotonic clock."""

    end: float

    @staticmethod
    def of(seconds: float) -> Clock:
        return Clock(time.monotonic() + seconds)

    def left(self) -> float:
        """Seconds that are left, negative when it is over."""
        return self.end - time.monotonic()
