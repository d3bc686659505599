"""Finds the process that made the others wait.

A wait that fails says little: the process that was waited for may only have waited itself. From where every process
stands, the waits are followed to one that has ended, that answers nothing, or that has all it needs and goes no further:

    rank 0 at 0RECV_B1<1 ──▶ rank 1 at 1RECV_B1<2 ──▶ rank 2 at 2F3, no beat ──▶ "rank 2, instruction 9 (2F3), …"
    rank 0 at 0RECV_B1<1 ──▶ rank 1 at 1RECV_F3<0, sent long ago ──────────────▶ "rank 1, instruction 7 (1RECV_F3<0), …"
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from pipecompile.ir import RECEIVES, SENDS, Instruction, Program
from pipecompile.ir.lifetimes import Channel, channel_of
from pipecompile.runtime.marks import BEGINNING, OUTSIDE, PLACE, SUMMING, SeenMark
from pipecompile.runtime.places import place

SILENCE_S = 4.0
"""A process without a beat for so long is taken for stopped; a slow one on a busy machine beats within it."""
LOOK_S = 0.05


@dataclass(frozen=True, slots=True)
class Sight:
    """What is known of a process: its mark's (round, place, waits), ``exact`` or as of its last beat, and its beats."""

    words: tuple[int, ...]
    beat: int = 0
    exact: bool = True
    gone: bool = False

    @property
    def position(self) -> int:
        return self.words[PLACE]


@dataclass(frozen=True, slots=True)
class Cause:
    """The process that failed first and what is known of it; ``silent``: it lives, but answers nothing."""

    process: int
    message: str
    silent: bool = False


class Search:
    """Looks for the first cause on behalf of ``process``, one of ``len(program.rows)`` x replicas.

    ``beats`` gives the last beat of each process (beats, round, position, waits), ``marks`` those of processes on this
    host, ``failed`` whether some process has told its failure.
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

    def find(self, here: Sequence[int], late: bool, timeout_s: float) -> Cause | None:
        """The cause of a wait of this process, whose words are ``here``, that took too long (``late``) or broke; None if
        another told its failure, or if nobody else is seen to be at fault."""
        first = self._look()
        until = time.monotonic() + SILENCE_S
        while not self._failed():
            now = self._look() | {self._process: Sight(tuple(here))}
            ended = time.monotonic() >= until
            for other in self._others:
                if now[other].gone:
                    return Cause(other, f"{self._where(other, now[other])}: {GONE}")
            alive = {p for p in self._others if now[p].beat > first[p].beat} | {self._process}
            suspect = self._follow(now, alive) if late or ended else self._process
            if late and suspect in alive and suspect != self._process and not self._awaited(suspect, now):
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
        seen = Sight((0, OUTSIDE, 0)) if mark is None else Sight(mark.seen(), gone=mark.gone())
        return Cause(0, f"{self._where(0, seen)}: {GONE if seen.gone else SILENT}", silent=not seen.gone)

    def _look(self) -> dict[int, Sight]:
        found = {}
        for other, (count, *words) in enumerate(self._beats()):
            if mark := self._marks.get(other):
                found[other] = Sight(mark.seen(), count, gone=mark.gone())
            elif other != self._process:
                found[other] = Sight(tuple(words), count, exact=False)
        return found

    def _follow(self, now: Mapping[int, Sight], alive: set[int]) -> int:
        """The process at the end of the waits that start here; one that has not beaten yet ends them."""
        here, met = self._process, {self._process}
        while here in alive:
            following = [other for other in self._awaited(here, now) if other not in met]
            if not following:
                return here
            here = min(following, key=lambda p: (p in alive, now[p].words))
            met.add(here)
        return here

    def _awaited(self, process: int, now: Mapping[int, Sight]) -> list[int]:
        """Whom a process may wait for at its place: those who have not reached what it needs of them."""
        # (round, place, 0): it must be past the place, or wait there itself; (round, place, 1): past it
        round_, at, waits = now[process].words
        row = self._row(process)
        ranks = self._program.shape.ranks
        first = process // ranks * ranks
        replica = range(first, first + ranks)
        needs: dict[int, tuple[int, int, int]] = {}
        if at == BEGINNING:
            needs = dict.fromkeys(replica, (round_ - 1, OUTSIDE, 1))
        elif 0 <= at < len(row):
            receives = row[at].op in RECEIVES
            instructions = self._needs.get((process % ranks, at), []) if receives or waits else []
            firsts = [first] if row[at].op != "UPDATE" else range(0, self._processes, ranks)
            needs = {f + rank: (round_, position, int(receives)) for rank, position in instructions for f in firsts}
        elif at == SUMMING and waits:
            needs = dict.fromkeys(replica, (round_, SUMMING, 0))
        elif at == len(row) and waits:
            needs = {other: (round_, len(self._row(other)), 0) for other in now}
        return [other for other, there in needs.items() if other != process and now[other].words <= there]

    @cached_property
    def _needs(self) -> dict[tuple[int, int], list[tuple[int, int]]]:
        """For each instruction that waits for other ranks, by (rank, position): the instructions that it waits for."""
        placement = self._program.shape.placement
        sent: dict[Channel, deque[tuple[int, int]]] = defaultdict(deque)
        updates: dict[tuple[tuple[str, ...] | int, int], list[tuple[int, int]]] = defaultdict(list)
        places = [(r, position, one) for r, row in enumerate(self._program.rows) for position, one in enumerate(row)]
        for rank, position, one in places:
            if one.op in SENDS:
                sent[channel_of(one, placement)].append((rank, position))
            elif one.op == "UPDATE":
                updates[one.values or one.stage, one.version].append((rank, position))
        received = {(r, position): channel_of(one, placement) for r, position, one in places if one.op in RECEIVES}
        shared = {
            (r, position): (one.values or one.stage, one.version) for r, position, one in places if one.op == "UPDATE"
        }
        return {here: [sent[channel].popleft()] for here, channel in received.items()} | {
            here: updates[update] for here, update in shared.items()
        }

    def _row(self, process: int) -> Sequence[Instruction]:
        return self._program.rows[process % self._program.shape.ranks]

    def _where(self, process: int, seen: Sight) -> str:
        return place(self._program, process, self._processes, seen.position, seen.exact)


GONE = "its process has ended: killed, out of memory, or crashed; look at what it printed"
SILENT = f"its process has answered nothing for {SILENCE_S:g} s: stopped, ended, or its machine or network is down; look there"


def _busy(seen: Sight, timeout_s: float) -> str:
    what = "is not in a step" if seen.position == OUTSIDE else "has not come further"
    return f"it lives, but {what} for {timeout_s:g} s: stuck or slow; allow more time with timeout_s="
