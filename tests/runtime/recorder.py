"""Stands for the CUDA devices of all ranks, and finds memory that is touched twice with nothing to order the two.

Operations run at once, on the CPU, in the order of the program; what is recorded is on which stream they would run. Every
stream, communicator and host thread has a vector clock; launches, events and messages pass it on. An access is a race unless
the clock of whoever makes it knows of the accesses before. Memory goes back to the stream that it was made on, which must
know of every access by others by then, or have been told of them (``record_stream``). (Lamport 1978; Mattern 1989.)
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from graphlib import CycleError, TopologicalSorter
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

Clock = dict[str, int]


def join(clock: Clock, other: Clock) -> None:
    for actor, count in other.items():
        clock[actor] = max(clock.get(actor, 0), count)


class Actor:
    """Something that does one thing after the other."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.clock: Clock = {}

    def tick(self) -> None:
        self.clock[self.name] = self.clock.get(self.name, 0) + 1


class Memory:
    """The last accesses to a storage, by actor, and the actor that it goes back to."""

    def __init__(self, owner: Actor | None) -> None:
        self.owner = owner
        self.written: Clock = {}
        self.read: Clock = {}
        self.told: set[str] = set()


class Stream(Actor):
    def __init__(self, name: str, recorder: Recorder) -> None:
        super().__init__(name)
        self.recorder = recorder

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.record_event())

    def wait_event(self, event: Event) -> None:
        if "wait_event" not in self.recorder.ignored:
            join(self.clock, event.clock)

    def record_event(self) -> Event:
        event = Event(self.recorder)
        event.record(self)
        return event


class Event:
    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.clock: Clock = {}

    def record(self, stream: Stream | None = None) -> None:
        self.clock = dict((stream or self.recorder.stream()).clock)

    def synchronize(self) -> None:
        if "synchronize" not in self.recorder.ignored:
            join(self.recorder.host().clock, self.clock)


class Device:
    """What the module torch.cuda is for one rank."""

    def __init__(self, recorder: Recorder, rank: int) -> None:
        self.recorder, self.rank = recorder, rank
        self.streams = [Stream(f"rank {rank} compute", recorder)]
        self.made = 0

    def Stream(self) -> Stream:
        self.made += 1
        return Stream(f"rank {self.rank} stream {self.made}", self.recorder)

    def current_stream(self) -> Stream:
        return self.streams[-1]

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        self.streams.append(stream)
        yield
        self.streams.pop()


class Work:
    """A send or receive, by ``actor``; over when the other end is there."""

    def __init__(self, recorder: Recorder, kind: str, actor: Actor, tensor: Tensor, on_device: bool) -> None:
        self.recorder, self.kind, self.actor, self.on_device = recorder, kind, actor, on_device
        join(actor.clock, (recorder.stream() if on_device else recorder.host()).clock)
        self.before = dict(actor.clock)
        actor.tick()
        self.node = (actor.name, actor.clock[actor.name])
        with _disable_current_modes():
            self.tensor: Any = tensor.clone() if kind == "send" else tensor
        recorder.access(tensor, actor, writes=kind == "recv")
        self.clock = dict(actor.clock)
        self.met = threading.Event()

    def wait(self, timeout: Any = None) -> None:
        if not self.recorder.running:
            return
        assert self.on_device or timeout is not None, "gloo is waited for with a timeout"
        assert not self.on_device or timeout is None, "this would block the host"
        assert self.met.wait(20), f"a {self.kind} was never met by the other end"
        if f"wait for {self.kind}" not in self.recorder.ignored:
            join((self.recorder.stream() if self.on_device else self.recorder.host()).clock, self.clock)


class Pair:
    """Both ends of a group of two ranks: what was sent, what was posted."""

    def __init__(self) -> None:
        self.sent: deque[Work] = deque()
        self.posted: deque[Work] = deque()
        self.received: list[Work] = []
        self.lock = threading.Lock()

    def meet(self) -> None:
        with self.lock:
            while self.sent and self.posted:
                send, recv = self.sent.popleft(), self.posted.popleft()
                with _disable_current_modes():
                    recv.tensor.copy_(send.tensor)
                recv.tensor = send.tensor = None
                for work in (recv, *self.posted):
                    join(work.clock, send.clock)
                join(recv.actor.clock, send.clock)
                recv.recorder.pairs.append((send, recv))
                send.met.set()
                recv.met.set()


class Group:
    """One rank's end of a group: over NCCL with a stream of its own, over gloo without."""

    def __init__(self, recorder: Recorder, pair: Pair, actor: Actor, on_device: bool) -> None:
        self.recorder, self.pair, self.actor, self.on_device = recorder, pair, actor, on_device

    def send(self, tensors: list[Tensor], end: int, tag: int) -> Work:
        return self._start("send", tensors[0], self.pair.sent)

    def recv(self, tensors: list[Tensor], end: int, tag: int) -> Work:
        return self._start("recv", tensors[0], self.pair.posted)

    def _start(self, kind: str, tensor: Tensor, queue: deque[Work]) -> Work:
        with self.recorder.lock:
            actor = self.actor if self.on_device else Actor(f"{self.actor.name} {next(self.recorder.names)}")
            work = Work(self.recorder, kind, actor, tensor, self.on_device)
            queue.append(work)
            self.pair.meet()
        return work


