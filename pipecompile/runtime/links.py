"""The two ends of a channel: what a sender and a receiver can do, and how they do it over ``torch.distributed``.

A channel has its own group. The order of its messages is known, so the next receives are always posted and a message
finds its buffer ready. Sends are asynchronous; their tensors are kept until the program says that they have arrived.

    posted: m1 m2 │ receive ──▶ post m3, wait for m1            sent: m0 m1 │ arrived(1) ──▶ let m0 go
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from pipecompile.errors import PeerFault
from pipecompile.ir import Spec
from pipecompile.runtime.transport import Value

AHEAD = 2
"""Receives posted on a channel before they are needed, at least."""
AHEAD_BYTES = 1 << 20
"""Small messages cost their latency only: of them as many receives are posted as fit in this."""

Specs = tuple[Spec, ...]
"""What a message carries; the dtype "none" is a value that is None."""


class Sender(Protocol):
    """The end that sends the messages of every step in their fixed order."""

    def resize(self, messages: Sequence[Specs]) -> None:
        """From the next step on the messages carry this; the other end is told the same."""

    def begin(self) -> None:
        """Get ready for a step."""

    def send(self, values: Sequence[Value]) -> None:
        """Send the next message, without waiting until it arrives."""

    def arrived(self, count: int) -> None:
        """``count`` more messages are known to have arrived."""

    def end(self) -> None:
        """The step's last message was sent."""

    def close(self) -> None:
        """Break the connection."""


class Receiver(Protocol):
    """The end that receives them."""

    def resize(self, messages: Sequence[Specs]) -> None:
        """From the next step on the messages carry this; the other end is told the same."""

    def begin(self) -> None:
        """Get ready for a step."""

    def receive(self) -> Sequence[Value]:
        """The values of the next message, which belong to the caller alone."""

    def end(self) -> None:
        """The step's last message was received."""

    def close(self) -> None:
        """Break the connection."""


class GroupSender:
    """Sends through a group of two ranks."""

    def __init__(self, group: Any, end: int, peer: int, messages: Sequence[Specs], timeout: timedelta) -> None:
        self._group, self._end, self._peer, self._timeout = group, end, peer, timeout
        self._messages = messages
        self._next: Iterator[Specs] = iter(())
        self._sent: deque[tuple[list[Any], list[Tensor]]] = deque()

    def resize(self, messages: Sequence[Specs]) -> None:
        self._messages = messages

    def begin(self) -> None:
        self._next = iter(self._messages)

    def send(self, values: Sequence[Value]) -> None:
        tensors = [
            as_it_lies(value, spec).resolve_conj().resolve_neg().contiguous()  # what a group sends is memory
            for value, spec in zip(values, next(self._next))
            if value is not None and value.numel()
        ]
        self._sent.append(([self._start(tensor) for tensor in tensors], tensors))

    def arrived(self, count: int) -> None:
        for _ in range(count):
            self._wait(self._sent[0][0])
            self._sent.popleft()

    def end(self) -> None:
        self.arrived(len(self._sent))

    def close(self) -> None:
        self._sent.clear()
        dist.destroy_process_group(self._group)

    def warm_up(self, token: Tensor) -> None:
        """Connect; the other end must do the same now."""
        wait_for_all([self._start(token)], self._timeout, self._peer)

    def _wait(self, works: list[Any]) -> None:
        wait_for_all(works, self._timeout, self._peer)

    def _start(self, tensor: Tensor) -> Any:
        try:
            return self._group.send([tensor], 1 - self._end, 0)
        except RuntimeError as error:
            raise broken(f"rank {self._peer}") from error


class GroupReceiver:
    """Receives through a group of two ranks."""

    def __init__(
        self,
        group: Any,
        end: int,
        peer: int,
        messages: Sequence[Specs],
        timeout: timedelta,
        device: torch.device,
    ) -> None:
        self._group, self._end, self._peer, self._timeout, self._device = group, end, peer, timeout, device
        self.resize(messages)
        self._next: Iterator[Specs] = iter(())
        self._posted: deque[tuple[list[Any], list[Value]]] = deque()

    def resize(self, messages: Sequence[Specs]) -> None:
        self._messages = messages
        largest = max((sum(spec.bytes for spec in specs) for specs in messages), default=0)
        self._ahead = max(AHEAD, AHEAD_BYTES // max(largest, 1))

    def begin(self) -> None:
        self._next = iter(self._messages)
        for specs in itertools.islice(self._next, self._ahead):
            self._post(specs)

    def receive(self) -> Sequence[Value]:
        following = next(self._next, None)
        if following is not None:
            self._post(following)
        return self._arrived()

    def _arrived(self) -> Sequence[Value]:
        """The next message that was posted."""
        works, values = self._posted.popleft()
        self._wait(works)
        return values

    def end(self) -> None:
        pass

    def close(self) -> None:
        self._posted.clear()
        dist.destroy_process_group(self._group)

    def warm_up(self, token: Tensor) -> None:
        """Connect; the other end must do the same now."""
        wait_for_all([self._start(token)], self._timeout, self._peer)

    def _post(self, specs: Specs) -> None:
        values = [empty(spec, self._device) for spec in specs]
        works = [
            self._start(as_it_lies(value, spec))
            for value, spec in zip(values, specs)
            if value is not None and value.numel()
        ]
        self._posted.append((works, values))

    def _wait(self, works: list[Any]) -> None:
        wait_for_all(works, self._timeout, self._peer)

    def _start(self, tensor: Tensor) -> Any:
        try:
            return self._group.recv([tensor], 1 - self._end, 0)
        except RuntimeError as error:
            raise broken(f"rank {self._peer}") from error


def wait_for_all(works: list[Any], timeout: timedelta | None, peer: int) -> None:
    """Wait for pieces of communication with rank ``peer``, as ``wait_for`` does."""
    while works:
        wait_for(works.pop(), timeout, f"rank {peer}")


def wait_for(work: Any, timeout: timedelta | None, whom: str) -> None:
    """Wait for a piece of communication; PeerFault says whether ``whom`` is late or gone.

    Without a timeout the device's current stream waits and the host goes on, where communication runs on the device.
    """
    started = time.monotonic()
    try:
        work.wait() if timeout is None else work.wait(timeout)
    except RuntimeError as error:
        del work  # it keeps its connection open
        if timeout is not None and time.monotonic() - started >= 0.99 * timeout.total_seconds():
            raise late(whom, timeout) from error
        raise broken(whom) from error


def late(whom: str, timeout: timedelta) -> PeerFault:
    what = f"waited {timeout.total_seconds():g} s for {whom}: stuck, gone or slow; allow more time with timeout_s="
    return PeerFault(what, late=True)


def broken(whom: str) -> PeerFault:
    return PeerFault(f"the connection to {whom} broke: a process has ended or failed; look at what it printed")


def as_it_lies(value: Tensor, spec: Spec) -> Tensor:
    """The same memory with its dimensions from the outermost to the innermost."""
    return value.permute(spec.order) if spec.order else value


def empty(spec: Spec, device: torch.device) -> Value:
    """Memory laid out as it was when the model was compiled: another layout means other kernels, and other last bits."""
    if spec.dtype == "none":
        return None
    order = spec.order or tuple(range(len(spec.shape)))
    return torch.empty_permuted(spec.shape, order, dtype=getattr(torch, spec.dtype), device=device)
