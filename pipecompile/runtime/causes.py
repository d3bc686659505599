"""Finds the process that made the others wait.

A wait that fails says little: the process that was waited for may only have waited itself. From where every process
stands, the waits are followed to one that has ended, that answers nothing, or that is busy with something else:

    rank 0 at 0RECV_B1<1 ──▶ rank 1 at 1RECV_B1<2 ──▶ rank 2 at 2F3, no beat ──▶ "rank 2, instruction 9 (2F3), …"
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from pipecompile.ir import RECEIVES, Instruction, Program
from pipecompile.runtime.marks import BEGINNING, OUTSIDE, PLACE, STEP, SUMMING, SeenMark
from pipecompile.runtime.places import place

SILENCE_S = 4.0
"""A process without a beat for so long is taken for stopped; a slow one on a busy machine beats within it."""
LOOK_S = 0.05


@dataclass(frozen=True, slots=True)
class Sight:
    """What is known of a process: steps begun, where it is (``exact``, or as of its last beat), its beats."""

    step: int
    position: int
    beat: int
    exact: bool = True
    gone: bool = False


@dataclass(frozen=True, slots=True)
class Cause:
    """The process that failed first and what is known of it; ``silent``: it lives, but answers nothing."""

    process: int
    message: str
    silent: bool = False


class Search:
    """Looks for the first cause on behalf of ``process``, one of ``len(program.rows)`` x replicas.

    ``beats`` gives the last beat of each process (beats, step, position), ``marks`` those of
    processes on this host, ``failed`` whether some process has told its failure.
    """

    def __init__(
        self,
        program: Program,
        process: int,
        processes: int,
        marks: Mapping[int, SeenMark],
        beats: Callable[[], Sequence[tuple[int, ...]]],
        failed: Callable[[], bool],
    ) -> None:
        self._program, self._process, self._processes = program, process, processes
        self._marks, self._beats, self._failed = marks, beats, failed
        self._others = [other for other in range(processes) if other != process]

    def find(self, step: int, position: int, late: bool, timeout_s: float) -> Cause | None:
        """The cause of a wait of this process that took too long (``late``) or broke; None if another told its failure,
        or if nobody is seen to be at fault."""
        first = self._look()
        until = time.monotonic() + SILENCE_S
        while not self._failed():
            now = self._look() | {self._process: Sight(step, position, 1)}
            ended = time.monotonic() >= until
            for other in self._others:
                if now[other].gone:
                    return Cause(other, f"{self._where(other, now[other])}: {GONE}")
            alive = {p for p in self._others if now[p].beat > first[p].beat} | {self._process}
            suspect = self._follow(now, alive) if late or ended else self._process
            if late and suspect in alive and not self._awaited(suspect, now):
                return Cause(suspect, f"{self._where(suspect, now[suspect])}: {_busy(now[suspect], timeout_s)}")
            if suspect not in alive and ended:
                return Cause(suspect, f"{self._where(suspect, now[suspect])}: {SILENT}", silent=True)
            if ended:
                return None
            time.sleep(LOOK_S)
        return None

    def keeper(self) -> Cause:
        """The cause where the store, which process 0 keeps, is silent."""
        mark = self._marks.get(0)
        seen = Sight(0, OUTSIDE, 0) if mark is None else Sight(mark.words[STEP], mark.words[PLACE], 0, gone=mark.gone())
        return Cause(0, f"{self._where(0, seen)}: {GONE if seen.gone else SILENT}", silent=not seen.gone)

    def _look(self) -> dict[int, Sight]:
        beats = self._beats()
        found = {}
        for other in self._others:
            count, step, position = beats[other]
            mark = self._marks.get(other)
            if mark is None:
                found[other] = Sight(step, position, count, exact=False)
            else:
                found[other] = Sight(mark.words[STEP], mark.words[PLACE], count, gone=mark.gone())
        return found

    def _follow(self, now: Mapping[int, Sight], alive: set[int]) -> int:
        """The process at the end of the waits that start here; one that has not beaten yet ends them."""
        here, met = self._process, {self._process}
        while here in alive:
            following = [other for other in self._awaited(here, now) if other not in met]
            if not following:
                return here
            here = min(following, key=lambda p: (p in alive, now[p].step, now[p].position))
            met.add(here)
        return here

    def _awaited(self, process: int, now: Mapping[int, Sight]) -> list[int]:
        """Whom a process may wait for at its place."""
        seen = now[process]
        ranks = self._program.shape.ranks
        row = self._row(process)
        if 0 <= seen.position < len(row) and (one := row[seen.position]).op in RECEIVES:
            return [process // ranks * ranks + self._program.shape.placement[one.peer]]
        others = [p for p in now if p != process]
        ours = [p for p in others if p // ranks == process // ranks]
        if seen.position == BEGINNING:
            return [p for p in ours if now[p].step < seen.step and now[p].position != OUTSIDE]
        if seen.position == SUMMING:
            return [p for p in ours if (now[p].step, now[p].position) != (seen.step, SUMMING)]
        if seen.position == len(row):
            return [p for p in others if (now[p].step, now[p].position) < (seen.step, len(self._row(p)))]
        return []

    def _row(self, process: int) -> Sequence[Instruction]:
        return self._program.rows[process % self._program.shape.ranks]

    def _where(self, process: int, seen: Sight) -> str:
        return place(self._program, process, self._processes, seen.position, seen.exact)


GONE = "its process has ended: killed, out of memory, or crashed; look at what it printed"
SILENT = f"its process has answered nothing for {SILENCE_S:g} s: stopped, ended, or its machine or network is down; look there"


def _busy(seen: Sight, timeout_s: float) -> str:
    what = "is not in a step" if seen.position == OUTSIDE else "has not come further"
    return f"it lives, but {what} for {timeout_s:g} s: stuck or slow; allow more time with timeout_s="
