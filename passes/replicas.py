"""Adds the sums over data parallel replicas: each stage's gradients, as soon as it has made the last of them.

The stages that come late in the drain sum their gradients while the others still compute:

    rank 0   … 0B2            0RECV_B3<1 0B3 0REDUCE_REPLICAS
    rank 1   … 1B2 1B3 1SEND_B3>0 1REDUCE_REPLICAS

A sum stands behind the sends that follow the stage's last backward, for which another rank waits. Where weights are
updated inside the step, each update sums the gradients of its group over the replicas first, so the program stays as it
is: replicas run the same one, so the n-th update of a rank meets the n-th of its replicas, and whatever order brings one
replica to its end brings all of them there side by side. O(instructions).
"""

from __future__ import annotations

from dataclasses import replace

from pipecompile.errors import ScheduleError
from pipecompile.ir import SENDS, Instruction, Program
from pipecompile.ir.versions import updates


def for_replicas(program: Program, replicas: int) -> Program:
    """The program that each of ``replicas`` runs; the same one if there is one only."""
    if replicas < 1:
        raise ScheduleError(f"replicas is {replicas}, expected at least 1")
    if replicas == 1 or updates(program.rows):
        return program
    return replace(program, rows=tuple(map(_with_sums, program.rows)))


def _with_sums(row: tuple[Instruction, ...]) -> tuple[Instruction, ...]:
    last = {one.stage: at for at, one in enumerate(row) if one.op in ("BACKWARD", "BACKWARD_WEIGHT")}
    due = {at: stage for stage, at in last.items()}
    rows: list[Instruction] = []
    waiting: list[Instruction] = []
    for at, one in enumerate(row):
        if one.op not in SENDS:
            rows += waiting
            waiting = []
        rows.append(one)
        if at in due:
            waiting.append(Instruction("REDUCE_REPLICAS", due[at]))
    return tuple(rows + waiting)
