"""Finds ranks that would wait for each other for ever, under the weakest transport.

A run of consecutive messages starts as one and ends when the other end of each of its messages has started; a gradient
sum, or an update of a shared parameter, ends when all its ranks have started.

    rank 0   0SEND_F0>1 0RECV_B0<1      ends when 1RECV_F0<0 and 1SEND_B0>0 have started
    rank 1   1RECV_F0<0                 ends when 0SEND_F0>1 has started

O(instructions), and O(ranks) for each round in which a rank moves on.
"""

from __future__ import annotations

from collections.abc import Sequence

from pipecompile.ir import RECEIVES, SENDS, Instruction, Program

MESSAGES = (*SENDS, *RECEIVES)
COLLECTIVE = ("REDUCE_GRAD", "UPDATE")
End = tuple[object, ...]
"""One end of a message or of a sum: its rank, and what it is."""


def stuck(program: Program) -> list[tuple[int, int]]:
    """Where ranks wait for ever, (rank, position), one for each such rank; empty if all come to their ends.

    The batches of all ranks run against each other until all are over, or none can end.
    """
    placement = program.shape.placement
    batches = [_batches(row) for row in program.rows]
    at = [0] * len(batches)
    begun = [-1] * len(batches)
    started: set[End] = set()

    def waits(rank: int, position: int) -> bool:
        return any(end not in started for end in _other_ends(program.rows[rank][position], placement))

    moved = True
    while moved:
        moved = False
        for rank, row in enumerate(program.rows):
            while at[rank] < len(batches[rank]):
                batch = batches[rank][at[rank]]
                if begun[rank] < at[rank]:
                    begun[rank] = at[rank]
                    started.update(_own_end(row[position], rank) for position in batch)
                    moved = True
                if any(waits(rank, position) for position in batch):
                    break
                at[rank] += 1
                moved = True
    left = [(rank, batches[rank][reached]) for rank, reached in enumerate(at) if reached < len(batches[rank])]
    return [(rank, next(position for position in batch if waits(rank, position))) for rank, batch in left]


def _batches(row: Sequence[Instruction]) -> list[list[int]]:
    """Positions of a row that act as one: runs of messages; a gradient sum alone.

    Computations never wait; a sum over replicas only starts here, and may do so within a run.
    """
    batches: list[list[int]] = []
    run = False
    for position, one in enumerate(row):
        if one.op in MESSAGES and run:
            batches[-1].append(position)
        elif one.op in (*MESSAGES, *COLLECTIVE):
            batches.append([position])
        if one.op != "REDUCE_REPLICAS":
            run = one.op in MESSAGES
    return batches


def _other_ends(one: Instruction, placement: Sequence[int]) -> list[End]:
    """What must have started before ``one`` is over."""
    if one.op in COLLECTIVE:
        return [(placement[peer], one.op, one.values, one.version) for peer in one.peers]
    other = {"SEND": "RECV", "RECV": "SEND"}[one.op[:4]] + one.op[4:]
    return [(placement[one.peer], other, one.peer, one.microbatch, one.stage)]


def _own_end(one: Instruction, rank: int) -> End:
    if one.op in COLLECTIVE:
        return (rank, one.op, one.values, one.version)
    return (rank, one.op, one.stage, one.microbatch, one.peer)
