"""How much memory each rank holds at each instruction of a program: an upper bound, counted without running it.

    always         parameters + gradients of the trainable ones + optimizer state (a factor of the trainable ones)
    forward        + saved activations + the stage's outputs that go to another rank, until the backward of the same
                   stage and microbatch (the weight half, if it is split)
    receive        + the message, a value until the same backward, a gradient until the backward that reads it
    send gradient  + the message, until the next message to the same stage: a sender waits for its previous message

O(instructions) for each rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pipecompile.ir import Instruction, Partition, Program, Route, Routes, Timetable

ADAM = 2.0
"""Optimizer state as a factor of the trainable parameters' bytes: Adam keeps two moments."""


def standing_bytes(
    program: Program | Timetable, partition: Partition, optimizer_factor: float = ADAM
) -> tuple[int, ...]:
    """What each rank holds whatever it runs: parameters, gradients, optimizer state."""
    sizes = [0] * program.shape.ranks
    for stage, rank in enumerate(program.shape.placement):
        cost = partition.costs[stage]
        sizes[rank] += cost.parameter_bytes + int(cost.trainable_bytes * (1 + optimizer_factor))
    return tuple(sizes)


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


def memory_over_time(
    program: Program, partition: Partition, optimizer_factor: float = ADAM
) -> tuple[tuple[int, ...], ...]:
    """Bytes held while each instruction of each row runs."""
    routes = {(r.source, r.target): r for r in Routes.of(partition).routes}
    standing = standing_bytes(program, partition, optimizer_factor)
    return tuple(
        tuple(size + held for held in _held(program, rank, partition, routes)) for rank, size in enumerate(standing)
    )


def peak_bytes(program: Program, partition: Partition, optimizer_factor: float = ADAM) -> tuple[int, ...]:
    """The most that each rank holds at any instruction."""
    standing = standing_bytes(program, partition, optimizer_factor)
    lines = memory_over_time(program, partition, optimizer_factor)
    return tuple(max((size, *line)) for size, line in zip(standing, lines))


def _held(program: Program, rank: int, partition: Partition, routes: dict[tuple[int, int], Route]) -> Iterator[int]:
    """Bytes of activations and messages on ``rank`` at each instruction; what an instruction frees goes after it."""
    row = program.rows[rank]
    placement = program.shape.placement
    split = {(one.stage, one.microbatch) for one in row if one.op == "BACKWARD_WEIGHT"}
    outputs = [
        sum(r.bytes for r in routes.values() if r.source == s and placement[r.target] != rank)
        for s in range(partition.stages)
    ]
    activations: dict[tuple[int, int], int] = {}
    gradients: dict[tuple[int, int], int] = {}
    sending: dict[tuple[int, int], int] = {}
    for one in row:
        key = (one.stage, one.microbatch)
        if one.op == "FORWARD":
            activations[key] = activations.get(key, 0) + partition.costs[one.stage].saved_bytes + outputs[one.stage]
        elif one.op == "RECV_F":
            activations[key] = activations.get(key, 0) + routes[one.peer, one.stage].bytes
        elif one.op == "RECV_B":
            gradients[key] = gradients.get(key, 0) + routes[one.stage, one.peer].gradient_bytes
        elif one.op == "SEND_B":
            sending[one.stage, one.peer] = routes[one.peer, one.stage].gradient_bytes
        yield sum(activations.values()) + sum(gradients.values()) + sum(sending.values())
        _free(one, key in split, activations, gradients)


def _free(
    one: Instruction, split: bool, activations: dict[tuple[int, int], int], gradients: dict[tuple[int, int], int]
) -> None:
    key = (one.stage, one.microbatch)
    if one.op == "BACKWARD_WEIGHT" or (one.op == "BACKWARD" and not split):
        activations.pop(key, None)
        gradients.pop(key, None)
