"""One rank's ends of all channels: shared memory to ranks of the same host, a ``torch.distributed`` group to others.

A channel never waits behind another. Which sends have arrived is known from the program, at its receives.

    channel 0>1 F     SharedSender ──────▶ SharedReceiver        one host, CPU
    channel 1>2 F     GroupSender ═══════▶ GroupReceiver         two hosts, or CUDA (ends.py)
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipecompile.ir import RECEIVES, Program, Spec
from pipecompile.ir.lifetimes import Arrivals, Channel, arrivals, most_on_the_way
from pipecompile.runtime.ends import Ends
from pipecompile.runtime.links import Receiver, Sender, Specs
from pipecompile.runtime.messages import Message, Plans, channels, message_of
from pipecompile.runtime.replicas import World
from pipecompile.runtime.shared_memory import SharedReceiver, SharedSender, host, meet
from pipecompile.runtime.transport import Value

Contents = dict[Channel, list[Specs]]
"""What the messages of each channel carry, in order."""


@dataclass(frozen=True, slots=True)
class Receive:
    """A receive of the row: its channel's end, and which sends have arrived after it."""

    receiver: Receiver
    arrived: tuple[tuple[Sender, int], ...]


@dataclass(frozen=True, slots=True)
class Meeting:
    """Where ranks find each other: the store, a name in it, and how long to wait there. ``share``: memory, if possible."""

    store: Any
    name: str
    timeout: timedelta
    world: World
    share: bool = True


class Channels:
    """One rank's ends of all channels. All ranks must make theirs at the same time: groups are made in one order.

    ``told``: values that one rank has at the end of a step and all want, each with its rank.
    """

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
        found = contents(program, plans)
        over = arrivals(program)
        self._senders: dict[Channel, Sender] = {}
        self._receivers: dict[Channel, Receiver] = {}
        hosts = _hosts(program.shape.ranks, rank, device, meeting)
        self._tells = _tellings(told, program.shape.ranks) if len(set(hosts)) == 1 and hosts[0] else {}
        self._rank = rank
        slots = most_on_the_way(program, over) | dict.fromkeys(self._tells, 1)
        found |= self._tells
        near = [c for c in found if hosts[c[0]] and hosts[c[0]] == hosts[c[1]]]
        self._share({c: found[c] for c in near}, slots, rank, hosts, meeting)
        self._group({c: found[c] for c in found if c not in near}, slots, ends or Ends.of(device), meeting)
        self._ends: tuple[Sender | Receiver, ...] = (*self._senders.values(), *self._receivers.values())
        self._receives = self._plan_receives(program, rank, plans, over)
        self._next = iter(self._receives)

    def _share(
        self,
        found: dict[Channel, list[Specs]],
        slots: dict[Channel, int],
        rank: int,
        hosts: list[str],
        meeting: Meeting,
    ) -> None:
        """Ends in shared memory."""
        outgoing, incoming = [c for c in found if c[0] == rank], [c for c in found if c[1] == rank]
        if not outgoing and not incoming:
            return
        spin = hosts.count(hosts[rank]) * meeting.world.replicas * torch.get_num_threads() <= len(
            os.sched_getaffinity(0)
        )
        connections = meet(outgoing, incoming, meeting.store, meeting.name, rank, meeting.timeout)
        for c in outgoing:
            self._senders[c] = SharedSender(connections[c], c[1], found[c], slots[c], meeting.timeout, spin)
        for c in incoming:
            self._receivers[c] = SharedReceiver(connections[c], c[0], found[c], slots[c], meeting.timeout, spin)

    def _group(
        self, found: dict[Channel, list[Specs]], slots: dict[Channel, int], ends: Ends, meeting: Meeting
    ) -> None:
        """Ends of groups, connected in the one order in which all ranks list them, those of all replicas made by all."""
        world, rank, timeout = meeting.world, meeting.world.rank, meeting.timeout
        groups = {}
        for channel, replica in itertools.product(found, range(world.replicas)):
            group = dist.new_group(world.processes_of(channel[:2], replica), timeout=timeout)
            if replica == world.replica:
                groups[channel] = group
        token = torch.zeros(1, device=ends.device)
        for channel, messages in found.items():
            source, target, _ = channel
            if rank == source:
                sender = ends.sender(channel, groups[channel], messages, timeout, slots[channel])
                sender.warm_up(token)
                self._senders[channel] = sender
            elif rank == target:
                receiver = ends.receiver(channel, groups[channel], messages, timeout)
                receiver.warm_up(token)
                self._receivers[channel] = receiver

    def _plan_receives(self, program: Program, rank: int, plans: Plans, over: Arrivals) -> list[Receive]:
        planned = []
        for position, one in enumerate(program.rows[rank]):
            if one.op in RECEIVES:
                channel = message_of(one, plans, program.shape.placement).channel
                arrived = tuple((self._senders[c], count) for c, count in over[rank, position].items())
                planned.append(Receive(self._receivers[channel], arrived))
        return planned

    def __len__(self) -> int:
        """How many channels begin or end here."""
        return len(self._ends)

    def resize(self, carried: Contents) -> None:
        """From the next step on messages carry this; all ranks must call it before that step."""
        for ends in (self._senders, self._receivers):
            for channel in carried.keys() & ends.keys():
                ends[channel].resize(carried[channel])

    def begin(self) -> None:
        self._next = iter(self._receives)
        for end in self._ends:
            end.begin()

    def send(self, message: Message, values: Sequence[Value]) -> None:
        self._senders[message.channel].send(values)

    def receive(self, message: Message) -> Sequence[Value]:
        plan = next(self._next)
        values = plan.receiver.receive()
        for sender, count in plan.arrived:
            sender.arrived(count)
        return values

    def tell(self, index: int, mine: Tensor | None) -> Tensor | None:
        """A value of ``told`` on every rank, ``mine`` on the rank that has it; None if it must be told otherwise."""
        for channel in self._tells:
            if channel[2] == str(index):
                if channel[0] == self._rank:
                    self._senders[channel].send([mine])
                elif channel[1] == self._rank:
                    (mine,) = self._receivers[channel].receive()
        return mine if self._tells else None

    def end(self) -> None:
        """Let go of everything that was sent; it may still be on its way in shared memory."""
        for end in self._ends:
            end.end()

    def close(self) -> None:
        """Break all connections, so that whoever waits for this rank hears of it now."""
        ends, self._ends = self._ends, ()
        for end in ends:
            end.close()


def contents(program: Program, plans: Plans, at: Sequence[Plans] = ()) -> Contents:
    """What each channel carries, where microbatches have the plans ``at``."""
    found = channels(program, plans, at)
    return {channel: [message.specs for message in messages] for channel, messages in found.items()}


def _tellings(told: Sequence[tuple[int, Spec]], ranks: int) -> dict[Channel, list[Specs]]:
    """A channel for each value and each rank that wants it."""
    return {
        (source, target, str(index)): [(spec,)]
        for index, (source, spec) in enumerate(told)
        for target in range(ranks)
        if target != source
    }


def _hosts(ranks: int, rank: int, device: torch.device, meeting: Meeting) -> list[str]:
    """For each rank the host whose memory it shares, empty if none."""
    mine = host() if meeting.share and device.type == "cpu" else ""
    meeting.store.set(f"{meeting.name}/host/{rank}", mine)
    return [meeting.store.get(f"{meeting.name}/host/{other}").decode() for other in range(ranks)]
