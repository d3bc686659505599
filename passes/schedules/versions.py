"""Adds to a row that never flushes which version of the weights each microbatch reads, and where updates make new ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from pipecompile.ir import Instruction


def with_updates(
    row: Sequence[Instruction], version_of: Callable[[int], int], ends: Sequence[int]
) -> tuple[Instruction, ...]:
    """A stage's forwards and backwards, each with ``version_of(microbatch)``, an update behind the backward of each of
    ``ends``."""
    made: list[Instruction] = []
    for one in row:
        made.append(replace(one, version=version_of(one.microbatch)))
        if one.op == "BACKWARD" and one.microbatch in ends:
            version = ends.index(one.microbatch) + 1
            made.append(Instruction("UPDATE", one.stage, one.microbatch, version=version))
    return tuple(made)
