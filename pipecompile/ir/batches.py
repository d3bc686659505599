"""The order within a run of messages: what a rank sends starts before it waits for what it receives.

A program's row lists messages so that even ranks which stop in each one reach the end. A rank that runs it need not stop
in a send, so it begins all sends of a run first; otherwise a rank that is late would be made later by the wait for it:

    row      1B1  1RECV_F2<0  1SEND_B1>0  1F2
    as run   1B1  1SEND_B1>0  1RECV_F2<0  1F2      rank 0 has its gradient while rank 1 still waits for rank 0
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby

from pipecompile.ir.program import RECEIVES, SENDS, Instruction, Program


def as_run(program: Program) -> Program:
    """The same program with the sends of each run of messages first; the order on every channel stays. O(instructions)."""
    return replace(program, rows=tuple(map(_sends_first, program.rows)))


def _sends_first(row: Sequence[Instruction]) -> tuple[Instruction, ...]:
    found: list[Instruction] = []
    for _, run in groupby(row, key=lambda one: one.op in (*SENDS, *RECEIVES)):
        found += sorted(run, key=lambda one: one.op in RECEIVES)
    return tuple(found)
