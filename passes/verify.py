"""Proves that a program is safe to run, or names the instruction that makes it unsafe.

1. Complete and in order: every forward, and backward (or its input half, then its weight half), once for each stage and
   microbatch, on the stage's rank; every message that the partition calls for, once, sent after its value is made and
   received before it is used; every shared parameter's gradient summed once on each rank that holds it, after the last
   backward there; the gradients of each stage, or of none, summed over the replicas once, after its last backward. Where
   weights are updated inside the step, the rules of ``updates.py``.
2. On each channel (source rank, target rank, direction) the order of sends is the order of receives.
3. No ring of ranks that wait for each other (``waits.py``).
4. No rank ever holds more memory than its limit (``memory.py`` says what counts).

O(instructions), for each shared parameter once more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pipecompile.errors import MemoryLimitError, ProgramError
from pipecompile.ir import COMPUTE, RECEIVES, SENDS, SUMS, Instruction, Partition, Program, Routes, Timetable
from pipecompile.ir.versions import updates
from pipecompile.memory import ADAM, memory_over_time, standing_bytes
from pipecompile.passes.updates import wrong_updates
from pipecompile.passes.waits import MESSAGES, stuck

Places = dict[tuple[str, int, int, int], tuple[int, int]]
"""Where an instruction stands, (rank, position), by (op, stage, microbatch, peer)."""


def verify(
    program: Program,
    partition: Partition,
    limits: Sequence[int] | None = None,
    optimizer_factor: float = ADAM,
) -> Program:
    """Give ``program`` back if it is safe for ``partition``, else raise ProgramError that names the instruction.

    ``limits`` are bytes for each rank; MemoryLimitError says what exceeds them and by how much.
    """
    if len(program.rows) != program.shape.ranks or partition.stages != program.shape.stages:
        raise ProgramError(
            f"the program has {len(program.rows)} rows for {program.shape.ranks} ranks and {program.shape.stages} "
            f"stages, the partition {partition.stages} stages; compile both again"
        )
    places = _places(program)
    _check_compute(program, places)
    _check_messages(program, Routes.of(partition), places)
    for place, problem in wrong_updates(program, partition):
        raise _fault(program, place, problem)
    if not updates(program.rows):
        _check_reductions(program, partition)
        _check_replica_sums(program)
    _check_channels(program)
    _check_waits(program)
    if limits is not None:
        _check_memory(program, partition, limits, optimizer_factor)
    return program


def verify_compute(timetable: Timetable) -> Timetable:
    """Give ``timetable`` back if it has every computation once, on its rank and in order (rule 1 without messages)."""
    shape = timetable.shape
    if len(timetable.rows) != shape.ranks:
        raise ProgramError(f"the timetable has {len(timetable.rows)} rows for {shape.ranks} ranks; give one for each")
    program = Program(timetable.schedule, shape, timetable.rows)
    for rank, row in enumerate(timetable.rows):
        for position, one in enumerate(row):
            if one.op not in (*COMPUTE, "UPDATE"):
                raise _fault(program, (rank, position), "a timetable holds computations only; leave messages out")
    _check_compute(program, _places(program))
    return timetable


def _fault(program: Program, place: tuple[int, int], problem: str) -> ProgramError:
    rank, position = place
    return ProgramError(
        f"{str(program.rows[rank][position])[:200]} (rank {rank}, instruction {position}): {problem[:500]}"
    )


def _places(program: Program) -> Places:
    """Every instruction's place; refuses what stands twice, on a wrong rank, or names what does not exist."""
    shape = program.shape
    places: Places = {}
    for rank, row in enumerate(program.rows):
        for position, one in enumerate(row):
            place = (rank, position)
            if not 0 <= one.stage < shape.stages:
                raise _fault(program, place, f"there is no stage {one.stage}, only 0 to {shape.stages - 1}")
            if shape.placement[one.stage] != rank:
                raise _fault(program, place, f"stage {one.stage} belongs to rank {shape.placement[one.stage]}")
            if one.op in (*SUMS, "UPDATE"):
                continue
            if not 0 <= one.microbatch < shape.microbatches:
                raise _fault(program, place, f"its microbatch is not one of 0 to {shape.microbatches - 1}")
            if one.op in COMPUTE and (one.peer != -1 or one.values or one.peers):
                raise _fault(program, place, "a computation has no peer and carries no values; leave them out")
            key = (one.op, one.stage, one.microbatch, one.peer)
            if key in places:
                raise _fault(program, place, f"it stands twice, first at instruction {places[key][1]}; remove one")
            places[key] = place
    return places


