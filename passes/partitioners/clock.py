"""A deadline that a search may not pass, and seconds that several searches share."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
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


@dataclass(slots=True)
class Allowance:
    """Seconds that are left for all searches together."""

    seconds: float

    @contextmanager
    def share(self) -> Iterator[float]:
        """A third of what is left, so that the next search has some too; what is used is no longer there."""
        start = time.monotonic()
        try:
            yield self.seconds / 3
        finally:
            self.seconds = max(self.seconds - (time.monotonic() - start), 0.0)
