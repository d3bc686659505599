"""Channels whose receives are posted where the program says, because a posted receive keeps the device busy.

recv a │ F0 │ send b  recv c │ F1 │ send d        a is posted at the beginning, c behind a: it travels during F0
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from pipecompile.ir import COMPUTE, RECEIVES, SENDS, Instruction, Program, Spec
from pipecompile.ir.lifetimes import Channel, channel_of
from pipecompile.runtime.channels import Channels, Meeting
from pipecompile.runtime.ends import Ends
from pipecompile.runtime.messages import Message, Plans
from pipecompile.runtime.transport import Value


class StreamChannels(Channels):
    """Channels between devices that send and receive themselves."""

    def __init__(
        self,
        program: Program,
        rank: int,
        plans: Plans,
        device: torch.device,
        meeting: Meeting,
        told: Sequence[tuple[int, Spec]] = (),
        ends: Ends | None = None,
    ) -> None:
        super().__init__(program, rank, plans, device, meeting, told, ends)
        receivers: dict[Channel, Any] = dict(self._receivers)
        planned = posts(program.rows[rank], program.shape.placement)
        self._posts = [tuple(receivers[channel] for channel in some) for some in planned]
        self._due: Iterator[tuple[Any, ...]] = iter(())

    def begin(self) -> None:
        super().begin()
        self._due = iter(self._posts)
        self._post()

    def send(self, message: Message, values: Sequence[Value]) -> None:
        super().send(message, values)
        self._post()

    def receive(self, message: Message) -> Sequence[Value]:
        values = super().receive(message)
        self._post()
        return values

    def _post(self) -> None:
        for receiver in next(self._due):
            receiver.post()


def posts(row: Sequence[Instruction], placement: Sequence[int]) -> list[list[Channel]]:
    """The channels whose next receive is posted before the first send or receive of the row, and behind each of them.

    Each is posted before the computation that precedes it in the row, so that the message travels while that runs.
    """
    found: list[list[Channel]] = [[]]
    place = 0
    for one in row:
        if one.op in COMPUTE:
            place = len(found) - 1
        elif one.op in (*SENDS, *RECEIVES):
            if one.op in RECEIVES:
                found[place].append(channel_of(one, placement))
            found.append([])
    return found