def _check_compute(program: Program, places: Places) -> None:
    for stage, rank in enumerate(program.shape.placement):
        for m in range(program.shape.microbatches):
            found = {letter: places[op, stage, m, -1] for op, letter in COMPUTE.items() if (op, stage, m, -1) in places}
            if "".join(sorted(found)) not in ("BF", "FIW"):
                have = ", ".join(f"{stage}{letter}{m}" for letter in found) or "nothing"
                raise ProgramError(
                    f"rank {rank} has {have} for stage {stage} and microbatch {m}; "
                    f"expected {stage}F{m} and {stage}B{m}, or {stage}F{m}, {stage}I{m} and {stage}W{m}"
                )
            order = sorted(found, key=lambda letter: found[letter])
            if order not in (["F", "B"], ["F", "I", "W"]):
                late = "F" if order[0] != "F" else "I"
                raise _fault(program, found[order[0 if late == "F" else 1]], f"it stands before {stage}{late}{m}")


@dataclass(frozen=True, slots=True)
class _Crossing:
    """A message that has to be: what is sent, between which computations' places."""

    send: Instruction
    receive: Instruction
    made: tuple[int, int]
    used: tuple[int, int]


def _crossings(program: Program, routes: Routes, places: Places) -> Iterator[_Crossing]:
    """What every microbatch carries from stage to stage, whether a message is needed for it or not."""

    def backward(stage: int, m: int) -> tuple[int, int]:
        whole = places.get(("BACKWARD", stage, m, -1))
        return whole if whole is not None else places["BACKWARD_INPUT", stage, m, -1]

    for route in routes.routes:
        a, b = route.source, route.target
        for m in range(program.shape.microbatches):
            yield _Crossing(
                Instruction("SEND_F", a, m, b, route.values),
                Instruction("RECV_F", b, m, a, route.values),
                made=places["FORWARD", a, m, -1],
                used=places["FORWARD", b, m, -1],
            )
            if route.gradients:
                yield _Crossing(
                    Instruction("SEND_B", b, m, a, route.gradients),
                    Instruction("RECV_B", a, m, b, route.gradients),
                    made=backward(b, m),
                    used=backward(a, m),
                )


def _check_messages(program: Program, routes: Routes, places: Places) -> None:
    expected = set()
    for crossing in _crossings(program, routes, places):
        if crossing.made[0] == crossing.used[0]:
            if crossing.made > crossing.used:
                raise _fault(program, crossing.used, f"it reads what {_at(program, crossing.made)} makes later")
            continue
        for message, other in ((crossing.send, crossing.made), (crossing.receive, crossing.used)):
            key = (message.op, message.stage, message.microbatch, message.peer)
            expected.add(key)
            place = places.get(key)
            if place is None:
                raise ProgramError(f"{message} is missing on rank {other[0]}; {_at(program, other)} needs it")
            if program.rows[place[0]][place[1]].values != message.values:
                raise _fault(program, place, f"it carries the wrong values; expected {', '.join(message.values)}")
        sent = places[crossing.send.op, crossing.send.stage, crossing.send.microbatch, crossing.send.peer]
        received = places[crossing.receive.op, crossing.receive.stage, crossing.send.microbatch, crossing.receive.peer]
        if sent < crossing.made:
            raise _fault(program, sent, f"it sends what {_at(program, crossing.made)} makes later")
        if received > crossing.used:
            raise _fault(program, received, f"{_at(program, crossing.used)} uses it before it is received")
    for key, place in places.items():
        if key[0] in MESSAGES and key not in expected:
            raise _fault(program, place, "nothing is to be sent between these stages; remove it")


def _at(program: Program, place: tuple[int, int]) -> str:
    return str(program.rows[place[0]][place[1]])


def _last_backwards(row: Sequence[Instruction]) -> dict[int, int]:
    """By stage: where its last gradients of weights are made."""
    return {one.stage: at for at, one in enumerate(row) if one.op in ("BACKWARD", "BACKWARD_WEIGHT")}


