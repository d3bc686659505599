"""Messages between processes: one ``torch.distributed`` group for each channel, so that none waits behind another.

The order of a rank's receives is known, so each channel always has its next ``AHEAD`` receives posted, and a message
finds its buffer ready. Sends are asynchronous; their tensors are kept until the program says that they have arrived.

    channel 0>1 F      posted: m1 m2 │ RECV m1 ──▶ post m3, wait for m1
    channel 1>0 F      sent:   m0 m1 │ RECV says "m0 has arrived" ──▶ let m0 go
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipecompile.errors import RuntimeFault
from pipecompile.ir import RECEIVES, Program, Spec
from pipecompile.runtime.lifetimes import arrivals
from pipecompile.runtime.messages import Channel, Message, Plans, channels, message_of
from pipecompile.runtime.transport import Value

AHEAD = 2
"""Receives posted on each channel before they are needed."""

Blank = Spec | None
"""What a buffer looks like; None: a value that is None."""
Posted = tuple[list[Any], list[Value]]


@dataclass(frozen=True, slots=True)
class Receive:
    """A receive of the row: its channel, what to post before waiting for it, which sends have arrived after it."""

    channel: Channel
    post: tuple[Blank, ...] | None
    arrived: tuple[tuple[Channel, int], ...]


class Channels:
    """One rank's ends of all channels. All ranks must make theirs at the same time: groups are made in one order."""

    def __init__(self, program: Program, rank: int, plans: Plans, device: torch.device, timeout_s: float) -> None:
        found = channels(program, plans)
        self._device = device
        self._timeout = timedelta(seconds=timeout_s)
        self._groups: dict[Channel, Any] = {}
        for channel in found:
            group = dist.new_group(list(channel[:2]), timeout=self._timeout)
            if rank in channel[:2]:
                self._groups[channel] = group
        self._incoming = {
            channel: [_blanks(message) for message in messages]
            for channel, messages in found.items()
            if channel[1] == rank
        }
        self._receives = _plan_receives(program, rank, plans, self._incoming)
        self._next = 0
        self._posted: dict[Channel, deque[Posted]] = {channel: deque() for channel in self._incoming}
        self._sent: dict[Channel, deque[tuple[list[Any], list[Tensor]]]] = {
            channel: deque() for channel in self._groups if channel[0] == rank
        }
        self._ends = {channel: (0 if channel[0] < channel[1] else 1) for channel in self._groups}
        self._warm_up(rank)

    def _warm_up(self, rank: int) -> None:
        """Connect every channel in the one order in which all ranks list them."""
        token = torch.zeros(1, device=self._device)
        for channel in self._groups:
            if channel[0] == rank:
                self._wait([self._start_send(channel, token)], channel[1])
            else:
                self._wait([self._start_receive(channel, token)], channel[0])

    def begin(self) -> None:
        self._next = 0
        for channel, messages in self._incoming.items():
            for blanks in messages[:AHEAD]:
                self._post(channel, blanks)

    def send(self, message: Message, values: Sequence[Value]) -> None:
        tensors = [
            _as_it_lies(value, spec).contiguous()
            for value, spec in zip(values, message.specs)
            if value is not None and value.numel()
        ]
        works = [self._start_send(message.channel, tensor) for tensor in tensors]
        self._sent[message.channel].append((works, tensors))

    def receive(self, message: Message) -> Sequence[Value]:
        plan = self._receives[self._next]
        self._next += 1
        if plan.post is not None:
            self._post(plan.channel, plan.post)
        works, values = self._posted[plan.channel].popleft()
        self._wait(works, plan.channel[0])
        for channel, count in plan.arrived:
            for _ in range(count):
                self._wait(self._sent[channel].popleft()[0], channel[1])
        return values

    def end(self) -> None:
        """Wait until everything that was sent has arrived."""
        for channel, queue in self._sent.items():
            while queue:
                self._wait(queue.popleft()[0], channel[1])

    def close(self) -> None:
        """Break all connections, so that whoever waits for this rank hears of it now."""
        self._posted.clear()
        self._sent.clear()
        while self._groups:
            dist.destroy_process_group(self._groups.popitem()[1])

    def _post(self, channel: Channel, blanks: tuple[Blank, ...]) -> None:
        values: list[Value] = []
        works = []
        for blank in blanks:
            value = None if blank is None else _empty(blank, self._device)
            values.append(value)
            if value is not None and blank is not None and value.numel():
                works.append(self._start_receive(channel, _as_it_lies(value, blank)))
        self._posted[channel].append((works, values))

    def _start_send(self, channel: Channel, tensor: Tensor) -> Any:
        try:
            return self._groups[channel].send([tensor], 1 - self._ends[channel], 0)
        except RuntimeError as error:
            raise _broken(f"rank {channel[1]}") from error

    def _start_receive(self, channel: Channel, tensor: Tensor) -> Any:
        try:
            return self._groups[channel].recv([tensor], self._ends[channel], 0)
        except RuntimeError as error:
            raise _broken(f"rank {channel[0]}") from error

    def _wait(self, works: list[Any], peer: int) -> None:
        while works:
            wait_for(works.pop(), self._timeout, f"rank {peer}")


def wait_for(work: Any, timeout: timedelta, whom: str) -> None:
    """Wait for a piece of communication; RuntimeFault says whether ``whom`` is late or gone."""
    started = time.monotonic()
    try:
        work.wait(timeout)
    except RuntimeError as error:
        del work  # it keeps its connection open
        limit = timeout.total_seconds()
        if time.monotonic() - started >= 0.99 * limit:
            raise RuntimeFault(
                f"waited {limit:g} s for {whom}, which is stuck, gone or slow; allow more time with timeout_s="
            ) from error
        raise _broken(whom) from error


def _broken(whom: str) -> RuntimeFault:
    return RuntimeFault(f"the connection to {whom} broke, its process has ended or failed; look at what it printed")


def _blanks(message: Message) -> tuple[Blank, ...]:
    return tuple(None if spec.dtype == "none" else spec for spec in message.specs)


def _empty(spec: Spec, device: torch.device) -> Tensor:
    """Memory laid out as it was when the model was compiled: another layout means other kernels, and other last bits."""
    order = spec.order or tuple(range(len(spec.shape)))
    return torch.empty_permuted(spec.shape, order, dtype=getattr(torch, spec.dtype), device=device)


def _as_it_lies(value: Tensor, spec: Spec) -> Tensor:
    """The same memory with its dimensions from the outermost to the innermost."""
    return value.permute(spec.order) if spec.order else value


def _plan_receives(
    program: Program, rank: int, plans: Plans, incoming: dict[Channel, list[tuple[Blank, ...]]]
) -> list[Receive]:
    """The row's receives in order, each with the one to post ahead on its channel."""
    arrived = arrivals(program, plans)
    seen = dict.fromkeys(incoming, 0)
    planned = []
    for position, one in enumerate(program.rows[rank]):
        if one.op in RECEIVES:
            channel = message_of(one, plans, program.shape.placement).channel
            ahead = seen[channel] + AHEAD
            seen[channel] += 1
            post = incoming[channel][ahead] if ahead < len(incoming[channel]) else None
            planned.append(Receive(channel, post, tuple(arrived[rank, position].items())))
    return planned
