"""Adds the sums over data parallel replicas: each stage's gradients, as soon as it has made the last of them.

The stages that come late in the drain sum their gradients while the others still compute:

    rank 0   … 0B2            0RECV_B3<1 0B3 0REDUCE_REPLICAS
    rank 1   … 1B2 1B3 1SEND_B3>0 1REDUCE_REPLICAS

A sum stands behind the sends that follow the stage's last backward, for which another rank waits. O(instructions).
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
    if replicas > 1 and updates(program.rows):
        raise ScheduleError(
            f"{program.schedule} updates weights inside a step and is not run in replicas; use one replica, or a schedule "
            "that flushes, such as 1f1b"
        )
    return program if replicas == 1 else replace(program, rows=tuple(map(_with_sums, program.rows)))


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
