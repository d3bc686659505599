"""When a rank can know that what it sent has arrived: the moment at which its buffers are let go without waiting.

A receive tells its rank what the sender knew when it sent, so knowledge travels along messages:

    rank 0   SEND a ───┐          RECV b     here rank 0 knows that a has arrived
    rank 1             └▶ RECV a  SEND b ──▶

Each rank carries, for every rank, how many of its instructions are known to be over (Mattern's vector clocks);
O(instructions x ranks).
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence

from pipecompile.errors import ProgramError
from pipecompile.ir.program import RECEIVES, SENDS, Instruction, Program

Channel = tuple[int, int, str]
"""(source rank, target rank, kind): activations ("F") and gradients ("B") of a pair of ranks never wait for each other."""

Arrivals = dict[tuple[int, int], dict[Channel, int]]
"""For a receive, by (rank, position): how many more sends of each channel have surely arrived."""


def interleave(program: Program) -> list[tuple[int, int]]:
    """All instructions as (rank, position) in an order in which nothing is received before it is sent.

    Ranks take turns, each going on until it would wait; they update a shared parameter together. ProgramError if all
    wait for each other.
    """
    placement = program.shape.placement
    position = [0] * len(program.rows)
    mail: dict[Channel, deque[None]] = defaultdict(deque)
    updating: dict[tuple[tuple[str, ...], int], set[int]] = defaultdict(set)
    order: list[tuple[int, int]] = []
    moved = True
    while moved:
        moved = False
        for rank, row in enumerate(program.rows):
            while position[rank] < len(row):
                one = row[position[rank]]
                if one.op in SENDS:
                    mail[channel_of(one, placement)].append(None)
                elif one.op in RECEIVES:
                    waiting = mail[channel_of(one, placement)]
                    if not waiting:
                        break
                    waiting.popleft()
                elif one.op == "UPDATE":
                    here = updating[one.values, one.version]
                    here.add(rank)
                    if not here.issuperset(placement[peer] for peer in one.peers):
                        break
                order.append((rank, position[rank]))
                position[rank] += 1
                moved = True
    stuck = [f"rank {r} at {row[position[r]]}" for r, row in enumerate(program.rows) if position[r] < len(row)]
    if stuck:
        raise ProgramError(f"the ranks wait for each other: {', '.join(stuck)}; receives must follow their sends")
    return order


def channel_of(one: Instruction, placement: Sequence[int]) -> Channel:
    """The channel of a SEND or RECV."""
    here, there = placement[one.stage], placement[one.peer]
    return (here, there, one.op[-1]) if one.op in SENDS else (there, here, one.op[-1])


def arrivals(program: Program) -> Arrivals:
    """What each receive says about its rank's own earlier sends."""
    ranks = range(len(program.rows))
    known = [[0 for _ in ranks] for _ in ranks]
    clocks: dict[Channel, deque[list[int]]] = {}
    received_at = _receive_positions(program)
    waiting: dict[Channel, deque[int]] = {}
    found: Arrivals = {}
    for rank, position in interleave(program):
        one = program.rows[rank][position]
        known[rank][rank] = position + 1
        if one.op in SENDS:
            channel = channel_of(one, program.shape.placement)
            clocks.setdefault(channel, deque()).append(known[rank].copy())
            waiting.setdefault(channel, deque()).append(received_at[channel].popleft())
        elif one.op in RECEIVES:
            channel = channel_of(one, program.shape.placement)
            heard = clocks[channel].popleft()
            known[rank] = [max(mine, theirs) for mine, theirs in zip(known[rank], heard)]
            over = {c: _arrived(queue, known[rank][c[1]]) for c, queue in waiting.items() if c[0] == rank}
            found[rank, position] = {c: count for c, count in over.items() if count}
    return found


def most_on_the_way(program: Program, over: Arrivals) -> dict[Channel, int]:
    """For each channel the most messages that are sent but not known to have arrived."""
    most: dict[Channel, int] = {}
    for rank, row in enumerate(program.rows):
        held: dict[Channel, int] = {}
        for position, one in enumerate(row):
            if one.op in SENDS:
                channel = channel_of(one, program.shape.placement)
                held[channel] = held.get(channel, 0) + 1
                most[channel] = max(most.get(channel, 0), held[channel])
            for channel, count in over.get((rank, position), {}).items():
                held[channel] -= count
    return most


def _receive_positions(program: Program) -> dict[Channel, deque[int]]:
    found: dict[Channel, deque[int]] = {}
    for row in program.rows:
        for position, one in enumerate(row):
            if one.op in RECEIVES:
                found.setdefault(channel_of(one, program.shape.placement), deque()).append(position)
    return found


def _arrived(queue: deque[int], over: int) -> int:
    """Take from ``queue`` the sends whose receive is among the first ``over`` instructions of its rank."""
    count = 0
    while queue and queue[0] < over:
        queue.popleft()
        count += 1
    return count
