"""A thread of each process that shows that the process lives, and ends it when the program has failed elsewhere."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from typing import Any

from pipecompile.runtime.faults import STORE_SECONDS
from pipecompile.runtime.marks import OUTSIDE, PLACE, TOKEN, Mark

BEAT_S = 1.0
GRACE_S = 3.0
"""How long a process may take to hear that the program has failed. The longest way to the end of all: the timeout, four
seconds of silence until the cause is known (causes.py), a beat until a process that hangs reads it, and this."""


def beat_key(name: str, process: int) -> str:
    return f"{name}/beat/{process}"


class Pulse(threading.Thread):
    """Writes a beat, with the mark's words, into the store as long as the process lives and is not stopped.

    When the program has failed, ``on_fault`` is called, and the process is ended unless it hears of it in time and calls
    ``end``. ``fault`` says why, also when the store has gone since. The thread keeps nothing of the runtime alive.
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
        self.every = max(0.1, min(BEAT_S, timeout_s / 10))
        self._ended = threading.Event()
        self.fault = ""
        self._on_fault = on_fault

    def end(self) -> None:
        """End the thread; one that was in the store while Python shuts down would abort the process."""
        self._ended.set()
        if threading.current_thread() is not self:
            self.join(STORE_SECONDS)

    def run(self) -> None:
        count = 0
        while not self._ended.wait(self.every):
            count += 1
            here = tuple(self._mark.words[:TOKEN])
            try:
                self._store.set(self._key, " ".join(map(str, (count, *here))))
                if self._store.check([self._fault_key]):
                    self.fault = self._store.get(self._fault_key).decode(errors="replace")
                    self._on_fault()
            except RuntimeError:
                if not self.fault:
                    self._without_store(here)
                    return
            if self.fault:
                self._after_fault()
                return

    def _after_fault(self) -> None:
        """Leave the process time to hear that the program has failed, then end it."""
        if not self._ended.wait(GRACE_S):
            os._exit(1)

    def _without_store(self, here: tuple[int, ...]) -> None:
        """The process that kept the store has ended, after its last step or within one."""
        if self._ended.wait(GRACE_S):
            return
        if here[PLACE] != OUTSIDE and here == tuple(self._mark.words[:TOKEN]):
            print("pipecompile: rank 0, which keeps the store, has ended", file=sys.stderr, flush=True)
            os._exit(1)
