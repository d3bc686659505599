"""How errors name a place in a program."""

from __future__ import annotations

from pipecompile.ir import Instruction, Program
from pipecompile.runtime.marks import BEGINNING, OUTSIDE, SUMMING


def who(process: int, ranks: int, processes: int) -> str:
    """``rank 1``, or ``replica 0, rank 1`` where there are several replicas of ``ranks`` ranks."""
    return f"rank {process}" if processes == ranks else f"replica {process // ranks}, rank {process % ranks}"


def at(position: int, one: Instruction) -> str:
    """``instruction 7 (2RECV_F3<1), microbatch 3, peer stage 1``."""
    where = f"instruction {position} ({one})"
    if one.microbatch >= 0:
        where += f", microbatch {one.microbatch}"
    if one.peer >= 0:
        where += f", peer stage {one.peer}"
    return where


def place(program: Program, process: int, processes: int, position: int, exact: bool = True) -> str:
    """A process and where it is; ``exact`` off: where it was when it last told."""
    name = who(process, program.shape.ranks, processes)
    row = program.rows[process % program.shape.ranks]
    named = {
        BEGINNING: "before the first instruction",
        SUMMING: "in a sum over the ranks",
        OUTSIDE: "outside of a step",
    }
    if position in named:
        return f"{name}, {named[position]}"
    if position >= len(row):
        return f"{name}, after the last instruction"
    return f"{name}, {'' if exact else 'last seen at '}{at(position, row[position])}"
