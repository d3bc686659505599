"""How messages travel: an interface, and its home in one process."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from pipecompile.ir.lifetimes import Channel
from pipecompile.runtime.messages import Message

Value = Tensor | None


class Transport(Protocol):
    """Carries messages between ranks; on a channel they arrive in the order in which they were sent."""

    def begin(self) -> None:
        """Get ready for a step."""

    def send(self, message: Message, values: Sequence[Value]) -> None:
        """Send the values on their way, without waiting until they arrive."""

    def receive(self, message: Message) -> Sequence[Value]:
        """The values of the message; what is received belongs to the caller alone."""


class Mailboxes:
    """All ranks in one process: a message is a hand-over, nothing is copied."""

    def __init__(self) -> None:
        self._boxes: dict[Channel, deque[tuple[Message, Sequence[Value]]]] = {}

    def begin(self) -> None:
        self._boxes.clear()

    def send(self, message: Message, values: Sequence[Value]) -> None:
        self._boxes.setdefault(message.channel, deque()).append((message, values))

    def receive(self, message: Message) -> Sequence[Value]:
        arrived, values = self._boxes[message.channel].popleft()
        assert arrived == message, f"{arrived} arrived where {message} was expected"
        return values
