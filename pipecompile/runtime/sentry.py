"""Watches over a program's processes from each of them: shows where this one is, and says who failed first."""

from __future__ import annotations

import functools
import time
import weakref
from collections.abc import Mapping
from typing import Any

from pipecompile.errors import PeerFault
from pipecompile.ir import Program
from pipecompile.runtime.causes import Cause, Search
from pipecompile.runtime.faults import STORE_SECONDS, FirstFault, kept_by_torchrun, within
from pipecompile.runtime.marks import OUTSIDE, PLACE, ROUND, TOKEN, WAITS, Mark, SeenMark, see
from pipecompile.runtime.places import place, who
from pipecompile.runtime.pulse import Pulse, beat_key

NO_BEAT = f"0 0 {OUTSIDE} 0"


class Sentry:
    """``words[PLACE]`` is to be set to where this process is. All processes make theirs at the same time."""

    def __init__(self, store: Any, name: str, program: Program, process: int, processes: int, timeout_s: float) -> None:
        self._store, self._name, self._timeout_s = store, name, timeout_s
        self._program, self._process, self._processes = program, process, processes
        self._faults = FirstFault(store, f"{name}/fault")
        self.who = who(process, program.shape.ranks, processes)
        mark = Mark()
        self.words = mark.words
        store.set(f"{name}/mark/{process}", mark.address())
        addresses = [store.get(f"{name}/mark/{other}").decode() for other in range(processes)]
        seen = {other: see(address) for other, address in enumerate(addresses) if other != process}
        self._marks = {other: mark for other, mark in seen.items() if mark is not None}
        self._search = Search(program, process, processes, self._marks, self._beats, self._failed)
        store.set(beat_key(name, process), NO_BEAT)
        end_silent = functools.partial(_end_silent, store.clone(), f"{name}/silent", self._marks)
        self._pulse = Pulse(store.clone(), name, process, mark, self._faults.key, timeout_s, end_silent)
        self._pulse.start()
        weakref.finalize(self, self._pulse.end)

    def begin(self, place: int, waits: bool = False) -> None:
        """A round begins there; ``waits``: the process may wait at any place of it."""
        self.words[WAITS] = waits
        self.words[PLACE] = place
        self.words[ROUND] += 1

    def place(self) -> str:
        """Where this process is."""
        return place(self._program, self._process, self._processes, self.words[PLACE])

    def first(self, mine: str, error: Exception) -> tuple[str, bool]:
        """Why the program failed first, told to all, and whether this process tells it.

        ``mine`` is what this process has to say, ``error`` what it met.
        """
        if self._pulse.fault:
            return self._pulse.fault, False
        if not isinstance(error, PeerFault):
            return self._tell(mine)
        if within(STORE_SECONDS, self._store.num_keys) is None and not kept_by_torchrun() and self._process:
            return self._without_store()
        cause = self._search.find(self.words[:TOKEN], error.late, self._timeout_s)
        if cause is None:
            return self._tell(mine)
        if cause.silent:
            within(STORE_SECONDS, lambda: self._store.set(f"{self._name}/silent", str(cause.process)))
        message = f"{cause.message} (noticed by {self.place()})"
        told, ours = self._tell(message)
        if ours:
            self._end(cause)
        return told, ours

    def leave(self) -> None:
        """The program has failed, and this process has heard of it and let go of the others."""
        if self._process == 0 and not kept_by_torchrun():
            time.sleep(2 * self._pulse.every)  # the store ends with this process: let the others read it
        self._pulse.end()

    def _tell(self, message: str) -> tuple[str, bool]:
        first = self._faults.record(message)
        return first, first == message

    def _without_store(self) -> tuple[str, bool]:
        """The cause where process 0 keeps the store and gives no answer: nobody can be asked or told."""
        cause = self._search.keeper()
        self._end(cause)
        return cause.message, True

    def _end(self, cause: Cause) -> None:
        """End a process of this host that answers nothing."""
        if cause.silent and cause.process in self._marks:
            self._marks[cause.process].kill()

    def trouble(self) -> bool:
        """Whether another process has told its failure, or has ended before the end of this process's step."""
        return self._failed() or any(mark.gone() and _within(mark, self.words[ROUND]) for mark in self._marks.values())

    def _failed(self) -> bool:
        return bool(within(STORE_SECONDS, lambda: self._store.check([self._faults.key])))

    def _beats(self) -> list[tuple[int, ...]]:
        """The last beat of each process; none where the store does not answer."""
        keys = [beat_key(self._name, other) for other in range(self._processes)]
        texts = within(STORE_SECONDS, lambda: self._store.multi_get(keys)) or [NO_BEAT] * len(keys)
        return [tuple(map(int, text.split())) for text in texts]


def _within(mark: SeenMark, round_: int) -> bool:
    """Whether a process has not come to the end of a round."""
    return mark.words[PLACE] != OUTSIDE or mark.words[ROUND] < round_


def _end_silent(store: Any, key: str, marks: Mapping[int, SeenMark]) -> None:
    """End the process that answers nothing, if it is on this host: nobody else can."""
    if store.check([key]) and (mark := marks.get(int(store.get(key)))):
        mark.kill()
