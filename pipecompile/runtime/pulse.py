"""A thread of each process that shows that the process lives, and ends it when the program has failed elsewhere."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from pipecompile.runtime.marks import OUTSIDE, PLACE, STEP, Mark

BEAT_S = 1.0
GRACE_S = 5.0
"""How long a process may stay in its instruction after the program has failed."""


def beat_key(name: str, process: int) -> str:
    return f"{name}/beat/{process}"


class Pulse(threading.Thread):
    """Writes a beat, with the mark's words, into the store as long as the process lives and is not stopped.

    ``on_fault`` is called when the program has failed. The thread keeps nothing of the runtime alive; ``stop.set()``
    ends it.
    """

    def __init__(
        self,
        store: Any,
        name: str,
        process: int,
        mark: Mark,
        fault_key: str,
        timeout_s: float,
        on_fault: Callable[[], None],
    ) -> None:
        super().__init__(name=f"{name} pulse", daemon=True)
        self._store, self._key, self._mark, self._fault_key = store, beat_key(name, process), mark, fault_key
        self._every = max(0.1, min(BEAT_S, timeout_s / 10))
        self._failed_at = 0.0
        self.stop = threading.Event()
        self._on_fault = on_fault

    def run(self) -> None:
        count = 0
        while not self.stop.wait(self._every):
            count += 1
            words = self._mark.words
            try:
                self._store.set(self._key, f"{count} {words[STEP]} {words[PLACE]}")
                if self._store.check([self._fault_key]):
                    self._end()
            except RuntimeError:
                self._without_store(words[STEP], words[PLACE])
                return

    def _without_store(self, step: int, place: int) -> None:
        """The process that kept the store has ended, after its last step or within one."""
        time.sleep(GRACE_S)
        if place != OUTSIDE and (step, place) == (self._mark.words[STEP], self._mark.words[PLACE]):
            print("pipecompile: rank 0, which keeps the store, has ended", file=sys.stderr, flush=True)
            os._exit(1)

    def _end(self) -> None:
        """The program has failed: leave the process time to hear of it, then end it."""
        if not self._failed_at:
            self._failed_at = time.monotonic()
            self._on_fault()
        if time.monotonic() - self._failed_at > GRACE_S and self._mark.words[PLACE] != OUTSIDE:
            os._exit(1)