class Recorder(TorchDispatchMode):
    """``rank`` is to be set to the rank whose host launches; ``races`` are what was found. ``ignored`` kinds of
    synchronisation are left out, to see that this is noticed; with ``one_stream`` a rank's groups share one."""

    def __init__(self, ranks: int, on_device: bool, ignored: tuple[str, ...] = (), one_stream: bool = False) -> None:
        super().__init__()
        self.one_stream = one_stream
        self.rank, self.on_device, self.ignored, self.running = 0, on_device, ignored, False
        self.devices = [Device(self, rank) for rank in range(ranks)]
        self.hosts = [Actor(f"rank {rank} host") for rank in range(ranks)]
        self.helpers: dict[int, Actor] = {}
        self.memory: dict[int, Memory] = {}
        self.watched: dict[int, Any] = {}
        self.races: list[str] = []
        self.pairs: list[tuple[Work, Work]] = []
        self.lock = threading.RLock()
        self.main = threading.get_ident()
        self.names = iter(range(10**9))
        self.actors: dict[str, Actor] = {}
        self.pair_of: list[Pair] = []
        self.counts = [0] * ranks
        self.outside = False

    def new_group(self, processes: list[int], timeout: Any = None) -> Group:
        index = self.counts[self.rank]
        self.counts[self.rank] += 1
        if index == len(self.pair_of):
            self.pair_of.append(Pair())
        name = f"rank {self.rank} group {'s' if self.one_stream else index}"
        return Group(self, self.pair_of[index], self.actors.setdefault(name, Actor(name)), self.on_device)

    def host(self) -> Actor:
        thread = threading.get_ident()
        if thread == self.main:
            return self.hosts[self.rank]
        return self.helpers.setdefault(thread, Actor(f"thread {len(self.helpers)}"))

    def stream(self) -> Stream:
        """The current stream, which gets what the host launches now."""
        found = self.devices[self.rank].current_stream()
        join(found.clock, self.hosts[self.rank].clock)
        return found

    @contextmanager
    def host_memory(self) -> Iterator[None]:
        """What is made here belongs to no stream."""
        self.outside = True
        yield
        self.outside = False

    def record_stream(self, tensor: Tensor, stream: Stream) -> None:
        if "record_stream" not in self.ignored:
            self._of(tensor).told.add(stream.name)

    def access(self, tensor: Tensor, actor: Actor, writes: bool) -> None:
        """``actor`` reads or writes the memory of ``tensor`` now."""
        if not self.running or not tensor.numel():
            return
        memory = self._of(tensor)
        for what, others in (("written", memory.written), *([("read", memory.read)] if writes else [])):
            for other, count in others.items():
                if actor.clock.get(other, 0) < count:
                    self.races.append(f"{'write' if writes else 'read'} by {actor.name}, {what} by {other}")
        (memory.written if writes else memory.read)[actor.name] = actor.clock[actor.name]

    def _of(self, tensor: Tensor, owner: Actor | None = None) -> Memory:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key not in self.memory:
            self.memory[key] = Memory(None if self.outside else owner)
            self.watched[key] = weakref.ref(storage, lambda _: self._gone(key))
        return self.memory[key]

    def _gone(self, key: int) -> None:
        memory = self.memory.pop(key)
        del self.watched[key]
        if memory.owner is None or not self.running:
            return
        known = dict(memory.owner.clock)
        join(known, self.host().clock)  # it is given out again by a later launch
        for accesses in (memory.written, memory.read):
            for actor, count in accesses.items():
                if actor not in memory.told and known.get(actor, 0) < count:
                    self.races.append(f"given back to {memory.owner.name} while {actor} may use it")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self.running:
            return result
        given = dict(zip((a.name for a in func._schema.arguments), args)) | (kwargs or {})
        written, read = [], []
        for argument in func._schema.arguments:
            writes = argument.alias_info is not None and argument.alias_info.is_write
            tensors = [leaf for leaf in tree_leaves(given.get(argument.name)) if isinstance(leaf, Tensor)]
            (written if writes else read).extend(tensors)
        known = {id(t.untyped_storage()) for t in (*written, *read)}
        fresh = [t for t in tree_leaves(result) if isinstance(t, Tensor) and id(t.untyped_storage()) not in known]
        if not fresh and not written:
            return result  # a view
        with self.lock:
            stream = self.stream()
            stream.tick()
            for tensor in fresh:
                self._of(tensor, stream)
            if not func._schema.name.startswith(("aten::empty", "aten::new_empty")):
                for tensor in read:
                    self.access(tensor, stream, writes=False)
                for tensor in (*fresh, *written):
                    self.access(tensor, stream, writes=True)
        return result

    def deadlock(self) -> bool:
        """Whether sends that wait for their receives would wait in a circle."""
        met = {send.node: recv.node for send, recv in self.pairs}
        streams = {actor for node in (*met, *met.values()) for actor in node[:1]}
        graph: dict[tuple[str, int], set[tuple[str, int]]] = {}
        for send, recv in self.pairs:
            before = {(a, n) for work in (send, recv) for a, n in work.before.items() if a in streams}
            graph[recv.node] = {met.get(node, node) for node in before}
        try:
            TopologicalSorter(graph).prepare()
        except CycleError:
            return True
        return False
