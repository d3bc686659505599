"""Messages of a device whose group carries host memory (CUDA tensors over gloo): copies through pinned buffers.

    compute   F0 ─┬─ F1 …                        side      ┌ host m0 ▶ device ─┐
    side          └ m0 ▶ pinned ─ event          compute   R0 …               └─ event ─ B0
    thread            event, then send           host      wait for m0 in pinned, before the copy

The copies run on a side stream. A thread waits for each copy and gives it to the group, so that the host goes on launching.
A pinned buffer is used again when the group is done with it (sends) or when the copy out of it is (receives).
"""

from __future__ import annotations

import itertools
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from pipecompile.ir import Spec
from pipecompile.runtime.links import AHEAD, GroupReceiver, GroupSender, Specs, as_it_lies, empty, late
from pipecompile.runtime.transport import Value

Allocate = Callable[[Spec], Value]


def pinned(spec: Spec) -> Value:
    """Host memory that a device copies from and to without the host's help."""
    value = empty(spec, torch.device("cpu"))
    return None if value is None else value.pin_memory()


class _Buffers:
    """Host memory for the messages of a step, of which ``slots`` are in use at a time; made anew when messages change."""

    def __init__(self, allocate: Allocate, slots: int) -> None:
        self._allocate, self._slots = allocate, slots
        self._made: dict[tuple[int, Specs], list[Value]] = {}

    def of_step(self, messages: Sequence[Specs]) -> Iterator[tuple[int, list[Value]]]:
        """For each message its slot and the memory there."""
        for slot, specs in zip(itertools.cycle(range(self._slots)), messages):
            if (slot, specs) not in self._made:
                self._made[slot, specs] = [self._allocate(spec) for spec in specs]
            yield slot, self._made[slot, specs]

    def clear(self) -> None:
        self._made.clear()


class _Helper(threading.Thread):
    """Runs what it is given, in order. It keeps no process alive."""

    def __init__(self) -> None:
        super().__init__(name="pipecompile sends", daemon=True)
        self._given: queue.SimpleQueue[tuple[Future[list[Any]], Callable[[], list[Any]]] | None] = queue.SimpleQueue()

    def give(self, work: Callable[[], list[Any]]) -> Future[list[Any]]:
        future: Future[list[Any]] = Future()
        self._given.put((future, work))
        return future

    def run(self) -> None:
        while (given := self._given.get()) is not None:
            future, work = given
            try:
                future.set_result(work())
            except Exception as error:
                future.set_exception(error)

    def end(self) -> None:
        self._given.put(None)


class StagedSender(GroupSender):
    """Sends copies; ``slots`` messages are under way at most. ``device`` is torch.cuda, or what stands for it."""

    def __init__(
        self,
        group: Any,
        end: int,
        peer: int,
        messages: Sequence[Specs],
        timeout: timedelta,
        device: Any,
        slots: int,
        allocate: Allocate = pinned,
    ) -> None:
        super().__init__(group, end, peer, messages, timeout)
        self._device, self._side = device, device.Stream()
        self._buffers = _Buffers(allocate, slots)
        self._memory: Iterator[tuple[int, list[Value]]] = iter(())
        self._helper = _Helper()
        self._helper.start()

    def resize(self, messages: Sequence[Specs]) -> None:
        super().resize(messages)
        self._buffers.clear()

    def begin(self) -> None:
        super().begin()
        self._memory = self._buffers.of_step(self._messages)

    def send(self, values: Sequence[Value]) -> None:
        specs, (_, hosts) = next(self._next), next(self._memory)
        pairs = _filled(hosts, values)
        self._side.wait_stream(self._device.current_stream())
        with self._device.stream(self._side):
            for host, value in pairs:
                host.copy_(value, non_blocking=True)
            copied = self._side.record_event()

        def start() -> list[Any]:
            copied.synchronize()
            return [self._start(host) for host in _carried(hosts, specs)]

        self._sent.append(([self._helper.give(start)], [value for _, value in pairs]))

    def _wait(self, works: list[Any]) -> None:
        """The values are let go here: the group has sent the copies, so nothing reads the values any more."""
        (started,) = works
        try:
            found = started.result(self._timeout.total_seconds())
        except TimeoutError as error:
            raise late(f"rank {self._peer}", self._timeout) from error
        super()._wait(found)

    def close(self) -> None:
        self._helper.end()
        super().close()

    def warm_up(self, token: Tensor) -> None:
        super()._wait([self._start(torch.zeros(1))])


class StagedReceiver(GroupReceiver):
    """Receives into host memory, and copies from there."""

    def __init__(
        self,
        group: Any,
        end: int,
        peer: int,
        messages: Sequence[Specs],
        timeout: timedelta,
        device: torch.device,
        module: Any,
        allocate: Allocate = pinned,
    ) -> None:
        self._buffers = _Buffers(allocate, AHEAD + 1)
        super().__init__(group, end, peer, messages, timeout, device)
        self._module, self._side = module, module.Stream()
        self._memory: Iterator[tuple[int, list[Value]]] = iter(())
        self._copied: dict[int, Any] = {}
        self._filled: deque[tuple[int, Specs]] = deque()

    def resize(self, messages: Sequence[Specs]) -> None:
        super().resize(messages)
        self._ahead = AHEAD
        self._buffers.clear()

    def begin(self) -> None:
        self._memory = self._buffers.of_step(self._messages)
        super().begin()

    def receive(self) -> Sequence[Value]:
        hosts = super().receive()
        slot, specs = self._filled.popleft()
        with self._module.stream(self._side):
            values = [empty(spec, self._device) for spec in specs]
            for host, value in _filled(hosts, values):
                value.copy_(host, non_blocking=True)
            self._copied[slot] = self._side.record_event()
        compute = self._module.current_stream()
        compute.wait_event(self._copied[slot])
        for made in values:
            if made is not None:
                made.record_stream(compute)  # made on the side stream, which alone the allocator would ask
        return values

    def _post(self, specs: Specs) -> None:
        slot, hosts = next(self._memory)
        if slot in self._copied:
            self._copied.pop(slot).synchronize()
        self._posted.append(([self._start(host) for host in _carried(hosts, specs)], hosts))
        self._filled.append((slot, specs))

    def close(self) -> None:
        self._filled.clear()
        super().close()

    def warm_up(self, token: Tensor) -> None:
        self._wait([self._start(torch.zeros(1))])


def _carried(hosts: Sequence[Value], specs: Specs) -> list[Tensor]:
    """What a message carries, each tensor as it lies in memory."""
    return [as_it_lies(host, spec) for host, spec in zip(hosts, specs) if host is not None and host.numel()]


def _filled(hosts: Sequence[Value], values: Sequence[Value]) -> list[tuple[Tensor, Tensor]]:
    """The pairs between which something is copied."""
    return [
        (host, value) for host, value in zip(hosts, values) if host is not None and value is not None and value.numel()
    ]
