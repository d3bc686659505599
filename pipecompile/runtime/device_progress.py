"""Where a device is in a step that the host has launched, and what is done where it gets no further.

The host runs ahead, so its own place says nothing, and no wait of its own times out. Behind each instruction an event is
recorded on the compute stream; a thread asks which have passed, and writes the device's place where the others look for
it (``marks``). It is the thread, too, that finds a receive that takes too long, or hears that another process has failed:
the host may be stuck in a launch behind it.

    launched   F0 S0 F1 S1 R0 B0 F2 …       passed   begin F0 S0 F1 S1        place: R0
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Container, Sequence
from typing import Any

from pipecompile.ir import RECEIVES, Instruction
from pipecompile.runtime.executor import Ran, Step
from pipecompile.runtime.marks import BEGINNING, OUTSIDE, PLACE, ROUND

POLL_S = 0.0001


class Progress:
    """Events of one step: at its beginning, behind each instruction, at its end. ``device`` is torch.cuda, or stands for it."""

    def __init__(self, device: Any) -> None:
        self._device = device
        self._events: list[Any] = []
        self._launched = self._passed = 0
        self._lock = threading.Lock()

    def begin(self) -> None:
        """A step begins, once the device has nothing left of what came before it."""
        with self._lock:
            self._launched = self._passed = 0
        self.reach()

    def reach(self) -> None:
        """The host has launched all of one more instruction."""
        if self._launched == len(self._events):
            self._events.append(self._device.Event(enable_timing=True))
        self._events[self._launched].record()
        self._launched += 1

    def look(self) -> tuple[int, bool]:
        """The instruction that the device is in, BEGINNING before the first; and whether it lags behind the host."""
        with self._lock:
            while self._passed < self._launched and self._events[self._passed].query():
                self._passed += 1
            return self._passed - 1, self._passed < self._launched

    def times(self, steps: Sequence[Step], ended: float) -> list[Ran]:
        """When the instructions ran on the device, which has ended the step at ``ended`` (``time.perf_counter``)."""
        last = self._events[self._launched - 1]
        at = [ended - event.elapsed_time(last) / 1e3 for event in self._events[: self._launched]]
        return [(step.instruction, at[i], at[i + 1]) for i, step in enumerate(steps)]


def waiting_places(row: Sequence[Instruction]) -> frozenset[int]:
    """The places at which a device waits for other ranks: receives, updates of shared weights, the end of the row."""
    waiting = {i for i, one in enumerate(row) if one.op in RECEIVES or (one.op == "UPDATE" and one.peers)}
    return frozenset(waiting | {len(row)})


class DeviceWatch(threading.Thread):
    """Runs steps on a device and shows its place in ``words``.

    Calls ``fault(late)`` once if the device waits for ``timeout_s`` seconds in one of ``waits`` (late), or when
    ``trouble()`` says that another process has failed; keeps nothing of the runtime alive.
    """

    def __init__(
        self,
        device: Any,
        words: Any,
        waits: Container[int],
        timeout_s: float,
        trouble: Callable[[], bool],
        fault: Callable[[bool], object],
    ) -> None:
        super().__init__(name="pipecompile device", daemon=True)
        self._progress = Progress(device)
        self._words, self._waits, self._timeout_s, self._trouble = words, waits, timeout_s, trouble
        self._fault = weakref.WeakMethod(fault)
        self._every = max(0.02, min(1.0, timeout_s / 10))
        self._inside = False
        self._guard = threading.Lock()
        self.stop = threading.Event()

    def begin(self) -> None:
        """A step begins."""
        self._progress.begin()
        with self._guard:
            self._inside = True

    def launch(self, steps: Sequence[Step]) -> None:
        """Launch the instructions of a step."""
        for step in steps:
            step.handler(step.operand)
            self._progress.reach()

    def finish(self, failed: Callable[[], bool]) -> None:
        """Return when the device has done all that was launched, or when the step has failed."""
        self._progress.reach()
        while self._progress.look()[1] and not failed():
            time.sleep(POLL_S)

    def times(self, steps: Sequence[Step]) -> list[Ran]:
        """When the instructions of the step that has just finished ran."""
        return self._progress.times(steps, time.perf_counter())

    def leave(self) -> None:
        """The step is over, or has failed."""
        with self._guard:
            self._inside = False
            self._words[PLACE] = OUTSIDE

    def run(self) -> None:
        seen, since = (0, BEGINNING), time.monotonic()
        while not self.stop.wait(self._every):
            with self._guard:
                if not self._inside:
                    continue
                place, lags = self._progress.look()
                self._words[PLACE] = place
            now = self._words[ROUND], place
            if now != seen or not lags:
                seen, since = now, time.monotonic()
            late = place in self._waits and time.monotonic() - since >= self._timeout_s
            if late or self._trouble():
                if (fault := self._fault()) is not None:
                    fault(late)
                return
