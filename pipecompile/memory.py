"""How much memory each rank holds at each instruction of a program: an upper bound, counted without running it.

    always         parameters + gradients of the trainable ones + optimizer state (a factor of the trainable ones)
    forward        + saved activations + the stage's outputs that go to another rank, until the backward of the same
                   stage and microbatch (the weight half, if it is split); where these are recomputed, + what came
                   from a stage of the same rank
    backward       + what it recomputes, until it ends (the weight half, if it is split)
    receive        + the message, a value until the same backward, a gradient until the backward that reads it
    update         + what ``stash.py`` counts
    send gradient  + the message, until the next message to the same stage: a sender waits for its previous message

O(instructions) for each rank.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipecompile.footprint import Footprint, weighed
from pipecompile.ir import Instruction, Partition, Program, Routes, Timetable
from pipecompile.ir.versions import updates
from pipecompile.stash import stashed

Column = tuple[str, int, int]
"""Something that a rank holds for a microbatch: what it is, and the two stages that it goes between (or one, twice)."""

ADAM = 2.0
"""Optimizer state as a factor of the trainable parameters' bytes: Adam keeps two moments."""


def standing_bytes(
    program: Program | Timetable, partition: Partition, optimizer_factor: float = ADAM
) -> tuple[int, ...]:
    """What each rank holds whatever it runs: parameters, gradients, optimizer state, masters."""
    sizes = [0] * program.shape.ranks
    for stage, rank in enumerate(program.shape.placement):
        cost = partition.costs[stage]
        sizes[rank] += cost.parameter_bytes + int(cost.trainable_bytes * (1 + optimizer_factor))
        sizes[rank] += cost.master_bytes + int(cost.master_bytes / 2 * (1 + optimizer_factor))  # twice as wide
    return tuple(sizes)


def most_in_flight(row: Sequence[Instruction]) -> int:
    """The most activations, each of one stage and microbatch, that a rank holds at once."""
    split = {(one.stage, one.microbatch) for one in row if one.op == "BACKWARD_WEIGHT"}
    held = most = 0
    for one in row:
        held += one.op == "FORWARD"
        most = max(most, held)
        held -= one.op == ("BACKWARD_WEIGHT" if (one.stage, one.microbatch) in split else "BACKWARD")
    return most


def in_flight(rows: Sequence[Sequence[Instruction]], stages: int) -> tuple[int, ...]:
    """For each stage the most microbatches whose activations are held at once."""
    ends = {(one.stage, one.microbatch) for row in rows for one in row if one.op == "BACKWARD_WEIGHT"}
    held, most = [0] * stages, [0] * stages
    for row in rows:
        for one in row:
            if one.op == "FORWARD":
                held[one.stage] += 1
                most[one.stage] = max(most[one.stage], held[one.stage])
            elif one.op == ("BACKWARD_WEIGHT" if (one.stage, one.microbatch) in ends else "BACKWARD"):
                held[one.stage] -= 1
    return tuple(most)


@dataclass(frozen=True, slots=True)
class Holdings:
    """What a rank holds while each of its instructions runs, besides what it always holds: how many of each column.

    ``columns``: ("saved", stage, stage) is the saved activations of a microbatch, ("again", stage, stage) what a backward
    makes again, ("forward", a, b) and ("backward", a, b) what goes from stage a to b for one, and the gradients that come
    back.
    ``counts`` is int64[instructions, columns].
    """

    columns: tuple[Column, ...]
    counts: npt.NDArray[np.int64]

    @staticmethod
    def of(
        row: Sequence[Instruction],
        placement: Sequence[int],
        pairs: Iterable[tuple[int, int]],
        recomputed: Collection[int] = (),
    ) -> Holdings:
        """The holdings along a rank's row, where values go between the ``pairs`` of stages; some are ``recomputed``."""
        to: dict[int, list[int]] = {}
        for a, b in pairs:
            if placement[a] != placement[b]:
                to.setdefault(a, []).append(b)
        place: dict[Column, int] = {}
        changes: list[tuple[int, int, int]] = []
        held: dict[tuple[int, int], list[int]] = {}
        split = {(one.stage, one.microbatch) for one in row if one.op == "BACKWARD_WEIGHT"}
        for position, one in enumerate(row):
            key = (one.stage, one.microbatch)
            for name in _taken(one, to, recomputed):
                column = place.setdefault(name, len(place))
                if one.op != "SEND_B":
                    held.setdefault(key, []).append(column)
                elif (-1, column) in held:
                    continue
                else:
                    held[-1, column] = [column]
                changes.append((position, column, 1))
            if one.op == "BACKWARD_WEIGHT" or (one.op == "BACKWARD" and key not in split):
                changes += [(position + 1, column, -1) for column in held.pop(key, ())]
        counts = np.zeros((len(row) + 1, len(place)), dtype=np.int64)
        if changes:
            where = np.array(changes)
            np.add.at(counts, (where[:, 0], where[:, 1]), where[:, 2])
        return Holdings(tuple(place), counts.cumsum(axis=0)[:-1])


