"""The messages of a program: what each carries, over which channel, and one order in which all rows can run.

A channel is (source rank, target rank, kind): activations ("F") and gradients ("B") of a pair of ranks never wait for
each other. On a channel messages arrive in the order in which they were sent.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from pipecompile.errors import ProgramError
from pipecompile.ir import RECEIVES, SENDS, Instruction, Program, Spec, StagePlan, lifetimes
from pipecompile.ir.lifetimes import Channel, channel_of

Plans = Mapping[int, StagePlan]


@dataclass(frozen=True, slots=True)
class Message:
    """The tensors ``values`` of one microbatch on their way from stage ``source`` to stage ``target``."""

    channel: Channel
    source: int
    target: int
    microbatch: int
    values: tuple[str, ...]
    specs: tuple[Spec, ...]


def by_index(plans: Iterable[StagePlan] | Plans, program: Program) -> dict[int, StagePlan]:
    """The plans by stage; ProgramError unless there is one for each stage."""
    found = {plan.index: plan for plan in (plans.values() if isinstance(plans, Mapping) else plans)}
    if sorted(found) != list(range(program.shape.stages)):
        raise ProgramError(
            f"there are plans for stages {sorted(found)}, but the program has stages 0 to {program.shape.stages - 1}; "
            "give the plans that were compiled with this program"
        )
    return found


def message_of(one: Instruction, plans: Plans, placement: tuple[int, ...]) -> Message:
    """What a SEND or RECV instruction carries; ProgramError if its producer makes no such value."""
    sends = one.op in SENDS
    source, target = (one.stage, one.peer) if sends else (one.peer, one.stage)
    if not 0 <= one.peer < len(placement):
        raise ProgramError(f"{one}: there is no stage {one.peer}; compile the program again")
    kind = one.op[-1]
    producer = source if kind == "F" else target
    made = {port.name: port.spec for port in plans[producer].outputs}
    for value in one.values:
        if value not in made:
            raise ProgramError(
                f"{one} carries {value!r}, but stage {producer} makes {', '.join(made) or 'nothing'}; "
                "compile the program and the stages together"
            )
    return Message(
        channel_of(one, placement),
        source,
        target,
        one.microbatch,
        one.values,
        tuple(made[value] for value in one.values),
    )


def channels(program: Program, plans: Plans, at: Sequence[Plans] = ()) -> dict[Channel, tuple[Message, ...]]:
    """The messages of each channel in order; ProgramError where sends and receives differ.

    ``at`` are the plans at each microbatch's sizes, if these are others than the compiled ones.
    """
    sent: dict[Channel, list[tuple[Instruction, Message]]] = {}
    received: dict[Channel, list[tuple[Instruction, Message]]] = {}
    for row in program.rows:
        for one in row:
            if one.op in (*SENDS, *RECEIVES):
                message = message_of(one, at[one.microbatch] if at else plans, program.shape.placement)
                (sent if one.op in SENDS else received).setdefault(message.channel, []).append((one, message))
    for channel in sorted({*sent, *received}):
        here, there = sent.get(channel, []), received.get(channel, [])
        for (send, message), (receive, expected) in zip(here, there):
            if message != expected:
                raise ProgramError(
                    f"rank {channel[0]} sends {send} {message.values} where rank {channel[1]} expects {receive} "
                    f"{expected.values}; both must list their messages in the same order"
                )
        if len(here) != len(there):
            extra = (here if len(here) > len(there) else there)[min(len(here), len(there))][0]
            raise ProgramError(f"{extra} has no counterpart on the other rank; compile the program again")
    return {channel: tuple(message for _, message in found) for channel, found in sorted(sent.items())}


def interleave(program: Program, plans: Plans) -> list[tuple[int, int]]:
    """``lifetimes.interleave`` of a program whose messages were checked."""
    channels(program, plans)
    return lifetimes.interleave(program)