def _check_reductions(program: Program, partition: Partition) -> None:
    placement = program.shape.placement
    holders = {s.parameter: sorted({placement[stage] for stage in s.stages}) for s in partition.shared}
    stages = {s.parameter: s.stages for s in partition.shared}
    found: dict[str, list[int]] = {name: [] for name, ranks in holders.items() if len(ranks) > 1}
    for rank, row in enumerate(program.rows):
        last = _last_backwards(row)
        for position, one in enumerate(row):
            if one.op != "REDUCE_GRAD":
                continue
            name = one.values[0] if len(one.values) == 1 else ""
            if name not in found or one.stage not in stages[name] or rank in found[name]:
                raise _fault(
                    program, (rank, position), f"{', '.join(one.values) or 'nothing'} is not to be summed here"
                )
            found[name].append(rank)
            others = [placement[peer] if peer in stages[name] else rank for peer in one.peers]
            if sorted([rank, *others]) != holders[name]:
                raise _fault(program, (rank, position), f"{name} lives on ranks {holders[name]}; name a stage of each")
            for stage in stages[name]:
                if last.get(stage, -1) > position:
                    problem = f"{name} still gets a gradient from {row[last[stage]]}; move it behind"
                    raise _fault(program, (rank, position), problem)
    for name, ranks in found.items():
        for rank in set(holders[name]) - set(ranks):
            raise ProgramError(f"the REDUCE_GRAD of {name} is missing on rank {rank}; every rank that holds it sums it")


def _check_replica_sums(program: Program) -> None:
    """Replicas run the same program, so the n-th sum of a rank meets the n-th of its replicas: they cannot wait in a ring."""
    summed: dict[int, tuple[int, int]] = {}
    for rank, row in enumerate(program.rows):
        last = _last_backwards(row)
        for position, one in enumerate(row):
            if one.op != "REDUCE_REPLICAS":
                continue
            if one.values or one.peers or one.microbatch != -1 or one.peer != -1:
                raise _fault(program, (rank, position), "a sum over replicas names its stage only; leave the rest out")
            if one.stage in summed:
                raise _fault(program, (rank, position), f"it stands twice, first at instruction {summed[one.stage][1]}")
            summed[one.stage] = (rank, position)
            if last[one.stage] > position:
                problem = f"the stage still makes gradients in {row[last[one.stage]]}; move it behind"
                raise _fault(program, (rank, position), problem)
    for stage, rank in enumerate(program.shape.placement if summed else ()):
        if stage not in summed:
            raise ProgramError(f"{stage}REDUCE_REPLICAS is missing on rank {rank}; each stage is summed, or none is")


def _check_channels(program: Program) -> None:
    placement = program.shape.placement
    sends: dict[tuple[int, int, str], list[tuple[tuple[int, int], Instruction]]] = {}
    receives: dict[tuple[int, int, str], list[tuple[tuple[int, int], Instruction]]] = {}
    for rank, row in enumerate(program.rows):
        for position, one in enumerate(row):
            if one.op in SENDS:
                sends.setdefault((rank, placement[one.peer], one.op[-1]), []).append(((rank, position), one))
            elif one.op in RECEIVES:
                receives.setdefault((placement[one.peer], rank, one.op[-1]), []).append(((rank, position), one))
    for channel, outgoing in sends.items():
        for (place, send), (_, receive) in zip(outgoing, receives[channel]):
            if (send.stage, send.peer, send.microbatch) != (receive.peer, receive.stage, receive.microbatch):
                raise _fault(
                    program,
                    place,
                    f"on the channel from rank {channel[0]} to rank {channel[1]} it meets {receive}; "
                    "send and receive in the same order",
                )


def _check_waits(program: Program) -> None:
    if waiting := stuck(program):
        others = ", ".join(f"rank {rank} in {_at(program, (rank, position))}" for rank, position in waiting[1:])
        raise _fault(program, waiting[0], f"it waits for ever, as does {others}; move one of them")


def _check_memory(program: Program, partition: Partition, limits: Sequence[int], optimizer_factor: float) -> None:
    if len(limits) != program.shape.ranks:
        raise ProgramError(f"{len(limits)} memory limits for {program.shape.ranks} ranks; give one for each rank")
    standing = standing_bytes(program, partition, optimizer_factor)
    for rank, line in enumerate(memory_over_time(program, partition, optimizer_factor)):
        for position, held in enumerate(line):
            if held > limits[rank]:
                raise MemoryLimitError(
                    f"{program.rows[rank][position]} (rank {rank}, instruction {position}): rank {rank} holds {held} "
                    f"bytes here ({standing[rank]} of them parameters, gradients and optimizer state), "
                    f"{held - limits[rank]} more than its limit of {limits[rank]}; use more stages, smaller "
                    "microbatches, or a schedule with fewer activations in flight"
                )
