"""Messages between processes of one host: a ring of slots in shared memory, and a socket that says which are filled.

    sender    slot 1 ◀── copy of m4, then one byte into the socket
    memory    │ m3 │ m4 │ … │        m4's slot was m1's: the program says that m1 has arrived before m4 is sent
    receiver  one byte out of the socket, then a copy of slot 1 ──▶ its own tensor

Both ends know every message, so slots, offsets and views are laid out before the first step. Nobody acknowledges single
messages; at the end of a step the receiver answers one byte, for which the next step's sender waits. Memory and socket
have no name in any file system and go with the processes that hold them, however these end; the socket of a process
that is gone reads as closed at once.
"""

from __future__ import annotations

import itertools
import mmap
import os
import secrets
import select
import socket
import struct
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipecompile.errors import RuntimeFault
from pipecompile.ir import Spec
from pipecompile.ir.lifetimes import Channel
from pipecompile.runtime.links import Specs, broken, late
from pipecompile.runtime.transport import Value

ALIGNMENT = 64
SPIN_S = 0.0005
"""How long a receiver asks again and again before it sleeps: to be woken costs tens of microseconds."""
BURST = 4096


def host() -> str:
    """A text that is equal for processes that can share memory; empty where the system offers no way."""
    try:
        with socket.socket(socket.AF_UNIX) as probe:
            probe.bind(_fresh_address())
        os.close(os.memfd_create("pipecompile"))
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        spaces = [os.stat(f"/proc/self/ns/{kind}").st_ino for kind in ("net", "user")]
    except (AttributeError, OSError):
        return ""
    return f"{boot} {spaces} {os.getuid()}"


def _fresh_address() -> str:
    """A name in Linux's abstract space of sockets, which no file stands for."""
    return f"\0pipecompile {secrets.token_hex(16)}"


class _End(ABC):
    """A socket to the other end, and memory for as many messages at once as there are ``slots``."""

    def __init__(
        self,
        connection: socket.socket,
        peer: int,
        messages: Sequence[Specs],
        slots: int,
        timeout: timedelta,
        spin: bool,
    ) -> None:
        self._connection, self._timeout = connection, timeout
        self._whom = f"rank {peer}"
        self._spin_s = SPIN_S if spin else 0.0
        connection.setblocking(False)
        self._poll = select.poll()
        self._views: list[list[Tensor | None]] = []
        self._next: Iterator[list[Tensor | None]] = iter(())
        self._heard = 0
        self._room = 0
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._slots = slots
        self.resize(messages)

    @abstractmethod
    def resize(self, messages: Sequence[Specs]) -> None:
        """Lay the memory out for a step's messages, with new memory where they do not fit into the old."""

    def close(self) -> None:
        self._connection.close()
        self._views, self._next = [], iter(())

    def _map(self, memory: int, size: int) -> None:
        self._memory = torch.frombuffer(mmap.mmap(memory, size), dtype=torch.uint8)
        self._room = size

    def _tell(self) -> None:
        """One byte to the other end."""
        try:
            self._connection.send(b".")
        except BlockingIOError:
            self._sleep(select.POLLOUT)
            self._tell()
        except OSError as error:
            raise broken(self._whom) from error

    def _hear(self) -> None:
        """One byte from the other end."""
        if not self._heard:
            self._heard = self._listen()
        self._heard -= 1

    def _listen(self) -> int:
        until = time.perf_counter() + self._spin_s
        while True:
            try:
                heard = len(self._connection.recv(BURST))
            except BlockingIOError:
                if time.perf_counter() >= until:
                    self._sleep(select.POLLIN)
                else:
                    os.sched_yield()
                continue
            except OSError as error:
                raise broken(self._whom) from error
            if not heard:
                raise broken(self._whom)
            return heard

    def _sleep(self, event: int) -> None:
        self._poll.register(self._connection, event)
        if not self._poll.poll(self._timeout.total_seconds() * 1e3):
            raise late(self._whom, self._timeout)


class SharedSender(_End):
    """Makes the memory and fills it."""

    _begun = False

    def resize(self, messages: Sequence[Specs]) -> None:
        """Send new memory where the messages do not fit into the old one."""
        self._wait_until_taken()
        if self._room < (needed := _slot_bytes(messages) * self._slots):
            memory = os.memfd_create("pipecompile", os.MFD_CLOEXEC)
            try:
                os.ftruncate(memory, needed)
                socket.send_fds(self._connection, [b"."], [memory])
                self._map(memory, needed)
            except OSError as error:
                raise broken(self._whom) from error
            finally:
                os.close(memory)
        self._views = _views(self._memory, messages, self._slots)

    def _wait_until_taken(self) -> None:
        """Until the other end has taken all of the step before."""
        if self._begun:
            self._hear()
        self._begun = False

    def begin(self) -> None:
        self._wait_until_taken()
        self._begun = True
        self._next = iter(self._views)

    def send(self, values: Sequence[Value]) -> None:
        for view, value in zip(next(self._next), values):
            if view is not None:
                assert value is not None
                view.copy_(value)
        self._tell()

    def arrived(self, count: int) -> None:
        pass

    def end(self) -> None:
        pass