def _taken(one: Instruction, to: Mapping[int, Sequence[int]], recomputed: Collection[int]) -> list[Column]:
    """The columns of which an instruction takes one more."""
    if one.op == "FORWARD":
        return [("saved", one.stage, one.stage), *(("forward", one.stage, b) for b in to.get(one.stage, ()))]
    if one.op in ("BACKWARD", "BACKWARD_INPUT"):
        return [("again", one.stage, one.stage)] if one.stage in recomputed else []
    if one.op == "RECV_F":
        return [("forward", one.peer, one.stage)]
    if one.op == "RECV_B":
        return [("backward", one.stage, one.peer)]
    return [("backward", one.peer, one.stage)] if one.op == "SEND_B" else []


def memory_over_time(
    program: Program, partition: Partition, optimizer_factor: float = ADAM
) -> tuple[tuple[int, ...], ...]:
    """The most bytes held while each instruction of each row runs."""
    found = _lines(program, partition, optimizer_factor)
    if not updates(program.rows):
        return found
    return tuple(
        tuple(held + more for held, more in zip(line, stashed(program, rank, partition)))
        for rank, line in enumerate(found)
    )


def _lines(program: Program, partition: Partition, optimizer_factor: float) -> tuple[tuple[int, ...], ...]:
    if weighed(partition):
        return Footprint(program, partition, optimizer_factor).lines()
    routes = Routes.of(partition).routes
    size: dict[Column, int] = {("saved", s, s): cost.saved_bytes for s, cost in enumerate(partition.costs)}
    size |= {("again", s, s): cost.recomputed_bytes for s, cost in enumerate(partition.costs) if cost.recomputed_bytes}
    recomputed = [s for s, cost in enumerate(partition.costs) if cost.recomputed_bytes]
    for r in routes:
        size["forward", r.source, r.target] = r.bytes
        size["backward", r.source, r.target] = r.gradient_bytes
    lines = []
    for row, always in zip(program.rows, standing_bytes(program, partition, optimizer_factor)):
        found = Holdings.of(row, program.shape.placement, [(r.source, r.target) for r in routes], recomputed)
        sizes = np.array([size[name] for name in found.columns], dtype=np.int64)
        inputs = _inputs(row, partition, program.shape.placement)
        lines.append(tuple((always + inputs + found.counts @ sizes).tolist()))
    return tuple(lines)


def _inputs(row: Sequence[Instruction], partition: Partition, placement: Sequence[int]) -> npt.NDArray[np.int64]:
    """What recomputation keeps at each instruction of inputs that came from the same rank."""
    kept = [0] * partition.stages
    for t in partition.transfers:
        if placement[t.source] == placement[t.target] and partition.costs[t.target].recomputed_bytes:
            kept[t.target] += t.bytes
    held: dict[tuple[int, int], int] = {}
    line = np.zeros(len(row), dtype=np.int64)
    for position, one in enumerate(row):
        key = (one.stage, one.microbatch)
        if one.op == "FORWARD":
            held[key] = kept[one.stage]
        line[position] = sum(held.values())
        if one.op in ("BACKWARD", "BACKWARD_WEIGHT"):
            held.pop(key, None)
    return line


def peak_bytes(program: Program, partition: Partition, optimizer_factor: float = ADAM) -> tuple[int, ...]:
    """The most that each rank ever holds."""
    if weighed(partition) and not updates(program.rows):
        return Footprint(program, partition, optimizer_factor).peaks()
    standing = standing_bytes(program, partition, optimizer_factor)
    lines = memory_over_time(program, partition, optimizer_factor)
    return tuple(max((size, *line)) for size, line in zip(standing, lines))


@dataclass(frozen=True, slots=True)
class Demand:
    """What a rank holds at once besides what it always holds: how many of each column."""

    rank: int
    held: tuple[tuple[Column, int], ...]


def demands(
    rows: Sequence[Sequence[Instruction]],
    placement: Sequence[int],
    pairs: Sequence[tuple[int, int]],
    recomputed: Collection[int] = (),
) -> tuple[Demand, ...]:
    """The largest holdings of each rank along its row; what another one contains is left out."""
    found = []
    for rank, row in enumerate(rows):
        along = Holdings.of(row, placement, pairs, recomputed)
        counts = np.unique(along.counts, axis=0)
        for one in counts:
            if (counts >= one).all(axis=1).sum() == 1:
                held = tuple((name, int(count)) for name, count in zip(along.columns, one) if count)
                found.append(Demand(rank, held))
    return tuple(found)


def least_rows(timetable: Timetable) -> tuple[tuple[Instruction, ...], ...]:
    """The timetable with every message that there could be, none earlier than needed: no program holds less."""
    stages, placement = range(timetable.shape.stages), timetable.shape.placement

    def around(one: Instruction) -> Iterable[Instruction]:
        s, m = one.stage, one.microbatch
        before = [a for a in stages if a < s and placement[a] != placement[s]]
        after = [b for b in stages if b > s and placement[b] != placement[s]]
        if one.op == "FORWARD":
            return (*(Instruction("RECV_F", s, m, a) for a in before), one)
        if one.op == "BACKWARD_WEIGHT":
            return (one,)
        receives = (Instruction("RECV_B", s, m, b) for b in after)
        return (*receives, one, *(Instruction("SEND_B", s, m, a) for a in before))

    return tuple(tuple(part for one in row for part in around(one)) for row in timetable.rows)