class SharedReceiver(_End):
    """Maps the memory and copies out of it."""

    def resize(self, messages: Sequence[Specs]) -> None:
        """Take the sender's new memory where the messages do not fit into the old one."""
        if self._room < (needed := _slot_bytes(messages) * self._slots):
            self._sleep(select.POLLIN)
            try:
                _, memories, _, _ = socket.recv_fds(self._connection, 1, 1)
            except OSError as error:
                raise broken(self._whom) from error
            if not memories:
                raise broken(self._whom)
            try:
                self._map(memories[0], needed)
            finally:
                os.close(memories[0])
        self._views = _views(self._memory, messages, self._slots)

    def begin(self) -> None:
        self._next = iter(self._views)

    def receive(self) -> Sequence[Value]:
        self._hear()
        return [None if view is None else view.clone() for view in next(self._next)]

    def end(self) -> None:
        """Say that the step was taken; a sender that has ended after its last step need not hear it."""
        with suppress(RuntimeFault):
            self._tell()


def _slot_bytes(messages: Sequence[Specs]) -> int:
    return max(sum(map(_aligned, specs)) for specs in messages)


def _aligned(spec: Spec) -> int:
    return max(-(-_bytes(spec) // ALIGNMENT) * ALIGNMENT, ALIGNMENT)


def _bytes(spec: Spec) -> int:
    return 0 if spec.dtype == "none" else spec.bytes


def _views(memory: Tensor, messages: Sequence[Specs], slots: int) -> list[list[Tensor | None]]:
    """For each message the tensors of its slot, None for a value that is None."""
    size = _slot_bytes(messages)
    found = []
    for slot, specs in zip(itertools.cycle(range(slots)), messages):
        places = itertools.accumulate(map(_aligned, specs), initial=slot * size)
        found.append([_view(memory, place, spec) for place, spec in zip(places, specs)])
    return found


def _view(memory: Tensor, place: int, spec: Spec) -> Tensor | None:
    """A value's memory, laid out as it was when the model was compiled."""
    if spec.dtype == "none":
        return None
    order = spec.order or tuple(range(len(spec.shape)))
    flat = memory.narrow(0, place, spec.bytes).view(getattr(torch, spec.dtype))
    lying = flat.view([spec.shape[dim] for dim in order])
    return lying.permute([order.index(dim) for dim in range(len(order))])


def meet(
    outgoing: Sequence[Channel], incoming: Sequence[Channel], store: Any, name: str, rank: int, timeout: timedelta
) -> Mapping[Channel, socket.socket]:
    """A connection for each channel that begins or ends at ``rank``; all ranks of the host must call this."""
    connections: dict[Channel, socket.socket] = {}
    with socket.socket(socket.AF_UNIX) as door:
        address = _fresh_address()
        door.bind(address)
        door.listen(len(outgoing) + 16)
        door.settimeout(timeout.total_seconds())
        store.set(f"{name}/door/{rank}", address[1:])
        for channel in incoming:
            connections[channel] = _knock("\0" + store.get(f"{name}/door/{channel[0]}").decode(), channel)
        waiting = set(outgoing)
        while waiting:
            channel, connection = _open(door, waiting)
            waiting.remove(channel)
            connections[channel] = connection
    return connections


def _knock(address: str, channel: Channel) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(address)
        connection.sendall(f"{channel[1]} {channel[2]}".ljust(32).encode())
    except OSError as error:
        raise broken(f"rank {channel[0]}") from error
    return connection


def _open(door: socket.socket, waiting: set[Channel]) -> tuple[Channel, socket.socket]:
    """The next connection of this user's processes; anybody may knock at an abstract address."""
    source = next(iter(waiting))[0]
    while True:
        try:
            connection, _ = door.accept()
        except TimeoutError as error:
            raise late(f"rank {min(waiting)[1]}", timedelta(seconds=door.gettimeout() or 0)) from error
        _, user, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if user == os.getuid():
            connection.settimeout(door.gettimeout())
            target, kind = connection.recv(32, socket.MSG_WAITALL).decode().split()
            return (source, int(target), kind), connection
        connection.close()
